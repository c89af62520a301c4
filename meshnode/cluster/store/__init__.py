"""The cluster's tables, and the only SQL on them: which mesh this node belongs to, and the invitations it gave out."""

from meshnode.cluster.store.mesh import Mesh, MeshStore

__all__ = ["Mesh", "MeshStore"]
