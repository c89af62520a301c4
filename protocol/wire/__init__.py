"""Bytes to typed messages and back: framing, codec, signatures, replay windows, limits. Decides nothing."""
