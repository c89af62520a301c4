"""A file is made of pieces from origins that break off, lie, change and refuse; nothing that arrived is lost."""

import hashlib
import os
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx2
import pytest
import trio
from blake3 import blake3

from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.kernel.offload import InlineOffload
from meshnode.llm.service.pull import fetch as module
from meshnode.llm.service.pull.fetch import Fetch
from meshnode.llm.service.pull.origin import HttpOrigin, OriginFacts
from meshnode.llm.service.pull.pieces import Given, Piece, Range, Source
from meshnode.llm.service.pull.refs import RemoteRef
from tests.support.origin_server import OriginServer, origin_server

BODY = random.Random(7).randbytes(3_000_000)


class FromOrigin:
    """An origin as a source: what the pull service does, without the service."""

    def __init__(self, origin: HttpOrigin, facts: OriginFacts, name: str) -> None:
        self.origin, self.facts, self.name = origin, facts, name

    def reach(self, part: int, offset: int) -> int:
        return self.facts.size - offset

    @asynccontextmanager
    async def read(self, part: int, offset: int, length: int) -> AsyncIterator[AsyncIterator[bytes]]:
        async with self.origin.read(offset, length, self.facts) as stream:
            yield stream


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BACKOFF_FIRST_S", 0.001)
    monkeypatch.setattr(module, "FREE_BYTES_MIN", 0)
    monkeypatch.setattr(module, "WRITE_BYTES", 100_000)
    monkeypatch.setattr(module, "SYNC_BYTES", 300_000)


async def source(
    server: OriginServer, client: httpx2.AsyncClient, path: str = "/a.gguf", token: str = ""
) -> FromOrigin:
    origin = HttpOrigin(client, RemoteRef("a", (server.url(path),)), token=token)
    return FromOrigin(origin, await origin.facts(), server.url(path))


def make(folder: Path, sources: list[Source], pieces: list[Piece] | None = None, plan: str = "plan") -> Fetch:
    return Fetch(
        target=folder / "a.gguf",
        plan=plan,
        pieces=pieces or [Range(0, 0, len(BODY))],
        sources=sources,
        offload=InlineOffload(),
        progress=lambda done, name: None,
        free_bytes=lambda path: 10**12,
    )


async def test_a_whole_file_arrives_with_its_hashes(tmp_path: Path) -> None:
    async with origin_server({"/a.gguf": BODY}, hub_hashes=True) as server, httpx2.AsyncClient() as client:
        found = await source(server, client)
        done = await make(tmp_path, [found]).run()
    assert (tmp_path / "a.gguf").read_bytes() == BODY
    assert done.sha256 == found.facts.sha256 == hashlib.sha256(BODY).hexdigest()
    assert done.blake3 == blake3(BODY).hexdigest()
    assert sum(done.received.values()) == len(BODY)
    assert os.listdir(tmp_path) == ["a.gguf"]


async def test_pieces_from_several_places_of_the_file_follow_what_is_given(tmp_path: Path) -> None:
    pieces: list[Piece] = [Given(b"head"), Range(0, 1000, 50), Given(b"pad"), Range(0, 5, 10)]
    async with origin_server({"/a.gguf": BODY}) as server, httpx2.AsyncClient() as client:
        await make(tmp_path, [await source(server, client)], pieces).run()
    assert (tmp_path / "a.gguf").read_bytes() == b"head" + BODY[1000:1050] + b"pad" + BODY[5:15]


async def test_a_connection_that_breaks_is_resumed_where_it_broke(tmp_path: Path) -> None:
    async with origin_server({"/a.gguf": BODY}) as server, httpx2.AsyncClient() as client:
        found = await source(server, client)
        server.cut_after = [700_000, 400_000]
        done = await make(tmp_path, [found]).run()
    assert (tmp_path / "a.gguf").read_bytes() == BODY
    assert sum(done.received.values()) == len(BODY)
    assert [wanted for _, wanted, _ in server.asked[1:]] == [
        f"bytes=0-{len(BODY) - 1}",
        f"bytes=700000-{len(BODY) - 1}",
        f"bytes=1100000-{len(BODY) - 1}",
    ]


async def test_a_process_that_dies_goes_on_from_what_was_safe(tmp_path: Path) -> None:
    async with origin_server({"/a.gguf": BODY}) as server, httpx2.AsyncClient() as client:
        found = await source(server, client)
        server.statuses = []
        server.cut_after = [1_000_000]
        first = make(tmp_path, [found])
        with trio.move_on_after(5) as scope:

            def stop(done: int, name: str) -> None:
                if done >= 900_000:
                    scope.cancel()

            first._progress = stop
            await first.run()
        assert scope.cancelled_caught
        # What lies behind the journal's mark may be anything after a power cut.
        with (tmp_path / "a.gguf.part").open("ab") as torn:
            torn.write(b"\0" * 1000)
        server.cut_after = []
        done = await make(tmp_path, [found]).run()
    assert (tmp_path / "a.gguf").read_bytes() == BODY
    assert sum(done.received.values()) <= len(BODY) - 600_000
    assert done.sha256 == hashlib.sha256(BODY).hexdigest()


async def test_what_arrived_for_another_plan_is_not_mixed_in(tmp_path: Path) -> None:
    (tmp_path / "a.gguf.part").write_bytes(b"x" * 500_000)
    (tmp_path / "a.gguf.journal").write_bytes(b'{"plan":"another","done":500000}')
    async with origin_server({"/a.gguf": BODY}) as server, httpx2.AsyncClient() as client:
        await make(tmp_path, [await source(server, client)]).run()
    assert (tmp_path / "a.gguf").read_bytes() == BODY


@pytest.mark.parametrize(
    "journal", [b"", b"{", b'{"plan":"plan","done":-5}', b'{"plan":"plan","done":99999999999}', b"[]"]
)
async def test_a_broken_journal_costs_a_new_start_only(tmp_path: Path, journal: bytes) -> None:
    (tmp_path / "a.gguf.part").write_bytes(b"x" * 500_000)
    (tmp_path / "a.gguf.journal").write_bytes(journal)
    async with origin_server({"/a.gguf": BODY}) as server, httpx2.AsyncClient() as client:
        await make(tmp_path, [await source(server, client)]).run()
    assert (tmp_path / "a.gguf").read_bytes() == BODY


async def test_wrong_bytes_are_named_and_come_from_elsewhere(tmp_path: Path) -> None:
    pieces: list[Piece] = [
        Range(0, at, 1_000_000, blake3(BODY[at : at + 1_000_000]).digest()) for at in range(0, 3_000_000, 1_000_000)
    ]
    async with (
        origin_server({"/a.gguf": BODY}) as lying,
        origin_server({"/a.gguf": BODY}) as honest,
        httpx2.AsyncClient() as client,
    ):
        sources = [await source(lying, client), await source(honest, client)]
        lying.corrupt_at = 5
        lying.ranges = True
        done = await make(tmp_path, list(sources), pieces).run()
        assert (tmp_path / "a.gguf").read_bytes() == BODY
        assert done.blake3 == blake3(BODY).hexdigest()
        with pytest.raises(MeshError, match="wrong bytes for 0 to 999999 of part 1"):
            await make(tmp_path / "alone", [sources[0]], pieces).run()


async def test_a_file_that_changes_half_way_is_said_to_have_changed(tmp_path: Path) -> None:
    async with origin_server({"/a.gguf": BODY}) as server, httpx2.AsyncClient() as client:
        found = await source(server, client)
        server.files["/a.gguf"] = BODY[::-1]
        with pytest.raises(MeshError, match="changed while it was downloaded") as caught:
            await make(tmp_path, [found]).run()
    assert caught.value.code is ErrorCode.CONFLICT


async def test_an_origin_without_ranges_still_serves(tmp_path: Path) -> None:
    async with origin_server({"/a.gguf": BODY}, ranges=False) as server, httpx2.AsyncClient() as client:
        found = await source(server, client)
        assert not found.facts.ranges
        await make(tmp_path, [found], [Range(0, 100, 1000)]).run()
    assert (tmp_path / "a.gguf").read_bytes() == BODY[100:1100]


async def test_a_hiccup_is_tried_again_and_a_refusal_is_not(tmp_path: Path) -> None:
    async with origin_server({"/a.gguf": BODY}) as server, httpx2.AsyncClient() as client:
        found = await source(server, client)
        server.statuses = [503, 429, 500]
        await make(tmp_path, [found]).run()
        assert len(server.asked) == 5
        server.statuses = [403]
        with pytest.raises(MeshError, match=r"llm\.hub_token") as caught:
            await source(server, client)
        assert caught.value.code is ErrorCode.FORBIDDEN
        with pytest.raises(MeshError, match="There is no http"):
            await source(server, client, "/b.gguf")


async def test_the_token_stays_with_the_origin_when_it_redirects(tmp_path: Path) -> None:
    async with (
        origin_server({"/cdn/a.gguf": BODY}) as storage,
        origin_server({}) as hub,
        httpx2.AsyncClient() as client,
    ):
        hub.redirect_to = storage.url("")
        found = await source(hub, client, token="hf_secret")
        await make(tmp_path, [found]).run()
    assert all(authorization == "Bearer hf_secret" for _, _, authorization in hub.asked)
    assert all(authorization == "" for _, _, authorization in storage.asked)
    assert storage.asked


async def test_a_disk_that_is_too_small_is_told_before_anything_is_asked_for(tmp_path: Path) -> None:
    fetch = make(tmp_path, [])
    fetch._free_bytes = lambda path: 1000
    with pytest.raises(MeshError, match=r"only 0\.0 GB are free") as caught:
        await fetch.run()
    assert caught.value.code is ErrorCode.DISK_FULL


async def test_a_disk_that_fills_half_way_keeps_what_arrived(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with origin_server({"/a.gguf": BODY}) as server, httpx2.AsyncClient() as client:
        found = await source(server, client)
        fetch = make(tmp_path, [found])
        real = fetch._open

        class Filling:
            def __init__(self, file: object) -> None:
                self.file, self.left = file, 1_600_000

            def write(self, data: memoryview) -> int:
                if self.left < len(data):
                    raise OSError(28, "No space left on device")
                self.left -= len(data)
                return self.file.write(data)

            def __getattr__(self, name: str) -> object:
                return getattr(self.file, name)

        fetch._open = lambda: Filling(real())
        with pytest.raises(MeshError, match="No space left") as caught:
            await fetch.run()
        assert caught.value.code is ErrorCode.DISK_FULL
        done = await make(tmp_path, [found]).run()
    assert sum(done.received.values()) <= len(BODY) - 900_000
    assert (tmp_path / "a.gguf").read_bytes() == BODY
