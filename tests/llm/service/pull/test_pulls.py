"""Bringing models in and removing them: joined, resumed, gated, corrupt, too large, in parts, and gone again."""

import hashlib
import subprocess
import sys
from contextlib import aclosing
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import trio
import trio.testing

from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.llm.service.pull import fetch
from meshnode.llm.service.pull.introducing import Described
from meshnode.llm.service.weights.contracts import DropAnswer, DropRequest
from tests.llm.service.weights.world import World, model, world
from tests.support.gguf_files import split
from tests.support.origin_server import origin_server
from tests.support.tiny_models import tiny_model


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "BACKOFF_FIRST_S", 0.001)
    monkeypatch.setattr(fetch, "WRITE_BYTES", 100_000)
    monkeypatch.setattr(fetch, "SYNC_BYTES", 300_000)


async def test_a_whole_model_is_checked_against_the_hash_that_its_origin_tells(tmp_path: Path) -> None:
    body = model()
    async with origin_server({"/m.gguf": body}, hub_hashes=True) as origin, world(tmp_path) as w:
        node = await w.add()
        told = await node.pull(origin.url("/m.gguf"), whole=True)
        manifest = node.weights.find("M")
        assert manifest.digest == hashlib.sha256(body).hexdigest()
        assert manifest.checked == "file"
        assert (await node.stage(manifest, 0, 8)).read_bytes() == body
        assert told[-1].completed == told[-1].total == len(body)
        assert origin.sent < len(body) * 1.02
        assert not list(node.folder.rglob("*.part"))
        again = await node.pull("m", whole=True)
        assert again[-1].status == "success"
        assert origin.sent < len(body) * 1.02


async def test_a_corrupt_download_is_thrown_away_and_named(tmp_path: Path) -> None:
    body = model()
    async with origin_server({"/m.gguf": body}, hub_hashes=True) as origin, world(tmp_path) as w:
        node = await w.add()
        origin.corrupt_at = len(body) // 2
        with pytest.raises(MeshError, match=r"m\.gguf hashes to .* but should to .* It came from http") as caught:
            await node.pull(origin.url("/m.gguf"), whole=True)
        assert caught.value.code is ErrorCode.CONFLICT
        assert node.on_disk() == 0
        origin.corrupt_at = None
        await node.pull("m", whole=True)
        assert (await node.stage(node.weights.find("m"), 0, 8)).read_bytes() == body


async def test_a_split_model_is_pulled_by_any_part_and_cut_by_layers(tmp_path: Path) -> None:
    tiny = tiny_model("llama", "Q8_0", layers=8)
    count = len(tiny.tensors) // 3
    parts = [part.bytes() for part in split(tiny, (count, count, len(tiny.tensors) - 2 * count))]
    files = {f"/big-{number + 1:05}-of-00003.gguf": part for number, part in enumerate(parts)}
    async with origin_server(files, hub_hashes=True) as origin, world(tmp_path) as w:
        nodes = [await w.add() for _ in range(2)]
        w.plan = [(nodes[0].id, 0, 4), (nodes[1].id, 4, 8)]
        await nodes[0].pull(origin.url("/big-00002-of-00003.gguf"))
        manifest = nodes[0].weights.find("big")
        assert [part.size for part in manifest.parts] == [len(part) for part in parts]
        hashes = b"".join(hashlib.sha256(part).digest() for part in parts)
        assert manifest.digest == hashlib.sha256(hashes).hexdigest()
        assert origin.sent == pytest.approx(sum(map(len, parts)), rel=0.02)
        first = await nodes[1].stage(manifest, 0, 8)
        assert first.name == "big-00001-of-00003.gguf"
        for number, part in enumerate(parts):
            assert (first.parent / f"big-{number + 1:05}-of-00003.gguf").read_bytes() == part
        assert origin.sent == pytest.approx(sum(map(len, parts)), rel=0.03)


async def test_asks_for_the_same_join_and_the_readers_leaving_stops_nothing(tmp_path: Path) -> None:
    body = model()
    async with origin_server({"/m.gguf": body}) as origin, world(tmp_path) as w:
        node = await w.add()
        origin.pause_s = 0.001
        async with aclosing(node.pulls.pull(origin.url("/m.gguf"), node=None, whole=True)) as leaving:
            await anext(leaving)
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(lambda: node.pull(origin.url("/m.gguf"), whole=True))
        assert origin.sent < len(body) * 1.02
        assert node.pulls.under_way() == []


async def test_a_pull_goes_on_after_a_restart(tmp_path: Path) -> None:
    body = model()
    async with origin_server({"/m.gguf": body}) as origin, world(tmp_path) as w:
        node = await w.add()
        origin.pause_s = 0.01
        async with aclosing(node.pulls.pull(origin.url("/m.gguf"), node=None, whole=True)) as pull:
            async for told in pull:
                if told.completed > 500_000:
                    break
        node.scope.cancel()
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert list(node.folder.rglob("*.part"))
        node.scope = trio.CancelScope()
        origin.pause_s, before = 0, origin.sent
        await w.nursery.start(w._run, node)
        await node.pull(origin.url("/m.gguf"), whole=True)
        assert (await node.stage(node.weights.find("m"), 0, 8)).read_bytes() == body
        assert origin.sent - before < len(body) - 300_000


async def test_an_origin_that_goes_half_way_leaves_what_arrived(tmp_path: Path) -> None:
    body = model()
    async with origin_server({"/m.gguf": body}) as origin, world(tmp_path) as w:
        node = await w.add()
        origin.gone_after = len(body) // 2
        with pytest.raises(MeshError, match=r"What arrived is kept|Try again later") as caught:
            await node.pull(origin.url("/m.gguf"), whole=True)
        assert caught.value.code is ErrorCode.UNREACHABLE
        assert caught.value.retryable
        origin.gone_after = None
        await node.pull(origin.url("/m.gguf"), whole=True)
        assert (await node.stage(node.weights.find("m"), 0, 8)).read_bytes() == body
        assert origin.sent < len(body) * 1.05


async def test_a_gated_model_wants_the_token_and_only_the_hub_gets_it(tmp_path: Path) -> None:
    body = model()
    async with origin_server({"/o/r/resolve/main/m.gguf": body}) as hub, world(tmp_path) as w:
        secret = "hf_" + "s" * 30
        open_node = await w.add(hub=hub.url(""))
        hub.statuses = [403]
        with pytest.raises(MeshError, match=r"llm\.hub_token") as caught:
            await open_node.pull("hf:o/r/m.gguf", whole=True)
        assert caught.value.code is ErrorCode.FORBIDDEN
        node = await w.add(hub=hub.url(""), token=secret)
        hub.asked.clear()
        await node.pull("hf:o/r/m.gguf", whole=True)
        assert {authorization for _, _, authorization in hub.asked} == {f"Bearer {secret}"}
        hub.files["/other.gguf"] = model(layers=2)
        hub.asked.clear()
        await node.pull(hub.url("/other.gguf"), whole=True)
        assert {authorization for _, _, authorization in hub.asked} == {""}
        assert secret not in str(node.node.log.records)
        assert not any(secret.encode() in record.value for record in w.board.rows.values())


async def test_what_does_not_fit_is_refused_before_anything_is_fetched(tmp_path: Path) -> None:
    body = model()
    async with origin_server({"/m.gguf": body}) as origin, world(tmp_path) as w:
        node = await w.add(bytes_max=len(body) // 2)
        with pytest.raises(MeshError, match=r"llm\.disk_bytes_max") as caught:
            await node.pull(origin.url("/m.gguf"), whole=True)
        assert caught.value.code is ErrorCode.DISK_FULL
        assert origin.sent < 100_000
        full = await w.add(disk=len(body) // 2)
        with pytest.raises(MeshError, match=r"do not fit|are free") as caught:
            await full.pull(origin.url("/m.gguf"), whole=True)
        assert caught.value.code is ErrorCode.DISK_FULL


async def three_models(w: World, origin_url: str, quota: int) -> list[str]:
    node = await w.add(bytes_max=quota)
    for name in "abc":
        await node.pull(f"{origin_url}/{name}.gguf", whole=True)
    return [name for name in "abc" if node.weights.holds(node.id, node.weights.find(name).digest)]


async def test_the_longest_unused_makes_room_but_never_what_is_loaded_or_pinned(tmp_path: Path) -> None:
    files = {f"/{name}.gguf": tiny_model("llama", "Q8_0", layers=2, seed=ord(name)).bytes() for name in "abcd"}
    size = max(map(len, files.values()))
    async with origin_server(files) as origin, world(tmp_path) as w:
        assert await three_models(w, origin.url(""), 2 * size + 1000) == ["b", "c"]
        node = w.members[0]
        node.in_use.add(node.weights.find("b").digest)
        await node.stage(node.weights.find("b"), 0, 2)
        await node.stage(node.weights.find("c"), 0, 2)
        await node.pull(origin.url("/a.gguf"), whole=True)
        assert [name for name in "abc" if node.weights.holds(node.id, node.weights.find(name).digest)] == ["a", "b"]
        node.pinned.add(node.weights.find("a").digest)
        with pytest.raises(MeshError, match="do not fit"):
            await node.pull(origin.url("/c.gguf"), whole=True)
        assert any("make room" in event for _, event, _ in node.node.log.records)


async def test_the_last_copy_of_a_model_without_an_origin_is_never_deleted_for_room(tmp_path: Path) -> None:
    files = {"/a.gguf": tiny_model("llama", "Q8_0", layers=2, seed=1).bytes()}
    own = tmp_path / "own.gguf"
    own.write_bytes(tiny_model("llama", "Q8_0", layers=2, seed=2).bytes())
    async with origin_server(files) as origin, world(tmp_path) as w:
        giver = await w.add()
        await giver.pull(str(own))
        node = await w.add(bytes_max=len(files["/a.gguf"]) + 1000)
        await node.stage(node.weights.find("own"), 0, 2)
        await giver.pulls.remove("own", everywhere=False)
        with pytest.raises(MeshError, match="do not fit"):
            await node.pull(origin.url("/a.gguf"), whole=True)
        assert own.exists()


async def test_a_model_is_removed_here_or_everywhere_and_not_while_it_is_loaded(tmp_path: Path) -> None:
    body = model()
    async with origin_server({"/m.gguf": body}) as origin, world(tmp_path) as w:
        nodes = [await w.add() for _ in range(3)]
        w.plan = [(nodes[0].id, 0, 4), (nodes[1].id, 4, 8)]
        await nodes[2].pull(origin.url("/m.gguf"))
        digest = nodes[2].weights.find("m").digest
        nodes[0].in_use.add(digest)
        with pytest.raises(MeshError, match="it is loaded") as caught:
            await nodes[0].pulls.remove("m", everywhere=False)
        assert caught.value.code is ErrorCode.CONFLICT
        report = await nodes[2].pulls.remove("m", everywhere=True)
        assert nodes[0].id not in report.nodes
        assert "loaded" in report.kept[0]
        assert nodes[1].on_disk() == 0 < nodes[0].on_disk()
        assert nodes[2].weights.manifest(digest) is not None
        report = await nodes[2].pulls.remove("m", everywhere=True, force=True)
        assert nodes[0].on_disk() == 0
        assert report.freed_bytes > 0
        assert not w.board.rows
        with pytest.raises(MeshError, match="There is no model 'm'"):
            nodes[2].weights.find("m")


async def test_progress_is_told_for_each_node_that_takes_part(tmp_path: Path) -> None:
    body = model()
    async with origin_server({"/m.gguf": body}) as origin, world(tmp_path) as w:
        a, b = await w.add(), await w.add()
        w.plan = [(b.id, 4, 8), (a.id, 0, 4)]
        told = [one for one in await a.pull(origin.url("/m.gguf")) if one.parts]
        assert all([part.node_id for part in one.parts] == [a.id, b.id] for one in told), "in the order of the layers"
        last = told[-1]
        assert last.status == "success"
        assert [(part.first, part.last) for part in last.parts] == [(0, 4), (4, 8)]
        assert all(one.total == sum(part.total for part in one.parts) for one in told[:-1]), "while nodes wait, too"
        assert [part.node_name for part in last.parts] == [f"node {a.id[:4]}", f"node {b.id[:4]}"]
        assert all(part.completed == part.total > 0 for part in last.parts)
        for before, after in pairwise(told):
            assert all(x.completed <= y.completed <= y.total for x, y in zip(before.parts, after.parts, strict=True))


async def test_who_may_not_delete_from_other_nodes_still_does_from_its_own(tmp_path: Path) -> None:
    body = model()
    async with origin_server({"/m.gguf": body}) as origin, world(tmp_path) as w:
        admin, member = await w.add(), await w.add()
        w.deleters = {admin.id}
        w.plan = [(admin.id, 0, 4), (member.id, 4, 8)]
        await member.pull(origin.url("/m.gguf"))
        before = admin.on_disk()
        assert member.on_disk() > 0
        for target, everywhere in ((admin.id, False), (None, True)):
            with pytest.raises(MeshError, match="Only admins") as caught:
                await member.pulls.remove("m", node=target, everywhere=everywhere)
            assert caught.value.code is ErrorCode.FORBIDDEN
        assert member.on_disk() > 0, "what is refused is refused as a whole"
        # A member that asks past its own agent's rules is refused where it asks.
        request = DropRequest(member.weights.find("m").digest, True)
        with pytest.raises(MeshError, match="Only admins") as caught:
            await member.node.links.call(admin.id, "llm.weights.drop", request, DropAnswer, timeout_s=5)
        assert caught.value.code is ErrorCode.FORBIDDEN
        assert admin.on_disk() == before > 0
        assert (await member.pulls.remove("m", everywhere=False)).nodes == (member.id,)
        assert member.on_disk() == 0
        assert (await admin.pulls.remove("m", everywhere=True)).nodes == (admin.id,)


async def test_names_mean_what_is_known_then_the_catalogue_and_near_ones_are_suggested(tmp_path: Path) -> None:
    body = model()
    async with origin_server({"/m.gguf": body}) as origin, world(tmp_path) as w:
        node = await w.add()
        described = Described("tiny:8b", origin.url("/m.gguf"), "A model of no use.", "mit", ("tiny:8b-q8_0",))
        w.offers.known = {"tiny:8b": (origin.url("/m.gguf"), described)}
        with pytest.raises(MeshError, match="Did you mean tiny:8b") as caught:
            await node.pull("tiny:7b")
        assert caught.value.code is ErrorCode.NOT_FOUND
        with pytest.raises(MeshError, match="`meshnode pull tiny:8b` fetches it"):
            node.weights.find("Tiny:8b")
        await node.pull("tiny:8b", whole=True)
        manifest = node.weights.find("tiny")
        assert (manifest.name, manifest.licence) == ("tiny:8b", "mit")
        assert node.weights.find("TINY:8B-Q8_0") is manifest
        assert node.weights.find(manifest.digest[:12]) is manifest


async def test_a_node_that_fails_is_named(tmp_path: Path) -> None:
    async with origin_server({"/m.gguf": model()}) as origin, world(tmp_path) as w:
        nodes = [await w.add(), await w.add(bytes_max=1000)]
        w.plan = [(nodes[0].id, 0, 4), (nodes[1].id, 4, 8)]
        with pytest.raises(MeshError, match=f"Node {nodes[1].id} could not get layers 4 to 7 of m") as caught:
            await nodes[0].pull(origin.url("/m.gguf"))
        assert caught.value.code is ErrorCode.DISK_FULL


@pytest.mark.parametrize("body", [b"", b"GGUF", b"not a model at all" * 1000, model(layers=2)[:5000]])
async def test_what_is_no_model_is_refused(tmp_path: Path, body: bytes) -> None:
    (tmp_path / "m.gguf").write_bytes(body)
    async with origin_server({"/m.gguf": body}) as origin, world(tmp_path) as w:
        node = await w.add()
        for ref in (origin.url("/m.gguf"), str(tmp_path / "m.gguf")):
            with pytest.raises(MeshError) as caught:
                await node.pull(ref, whole=True)
            assert caught.value.code in (ErrorCode.BAD_REQUEST, ErrorCode.UNREACHABLE)
        assert not w.board.rows


async def test_a_process_that_is_killed_goes_on_where_it_was(tmp_path: Path) -> None:
    body = tiny_model("llama", "F16", layers=24).bytes()
    (tmp_path / "one").mkdir()
    async with origin_server({"/m.gguf": body}) as origin:
        origin.pause_s = 0.002
        command = [
            sys.executable,
            "-m",
            "tests.llm.service.pull.downloader",
            str(tmp_path / "one"),
            origin.url("/m.gguf"),
        ]
        async with trio.open_nursery() as nursery:
            child = await nursery.start(partial(trio.run_process, command, stdout=subprocess.PIPE, check=False))
            with trio.fail_after(30):
                while origin.sent < len(body) * 0.6:  # noqa: ASYNC110 -- the child is another process
                    await trio.sleep(0.005)
            child.kill()
        assert list((tmp_path / "one").rglob("*.part"))
        origin.pause_s, before = 0, origin.sent
        with trio.fail_after(30):
            done = await trio.run_process(command, capture_stdout=True)
        assert await trio.Path(done.stdout.decode().strip().splitlines()[-1]).read_bytes() == body
        assert origin.sent - before < len(body) * 0.6
