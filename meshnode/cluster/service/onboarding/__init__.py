"""How a machine gets into the mesh: invitations, the listener that answers joiners, and the joiner's own side."""
