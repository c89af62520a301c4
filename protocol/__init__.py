"""Pure decisions of the mesh: state machines and codecs that own no clock, no randomness, no socket and no disk."""
