"""What upstream servers have, told to the mesh: true after changes and restarts, within a record's size, by whom."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx2
import msgspec
import pytest
import trio

from meshnode.llm.model import ModelCard
from meshnode.llm.service import served
from meshnode.llm.service.engines.upstream import MODEL_CHARS_MAX, Upstream, Upstreams
from meshnode.llm.service.served import MODELS_TOLD_MAX, SERVED, Served, served_collection
from protocol.ids import NodeId
from tests.support.record_mesh import Member, record_mesh
from tests.support.recording_log import RecordingLog
from tests.support.upstream_server import http, upstream_server


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served, "REFRESH_S", 0.02)
    monkeypatch.setattr(served, "RETRY_S", 0.02)


def listing(*models: str) -> bytes:
    return http(msgspec.json.encode({"data": [{"id": model} for model in models]}), "application/json")


def told_by(member: Member) -> tuple[str, ...] | None:
    record = member.hub.records.get(SERVED, member.node_id.encode("ascii"))
    return None if record is None else tuple(msgspec.msgpack.decode(record.value)[0])


async def write(member: Member, *models: str) -> None:
    await member.writer.put(SERVED, member.node_id.encode("ascii"), msgspec.msgpack.encode([models]))


@asynccontextmanager
async def serving(member: Member, *servers: Upstream, log: RecordingLog | None = None) -> AsyncIterator[Served]:
    """A service that looks after its record until the block ends."""
    async with httpx2.AsyncClient() as client, trio.open_nursery() as nursery:
        made = Served(
            me=member.node_id,
            hub=member.hub,
            writer=member.writer,
            upstreams=Upstreams(servers, client),
            log=log or RecordingLog(),
        )
        nursery.start_soon(made.run)
        yield made
        nursery.cancel_scope.cancel()


async def test_what_a_server_has_is_told_and_what_it_lost_is_taken_back(data_dir: Path) -> None:
    async with record_mesh(data_dir, 1, [served_collection()]) as mesh, upstream_server(models=listing("b", "a")) as it:
        member = mesh.members[0]
        async with serving(member, Upstream("it", it.url)) as service:
            await mesh.until(lambda: told_by(member) == ("it/a", "it/b"))
            assert service.by_model() == {"it/a": member.node_id, "it/b": member.node_id}
            it.answers["/v1/models"] = listing("b")
            await mesh.until(lambda: told_by(member) == ("it/b",))


async def test_a_server_that_does_not_answer_has_nothing_and_is_named(data_dir: Path) -> None:
    log = RecordingLog()
    async with record_mesh(data_dir, 1, [served_collection()]) as mesh, upstream_server(models=listing("a")) as it:
        member = mesh.members[0]
        async with serving(member, Upstream("it", it.url), log=log):
            await mesh.until(lambda: told_by(member) == ("it/a",))
            del it.answers["/v1/models"]
            await mesh.until(lambda: told_by(member) == ())
            await mesh.until(lambda: log.at("warning").count("an upstream server does not answer") == 1)
            it.answers["/v1/models"] = listing("a")
            await mesh.until(lambda: told_by(member) == ("it/a",))
            del it.answers["/v1/models"]
            await mesh.until(lambda: log.at("warning").count("an upstream server does not answer") == 2)


async def test_a_server_that_did_not_answer_is_looked_for_soon_and_told_of_once(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served, "REFRESH_S", 3600.0)
    log = RecordingLog()
    async with record_mesh(data_dir, 1, [served_collection()]) as mesh, upstream_server() as it:
        member = mesh.members[0]
        async with serving(member, Upstream("it", it.url), log=log):
            await mesh.until(lambda: len(it.asked) > 3)
            it.answers["/v1/models"] = listing("a")
            await mesh.until(lambda: told_by(member) == ("it/a",))
            await mesh.until(lambda: "an upstream server answers again" in log.at("info"))
    assert log.at("warning").count("an upstream server does not answer") == 1


async def test_servers_that_answer_are_not_asked_again_for_one_that_does_not(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served, "REFRESH_S", 3600.0)
    async with (
        record_mesh(data_dir, 1, [served_collection()]) as mesh,
        upstream_server(models=listing("a")) as good,
        upstream_server() as bad,
    ):
        member = mesh.members[0]
        async with serving(member, Upstream("good", good.url), Upstream("bad", bad.url)):
            await mesh.until(lambda: len(bad.asked) > 3)
            assert told_by(member) == ("good/a",), "what it has stays known meanwhile"
            bad.answers["/v1/models"] = listing("b")
            await mesh.until(lambda: told_by(member) == ("bad/b", "good/a"))
    assert len(good.asked) == 1


async def test_what_an_earlier_run_told_is_taken_back_when_its_server_is_gone_from_the_settings(data_dir: Path) -> None:
    async with record_mesh(data_dir, 1, [served_collection()]) as mesh:
        member = mesh.members[0]
        await write(member, "old/model")
        async with serving(member) as service:
            await mesh.until(lambda: service.by_model() == {})


async def test_a_node_without_servers_writes_nothing(data_dir: Path) -> None:
    async with record_mesh(data_dir, 1, [served_collection()]) as mesh:
        async with serving(mesh.members[0]):
            await trio.sleep(0.1)
        assert told_by(mesh.members[0]) is None


async def test_names_that_fill_a_record_are_told_as_far_as_they_go(data_dir: Path) -> None:
    long = [f"{number:04}".ljust(MODEL_CHARS_MAX, "x") for number in range(MODELS_TOLD_MAX + 1)]
    async with record_mesh(data_dir, 1, [served_collection()]) as mesh, upstream_server(models=listing(*long)) as it:
        member, log = mesh.members[0], RecordingLog()
        async with serving(member, Upstream("it", it.url), log=log):
            await mesh.until(lambda: bool(told_by(member)))
            told = told_by(member)
        assert told is not None
        assert told == tuple(f"it/{name}" for name in long[: len(told)])
        assert len(told) > 200
        assert "upstream models could not be told" not in log.at("warning")


async def test_no_more_models_are_told_than_the_limit(data_dir: Path) -> None:
    many = [f"{number:04}" for number in range(MODELS_TOLD_MAX + 1)]
    async with record_mesh(data_dir, 1, [served_collection()]) as mesh, upstream_server(models=listing(*many)) as it:
        member = mesh.members[0]
        async with serving(member, Upstream("it", it.url)):
            await mesh.until(lambda: bool(told_by(member)))
        assert told_by(member) == tuple(f"it/{name}" for name in many[:MODELS_TOLD_MAX])


async def test_of_several_nodes_this_one_serves_else_the_first(data_dir: Path) -> None:
    async with record_mesh(data_dir, 3, [served_collection()]) as mesh:
        for member in mesh.members:
            await write(member, "it/m")
        await mesh.agree(SERVED)
        readers = [
            Served(
                me=member.node_id,
                hub=member.hub,
                writer=member.writer,
                upstreams=Upstreams([], httpx2.AsyncClient()),
                log=RecordingLog(),
            )
            for member in mesh.members
        ]
        for member, reader in zip(mesh.members, readers, strict=True):
            assert reader.by_model() == {"it/m": member.node_id}
        await mesh.members[0].writer.delete(SERVED, mesh.members[0].node_id.encode("ascii"))
        assert readers[0].by_model() == {"it/m": min(member.node_id for member in mesh.members[1:])}


async def test_a_card_names_the_node_that_serves(data_dir: Path) -> None:
    async with record_mesh(data_dir, 1, [served_collection()]) as mesh:
        member = mesh.members[0]
        await write(member, "it/b", "it/a")

        def name_of(node: NodeId) -> str:
            return f"name of {node}"

        async with serving(member, Upstream("it", "http://127.0.0.1:9/v1")) as service:
            cards = service.cards(name_of)
        assert cards == [
            ModelCard(
                name=name,
                source=f"upstream server of name of {member.node_id}",
                held_by=(member.node_id,),
                ready=True,
                state="ready",
            )
            for name in ("it/a", "it/b")
        ]
