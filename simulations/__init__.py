"""Proof: a seeded discrete-event world that drives the very machines of protocol/ with virtual time, network and disk."""
