"""The catalogue as the pull service and the planner see it: a name's reference, and a shape with its cuts."""

from importlib import resources

from meshnode.llm.core.catalogue import Catalogue, CatalogueEntry, read_catalogue, shape_of
from meshnode.llm.gguf.rules import REFUSED, RULES
from meshnode.llm.service.pull.introducing import Described
from protocol.sharding.shapes import ModelShape


def shipped_catalogue() -> Catalogue:
    """The list that comes with the package. Reads a file of some 20 kB."""
    return read_catalogue(resources.files("meshnode.llm").joinpath("data/catalogue.json").read_bytes())


class Offers:
    """What may be pulled by name."""

    def __init__(self, catalogue: Catalogue) -> None:
        self.catalogue = catalogue

    def find(self, name: str) -> tuple[str, Described] | None:
        """The reference of a name, and what is known of the model."""
        entry = self.catalogue.find(name)
        if entry is None:
            return None
        names, model = entry.names, entry.model
        return entry.file.ref, Described(names[0], entry.file.ref, model.description, model.licence, names[1:])

    def expected(self, name: str) -> ModelShape | None:
        """About what a model needs before it is pulled, by any of its names."""
        entry = self.catalogue.find(name)
        return None if entry is None else expected_shape(entry)


def expected_shape(entry: CatalogueEntry) -> ModelShape:
    """About what a model of the catalogue needs and where it can be cut, before its header is known."""
    model = entry.model
    rule = RULES.get(model.architecture)
    if rule is None:
        why = REFUSED.get(model.architecture, "nobody has shown yet that it computes the same when cut")
        return shape_of(entry, uncut_reason=f"models of the architecture {model.architecture!r} cannot be split: {why}")
    if rule.layers_max is not None and model.layers > rule.layers_max:
        why = f"{model.architecture} of {model.layers} layers computes with a constant that follows from their number"
        return shape_of(entry, uncut_reason=why)
    return shape_of(entry, cuts=tuple(range(rule.cut_every, model.layers, rule.cut_every)))
