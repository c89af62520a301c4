"""What peers may ask about model files: bytes, claims, to have layers, to delete them."""

from collections.abc import Mapping
from typing import Any

from meshnode.kernel.links.contracts import PeerMethod
from meshnode.llm.service.weights.contracts import ClaimRequest, DropRequest, ReadRequest, WantRequest
from meshnode.llm.service.weights.weights import Weights


def weight_methods(weights: Weights) -> Mapping[str, PeerMethod[Any]]:
    """The methods by name."""
    return {
        "llm.weights.read": PeerMethod(ReadRequest, weights.read_for),
        "llm.weights.claim": PeerMethod(ClaimRequest, weights.claim_for),
        "llm.weights.want": PeerMethod(WantRequest, weights.want_for),
        "llm.weights.drop": PeerMethod(DropRequest, weights.drop_for),
    }
