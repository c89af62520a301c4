"""Tiny models of random weights, the same bytes everywhere: what certifies architectures, and versions of llama.cpp."""
