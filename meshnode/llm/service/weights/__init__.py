"""Model files in the mesh: which there are, who holds what of them, and having the layers of a stage on this disk."""
