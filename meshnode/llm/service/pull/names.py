"""The catalogue as people see it: models that can be pulled by name, and about what they need."""

from meshnode.llm.core.catalogue import Catalogue
from meshnode.llm.model import ModelCard


class Names:
    """Cards of the catalogue. Sizes are about right until the header of a file is read."""

    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue = catalogue

    def catalogue(self) -> list[ModelCard]:
        """In the order of the list, each under its shortest name."""
        return [
            ModelCard(
                name=entry.names[0],
                aliases=entry.names[1:],
                description=entry.model.description,
                architecture=entry.model.architecture,
                quantization=entry.file.quantisation,
                parameters=entry.model.parameters,
                file_bytes=entry.file.bytes,
                layers=entry.model.layers,
                context_max=entry.model.context_max,
                embeds=entry.model.embeds,
                licence=entry.model.licence,
                source=entry.file.ref,
                heads=entry.model.heads,
                embed_length=entry.model.n_embd,
            )
            for entry in self._catalogue.entries
        ]
