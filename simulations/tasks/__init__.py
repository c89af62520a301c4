"""Tasks over a simulated mesh: the real machines, with processes that outlive agents."""
