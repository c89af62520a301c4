"""Models in a small mesh: pulled from an origin, spread by layers, shared between nodes."""

from pathlib import Path

import msgspec
import pytest
import trio

from meshnode.kernel.errors import MeshError
from meshnode.llm.gguf.slicing import slice_layers
from meshnode.llm.gguf.source import FileSource
from meshnode.llm.gguf.weights import open_weights
from meshnode.llm.service.weights.manifest import Part
from tests.kernel.links.world import settle
from tests.llm.service.weights.world import model, world
from tests.support.origin_server import origin_server
from tests.support.tiny_models import tiny_model


def cut(body: bytes, folder: Path, first: int, last: int, *, tail: bool) -> bytes:
    """The slice as the slicer itself writes it from the whole file."""
    path = folder / "reference.gguf"
    path.write_bytes(body)
    with FileSource(path) as source:
        made = slice_layers(open_weights([source]), first, last, tail=tail)
        return made.file.read_at([source], 0, made.file.size)


# The second shares its token embedding with its head: the first and the last node need the same bytes.
@pytest.mark.parametrize(("architecture", "layers"), [("llama", 12), ("qwen3", 3)])
async def test_a_cluster_downloads_a_model_once_and_each_node_stores_its_layers(
    tmp_path: Path, architecture: str, layers: int
) -> None:
    body, third = model(architecture, "F16", layers=layers), layers // 3
    async with origin_server({"/m.gguf": body}) as origin, world(tmp_path) as w:
        nodes = [await w.add() for _ in range(3)]
        w.plan = [(node.id, at * third, (at + 1) * third) for at, node in enumerate(nodes)]
        told = await nodes[0].pull(origin.url("/m.gguf"))
        assert told[-1].status == "success"
        manifest = nodes[0].weights.find("m")
        shape = manifest.shape
        assert origin.sent == pytest.approx(len(body), rel=0.02)
        for node, (_, first, last) in zip(nodes, w.plan, strict=True):
            path = await node.stage(manifest, first, last, tail=True)
            assert path.read_bytes() == cut(body, tmp_path, first, last, tail=True)
            assert nodes[0].weights.holds(node.id, manifest.digest) == ((first, last),)
            its_own = sum(shape.layer_bytes[first:last]) + shape.shared_bytes
            its_own += (shape.embed_bytes if first == 0 else 0) + (shape.output_bytes if last == layers else 0)
            assert node.weights.staging.bytes_received == pytest.approx(its_own, rel=0.02)
            assert node.on_disk() == pytest.approx(its_own, rel=0.02)


async def test_two_that_want_the_same_at_once_download_it_once(tmp_path: Path) -> None:
    body = model(layers=12)
    async with origin_server({"/m.gguf": body}) as origin, world(tmp_path) as w:
        nodes = [await w.add() for _ in range(3)]
        w.plan = [(node.id, 0, 12) for node in nodes]
        origin.pause_s = 0.002
        await nodes[0].pull(origin.url("/m.gguf"))
        assert origin.sent == pytest.approx(len(body), rel=0.02)
        for node in nodes:
            assert (await node.stage(nodes[0].weights.find("m"), 0, 12)).read_bytes() == body


async def test_when_the_one_that_downloads_for_others_dies_they_go_on_themselves(tmp_path: Path) -> None:
    body = model(layers=12)
    async with origin_server({"/m.gguf": body}) as origin, world(tmp_path) as w:
        nodes = [await w.add() for _ in range(2)]
        w.plan = []
        await nodes[0].pull(origin.url("/m.gguf"))
        manifest = nodes[0].weights.find("m")
        origin.pause_s = 0.005
        got: list[Path] = []

        async def stage(which: int) -> None:
            try:
                got.append(await nodes[which].stage(manifest, 0, 12))
            except MeshError:
                assert which == 0

        async with trio.open_nursery() as nursery:
            nursery.start_soon(stage, 0)
            await settle(lambda: nodes[0].weights.shelf.is_coming(manifest.digest, 0, len(body) - 100))
            nursery.start_soon(stage, 1)
            await settle(lambda: nodes[0].weights.serving.bytes_sent)
            # A machine that loses its power says nothing any more.
            await nodes[0].node.stop()
            nodes[0].scope.cancel()
            w.down.add(nodes[0].id)
        assert [path.read_bytes() == body for path in got] == [True]
        assert nodes[1].weights.staging.bytes_received >= len(body) * 0.98
        assert origin.sent < 2 * len(body)


@pytest.mark.parametrize(
    "change",
    [
        {"digest": "../../../etc/passwd"},
        {"parts": ()},
        {"parts": (Part(100, 200, b""),)},
        {"parts": (Part(1 << 60, 100, b""),)},
    ],
)
async def test_a_manifest_that_cannot_be_true_is_passed_over(tmp_path: Path, change: dict[str, object]) -> None:
    async with origin_server({"/m.gguf": model(layers=2)}) as origin, world(tmp_path) as w:
        nodes = [await w.add() for _ in range(2)]
        await nodes[0].pull(origin.url("/m.gguf"))
        lie = msgspec.structs.replace(nodes[0].weights.find("m"), name="lie", **change)
        await w.board.put("llm/models", lie.digest.encode(), msgspec.msgpack.encode(lie))
        assert [manifest.name for manifest in nodes[1].weights.manifests()] in (["m"], [])
        with pytest.raises(MeshError):
            nodes[1].weights.find("lie")


async def test_a_header_that_is_not_the_manifests_is_refused(tmp_path: Path) -> None:
    async with origin_server({"/m.gguf": model(layers=4)}) as origin, world(tmp_path) as w:
        nodes = [await w.add() for _ in range(2)]
        await nodes[0].pull(origin.url("/m.gguf"))
        manifest = nodes[0].weights.find("m")
        shape = msgspec.structs.replace(
            manifest.shape,
            layer_bytes=manifest.shape.layer_bytes * 2,
            kv_bytes_per_token=manifest.shape.kv_bytes_per_token * 2,
        )
        lie = msgspec.structs.replace(manifest, shape=shape)
        await w.board.put("llm/models", lie.digest.encode(), msgspec.msgpack.encode(lie))
        with pytest.raises(MeshError, match="not what its header says"):
            await nodes[1].stage(lie, 0, 6)


async def test_a_template_that_is_too_long_for_a_record_is_read_from_the_header(tmp_path: Path) -> None:
    tiny = tiny_model("llama", layers=2)
    template = "{# words #}" * 5_000
    tiny.fields = [(name, value) for name, value in tiny.fields if name != "tokenizer.chat_template"]
    tiny.key("tokenizer.chat_template", "str", template)
    async with origin_server({"/m.gguf": tiny.bytes()}) as origin, world(tmp_path) as w:
        nodes = [await w.add() for _ in range(2)]
        await nodes[0].pull(origin.url("/m.gguf"))
        manifest = nodes[1].weights.find("m")
        assert manifest.template_cut
        assert await nodes[1].weights.template(manifest.digest) == template


async def test_an_architecture_that_cannot_be_cut_is_had_whole_only(tmp_path: Path) -> None:
    tiny = tiny_model("llama", layers=4)
    body = tiny.bytes().replace(b"llama", b"bloom")
    async with origin_server({"/m.gguf": body}) as origin, world(tmp_path) as w:
        node = await w.add()
        await node.pull(origin.url("/m.gguf"))
        manifest = node.weights.find("m")
        assert manifest.shape.cuts == ()
        with pytest.raises(MeshError, match="cannot be split"):
            await node.stage(manifest, 0, 2)
        assert (await node.stage(manifest, 0, 4)).read_bytes() == body


async def test_no_record_talks_a_node_into_a_tail_that_aborts_its_engine(tmp_path: Path) -> None:
    body = model("gemma3", "F16", layers=12)
    async with origin_server({"/m.gguf": body}) as origin, world(tmp_path) as w:
        node = await w.add()
        await node.pull(origin.url("/m.gguf"), whole=True)
        honest = node.weights.find("m")
        edge = honest.shape.cuts[0]
        _, has_tail = await node.weights.stage_file(
            honest.digest, 0, edge, tail=True, progress=lambda done, total, words: None
        )
        assert not has_tail
        lie = msgspec.structs.replace(honest, shape=msgspec.structs.replace(honest.shape, layer_input=True))
        await node.weights.records.put_manifest(lie)
        path = await node.stage(honest, 0, edge, tail=True)
        assert path.read_bytes() == cut(body, tmp_path, 0, edge, tail=False)
