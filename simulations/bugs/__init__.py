"""Bugs that are put back into the protocol on purpose: the proof that the simulator can see."""
