"""meshnode: one agent on every machine; its job here is only to say which version this is."""

__version__ = "0.1.0"
