"""Models in a small mesh: pulled from an origin, spread by layers, shared between nodes."""

from pathlib import Path

import pytest

from meshnode.llm.gguf.slicing import slice_layers
from meshnode.llm.gguf.source import FileSource
from meshnode.llm.gguf.weights import open_weights
from tests.llm.service.weights.world import model, world
from tests.support.origin_server import origin_server


def cut(body: bytes, folder: Path, first: int, last: int, *, tail: bool) -> bytes:
    """The slice as the slicer itself writes it from the whole file."""
    path = folder / "reference.gguf"
    path.write_bytes(body)
    with FileSource(path) as source:
        made = slice_layers(open_weights([source]), first, last, tail=tail)
        return made.file.read_at([source], 0, made.file.size)


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
async def test_a_cluster_downloads_a_model_once_and_each_node_stores_its_layers(
    tmp_path: Path, architecture: str
) -> None:
    body = model(architecture, layers=12)
    async with origin_server({"/m.gguf": body}) as origin, world(tmp_path) as w:
        nodes = [await w.add() for _ in range(3)]
        w.plan = [(nodes[0].id, 0, 4), (nodes[1].id, 4, 8), (nodes[2].id, 8, 12)]
        told = await nodes[0].pull(origin.url("/m.gguf"))
        assert told[-1].status == "success"
        manifest = nodes[0].weights.find("m")
        print(len(body), origin.sent, [node.on_disk() for node in nodes])
        assert origin.sent == pytest.approx(len(body), rel=0.02)
        for node, (_, first, last) in zip(nodes, w.plan, strict=True):
            path = await node.stage(manifest, first, last, tail=True)
            assert path.read_bytes() == cut(body, tmp_path, first, last, tail=True)
            assert nodes[0].weights.holds(node.id, manifest.digest) == ((first, last),)
