"""The catalogue: names that lead to one file each, figures that can be true."""

import msgspec
import pytest

from meshnode.llm.core.catalogue import Catalogue, CatalogueEntry, shape_of
from meshnode.llm.service.pull.offers import Offers, expected_shape, shipped_catalogue
from meshnode.llm.service.pull.refs import RemoteRef, parse_ref

CATALOGUE = shipped_catalogue()
BITS = {"Q4_K_M": (4.2, 6.6), "Q8_0": (7.8, 9.2), "F16": (15, 17), "MXFP4": (4.0, 5.0)}


@pytest.mark.parametrize(
    "name",
    ["llama3.2:3b", "phi3:mini", "mistral:7b", "llama3:8b", "codellama:34b", "mixtral:8x7b", "llama3:70b", "qwen3:8b"],
)
def test_well_known_names_are_there(name: str) -> None:
    entry = CATALOGUE.find(name.upper())
    assert entry is not None
    assert entry.names[0] == name
    assert CATALOGUE.find(f"{name}:latest") is entry


def test_a_quantisation_is_part_of_a_name() -> None:
    default, other = CATALOGUE.find("qwen3:8b"), CATALOGUE.find("qwen3:8b-q8_0")
    assert default is not None
    assert other is not None
    assert CATALOGUE.find("qwen3:8b-q4_k_m") is default
    assert (default.file.quantisation, other.file.quantisation) == ("Q4_K_M", "Q8_0")
    assert other.names == ("qwen3:8b-q8_0",)


def test_near_names_are_of_the_family_first() -> None:
    assert "qwen3:8b" in CATALOGUE.near("qwen3:9b")
    assert CATALOGUE.near("lama3.2:3b")[0] == "llama3.2:3b"
    assert CATALOGUE.near("zzzzzz") == []


@pytest.mark.parametrize("entry", CATALOGUE.entries, ids=lambda entry: entry.name)
def test_figures_can_be_true(entry: CatalogueEntry) -> None:
    ref = parse_ref(entry.file.ref)
    assert isinstance(ref, RemoteRef)
    assert ref.hub
    low, high = BITS[entry.file.quantisation]
    assert low < entry.file.bytes * 8 / entry.model.parameters < high
    shape = expected_shape(entry)
    assert shape.layers == entry.model.layers
    assert abs(shape.total_bytes - entry.file.bytes) < entry.file.bytes * 0.12
    assert shape.cuts or shape.uncut_reason
    assert entry.model.heads % entry.model.heads_kv == 0
    assert entry.model.licence
    assert entry.model.description.endswith(".")


def test_keys_and_values_are_counted_as_the_header_would() -> None:
    entry = CATALOGUE.find("llama3.1:8b")
    assert entry is not None
    assert sum(shape_of(entry).kv_bytes_per_token) == 131_072


def test_a_name_leads_to_its_reference_and_description() -> None:
    found = Offers(CATALOGUE).find("llama3.2:3b")
    assert found is not None
    source, described = found
    assert source == "hf:bartowski/Llama-3.2-3B-Instruct-GGUF/Llama-3.2-3B-Instruct-Q4_K_M.gguf"
    assert (described.name, described.licence) == ("llama3.2:3b", "llama3.2")
    assert Offers(CATALOGUE).find("nothing") is None


def test_two_models_of_one_name_are_refused() -> None:
    model = CATALOGUE.entries[0].model
    with pytest.raises(ValueError, match="are called"):
        Catalogue([model, msgspec.structs.replace(model, description="Another.")])
