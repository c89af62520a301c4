"""The cluster: who is in the mesh, how machines come in and go, and what the mesh as a whole is asked."""
