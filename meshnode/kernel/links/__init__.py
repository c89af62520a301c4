"""Links: mutually authenticated connections between this node and its peers, and calls and bulk streams over them."""

from meshnode.kernel.links.bulk import BulkGrant, BulkStream
from meshnode.kernel.links.connection import IDLE, LinkFacts
from meshnode.kernel.links.contracts import AddressBook, Gate, LinkEvent, PeerMethod
from meshnode.kernel.links.links import Links
from meshnode.kernel.links.settings import LinkSettings
from meshnode.kernel.links.tls import TlsContexts, make_contexts

__all__ = [
    "IDLE",
    "AddressBook",
    "BulkGrant",
    "BulkStream",
    "Gate",
    "LinkEvent",
    "LinkFacts",
    "LinkSettings",
    "Links",
    "PeerMethod",
    "TlsContexts",
    "make_contexts",
]
