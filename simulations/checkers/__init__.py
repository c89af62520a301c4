"""Invariants, one file each. A checker watches a world from outside and speaks up when something that must hold does not."""
