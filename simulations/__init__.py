"""Proof: a seeded discrete-event world drives the very machines of protocol/ with virtual time, network and disk."""
