"""Peers give each other what they hold: right bytes only, within bounds, and whoever lies is named."""

from pathlib import Path

import pytest
import trio

from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.llm.service.weights import serving
from meshnode.llm.service.weights.contracts import ReadRequest
from meshnode.llm.service.weights.manifest import Manifest
from tests.llm.service.weights.world import Granted, Member, World, model, world
from tests.support.origin_server import origin_server


async def held_by_first(w: World, folder: Path, body: bytes, count: int = 2) -> tuple[list[Member], Manifest]:
    """Members of which the first has contributed a file; no origin."""
    path = folder / "mine" / "own.gguf"
    path.parent.mkdir()
    path.write_bytes(body)
    nodes = [await w.add() for _ in range(count)]
    await nodes[0].pull(str(path))
    return nodes, nodes[0].weights.find("own")


async def test_layers_come_from_a_peer_that_has_the_file_somewhere(tmp_path: Path) -> None:
    body = model()
    async with world(tmp_path) as w:
        nodes, manifest = await held_by_first(w, tmp_path, body)
        assert manifest.checked == "file"
        assert await nodes[0].stage(manifest, 0, 8) == tmp_path / "mine" / "own.gguf"
        assert nodes[0].on_disk() == 0
        a = await nodes[1].stage(manifest, 2, 5, tail=True)
        b = await nodes[0].stage(manifest, 2, 5, tail=True)
        assert a != b
        assert a.read_bytes() == b.read_bytes()
        whole = await nodes[1].stage(manifest, 0, 8)
        assert whole.read_bytes() == body


async def test_a_slice_serves_another_node_whose_layers_overlap(tmp_path: Path) -> None:
    body = model()
    async with origin_server({"/m.gguf": body}) as origin, world(tmp_path) as w:
        nodes = [await w.add() for _ in range(2)]
        w.plan = [(nodes[0].id, 0, 6)]
        await nodes[0].pull(origin.url("/m.gguf"))
        manifest = nodes[0].weights.find("m")
        before = origin.sent
        path = await nodes[1].stage(manifest, 3, 8)
        assert nodes[0].weights.serving.bytes_sent > 0
        fresh = origin.sent - before
        assert fresh < sum(manifest.shape.layer_bytes[6:]) + manifest.shape.output_bytes + 1000
        reference = await nodes[0].stage(manifest, 3, 8)
        assert path.read_bytes() == reference.read_bytes()


async def test_a_peer_with_rotten_bytes_is_named_and_the_layers_come_from_elsewhere(tmp_path: Path) -> None:
    body = model()
    async with origin_server({"/m.gguf": body}, hub_hashes=True) as origin, world(tmp_path) as w:
        nodes = [await w.add() for _ in range(3)]
        await nodes[0].pull(origin.url("/m.gguf"), whole=True)
        manifest = nodes[0].weights.find("m")
        rows = await nodes[0].weights.shelf.whole(manifest.digest)
        assert rows is not None
        path = tmp_path / rows[0].path
        rotten = bytearray(body)
        at = manifest.parts[0].header_bytes + 3000
        rotten[at] ^= 1
        path.write_bytes(rotten)
        await nodes[0].weights.shelf.add_files(manifest.digest, [path], owned=True)  # it does not notice
        before = origin.sent
        staged = await nodes[1].stage(manifest, 0, 8)
        assert staged.read_bytes() == body
        assert 0 < origin.sent - before < len(body)
        # Without the origin there is nobody else.
        origin.files.clear()
        w.down.add(nodes[1].id)
        with pytest.raises(MeshError, match=f"node {nodes[0].id} gave wrong bytes for") as caught:
            await nodes[2].stage(manifest, 0, 8)
        assert caught.value.code in (ErrorCode.CONFLICT, ErrorCode.UNREACHABLE)


@pytest.mark.parametrize(
    ("part", "offset", "length"),
    [(0, 0, 1 << 30), (0, 1 << 49, 10), (1, 0, 10), (0, -1, 10), (0, 0, 0), (0, 0, 1 << 40), (-1, 0, 1), (10**6, 0, 1)],
)
async def test_hostile_ranges_are_refused(tmp_path: Path, part: int, offset: int, length: int) -> None:
    async with world(tmp_path) as w:
        nodes, manifest = await held_by_first(w, tmp_path, model(layers=2))
        links = nodes[1].node.links
        with pytest.raises(MeshError) as caught:
            await links.call(
                nodes[0].id, "llm.weights.read", [manifest.digest, part, offset, length], Granted, timeout_s=5
            )
        assert caught.value.code is ErrorCode.BAD_REQUEST
        for digest in ("../../etc/passwd", "0" * 64, "", manifest.digest.upper()):
            with pytest.raises(MeshError) as caught:
                await links.call(nodes[0].id, "llm.weights.read", [digest, 0, 0, 10], Granted, timeout_s=5)
            assert caught.value.code in (ErrorCode.BAD_REQUEST, ErrorCode.NOT_FOUND)


async def test_one_peer_gets_so_many_streams_at_once_and_no_more(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        nodes, manifest = await held_by_first(w, tmp_path, model())
        network = nodes[1].weights.staging._finding._network
        request = ReadRequest(manifest.digest, 0, 0, manifest.bytes)
        async with trio.open_nursery() as nursery:
            for _ in range(serving.STREAMS_PER_PEER_MAX):

                async def hold(task_status: trio.TaskStatus[None]) -> None:
                    async with network.stream(nodes[0].id, "llm.weights.read", request) as stream:
                        await stream.receive_some(1)
                        task_status.started()
                        await trio.sleep_forever()

                await nursery.start(hold)
            with pytest.raises(MeshError) as caught:
                async with network.stream(nodes[0].id, "llm.weights.read", request):
                    pass
            assert caught.value.code is ErrorCode.OVERLOADED
            assert caught.value.retryable
            nursery.cancel_scope.cancel()


async def test_a_peer_that_is_cut_half_way_is_replaced_by_another(tmp_path: Path) -> None:
    body = model(kind="F16")
    async with world(tmp_path) as w:
        nodes, manifest = await held_by_first(w, tmp_path, body, count=3)
        await nodes[1].stage(manifest, 0, 8)
        cut = False

        def progress(done: int, total: int, words: str) -> None:
            nonlocal cut
            if done and not cut:
                cut = True
                for other in nodes[:2]:
                    if f"node {other.id}" in words:
                        nodes[2].node.links.cut(other.id, "gone")
                        other.scope.cancel()

        path, _ = await nodes[2].weights.stage_file(manifest.digest, 0, 8, tail=False, progress=progress)
        assert cut
        assert (tmp_path / path).read_bytes() == body


async def test_a_contributed_file_that_changes_or_vanishes_is_noticed_and_said(tmp_path: Path) -> None:
    body = model()
    async with world(tmp_path) as w:
        nodes, manifest = await held_by_first(w, tmp_path, body)
        assert nodes[1].weights.holds(nodes[0].id, manifest.digest) == ((0, 8),)
        (tmp_path / "mine" / "own.gguf").write_bytes(body + b"more")
        with pytest.raises(MeshError):
            await nodes[1].stage(manifest, 0, 8)
        assert nodes[1].weights.holds(nodes[0].id, manifest.digest) == ()
        assert any("not what it was" in event for _, event, _ in nodes[0].node.log.records)
        (tmp_path / "mine" / "own.gguf").unlink()
        with pytest.raises(MeshError, match="cannot be read") as caught:
            await nodes[0].pull(str(tmp_path / "mine" / "own.gguf"))
        assert caught.value.code is ErrorCode.NOT_FOUND
