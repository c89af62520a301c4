"""A tiny model of random weights and its stages, made once a run; skips everything where llama.cpp is not installed."""

import importlib.util
import itertools
from collections.abc import Callable
from pathlib import Path

import pytest

from meshnode.llm.engine.spec import StageSpec
from meshnode.llm.gguf.slicing import slice_layers
from meshnode.llm.gguf.source import FileSource
from meshnode.llm.gguf.weights import open_weights
from tests.support.tiny_models import tiny_model

LAYERS = 8
Cut = Callable[..., list[tuple[str, int]]]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if importlib.util.find_spec("llama_cpp") is not None:
        return
    absent = pytest.mark.skip(reason="llama-cpp-python is not installed (it needs a C++ compiler)")
    for item in items:
        if {"llama", "cut"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(absent)


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of eight layers."""
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    path.write_bytes(tiny_model("llama", "Q8_0", layers=LAYERS).bytes())
    return path


@pytest.fixture(scope="session")
def cut(llama: Path) -> Cut:
    """Cuts it: `cut(3)`, `cut(3, tail=False)`."""

    def make(stages: int, *, tail: bool = True) -> list[tuple[str, int]]:
        if stages == 1:
            return [(str(llama), LAYERS)]
        edges = [round(LAYERS * index / stages) for index in range(stages + 1)]
        files = []
        for index, (first, last) in enumerate(itertools.pairwise(edges)):
            has_tail = tail and last != LAYERS
            path = llama.with_name(f"{index}-of-{stages}{'-tail' * has_tail}.gguf")
            if not path.exists():
                source = FileSource(llama)
                piece = slice_layers(open_weights([source]), first, last, tail=has_tail)
                path.write_bytes(piece.file.read_at([source], 0, piece.file.size))
            files.append((str(path), last - first))
        return files

    return make


@pytest.fixture
def spec() -> StageSpec:
    """One thread, small memory; `path` and `layers` come from `cut`."""
    return StageSpec(path="", layers=0, threads=1, slots=4, context=512, cells=1024, rows_max=128, prefill_rows=64)
