"""Which node runs which task: what was asked, what was tried, and the machines that decide what happens next."""
