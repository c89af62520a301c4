"""Replicated signed records: small shared state, last writer wins per key, repaired pair by pair."""
