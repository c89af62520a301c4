"""How one attempt runs on this machine: isolation, supervision, output. What runs and why is the service's to say."""
