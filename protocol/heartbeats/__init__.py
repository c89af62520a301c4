"""Resource heartbeats: what each node has and does now, to everyone, within a byte budget at any size."""
