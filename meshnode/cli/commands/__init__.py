"""One module for each family of commands: read the flags, ask the agent one thing, print the answer."""
