"""What the planner asks of the weights: sizes of models, and where their layers lie."""

from collections.abc import Sequence

from meshnode.llm.service.weights.weights import Weights
from protocol.ids import NodeId
from protocol.sharding.shapes import ModelShape


class Shapes:
    """Read from the records of the mesh."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights

    def shape(self, digest: str) -> ModelShape | None:
        """A model's sizes, if anybody knows it."""
        found = self._weights.manifest(digest)
        return None if found is None else found.shape

    def architecture(self, digest: str) -> str:
        """A model's; empty if nobody knows it."""
        found = self.shape(digest)
        return "" if found is None else found.architecture

    def holds(self, node: NodeId, digest: str) -> tuple[tuple[int, int], ...]:
        """Ranges of layers on that node's disk."""
        return self._weights.holds(node, digest)

    def siblings(self, digest: str) -> Sequence[tuple[str, int]]:
        """(quantisation, bytes) of the same model in other sizes."""
        found = self._weights.manifest(digest)
        if found is None:
            return ()
        shape = found.shape
        alike = (shape.architecture, shape.layers, shape.n_embd, shape.n_vocab, shape.parameters)
        return [
            (other.shape.quantisation, other.bytes)
            for other in self._weights.manifests()
            if other.digest != digest
            and alike
            == (
                other.shape.architecture,
                other.layers,
                other.shape.n_embd,
                other.shape.n_vocab,
                other.shape.parameters,
            )
        ]
