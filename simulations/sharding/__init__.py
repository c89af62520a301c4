"""Models in the simulated mesh: the real machines of protocol/sharding around a toy engine."""
