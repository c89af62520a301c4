"""Invariants, one file each. A checker watches a world from outside and speaks up when one does not hold."""
