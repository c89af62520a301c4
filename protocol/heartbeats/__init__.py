"""Resource heartbeats: what each node has and does now, to everyone, under a byte budget that holds at any mesh size."""
