"""What members write about models may be anything: it is passed over by whoever reads it, and nothing else is lost."""

import contextlib
from collections.abc import Callable
from pathlib import Path

import httpx2
import msgspec
import pytest

from meshnode.llm.service import chats, offering, served
from meshnode.llm.service.engines.upstream import Upstreams
from meshnode.llm.service.weights import records
from protocol.node import Node
from protocol.sharding.offers import Speed
from tests.support.record_mesh import record_mesh
from tests.support.recording_log import RecordingLog

NEST = b"\x91" * 2_000 + b"\xc0"
OFFER = msgspec.msgpack.encode(offering.Offer("n", True, "1", 1, 1, Speed(1, 0.1, 0.1)))
VALUES = {
    "nothing": b"",
    "no msgpack": b"\xc1",
    "nesting": NEST,
    "nesting behind what is known": b"\x92\x90" + NEST,
    "nesting behind all": b"\x93\xc2\x90" + NEST,
    "nesting behind an offer": bytes([OFFER[0] + 1]) + OFFER[1:] + NEST,
    "nesting in a field nobody knows": b"\x81\xa1x" + NEST,
    "no text": b"\x91\x91\xa1\xff",
    "no text in a map": b"\x82\xa4name\xa1\xff\xa1x\xc0",
    "a lying count": b"\xdd\xff\xff\xff\xff",
    "another type": msgspec.msgpack.encode({"name": 5, "models": [[]]}),
}
READERS: dict[str, Callable[[Node], object]] = {
    "served": lambda hub: reader_of_served(hub).by_model(),
    "offers": lambda hub: offering.Offers(hub).online(),
    "models": lambda hub: records.ModelRecords(me=hub.me, reads=hub.records, writes=None).manifests(),  # type: ignore[arg-type]  # nothing is written
    "held": lambda hub: records.ModelRecords(me=hub.me, reads=hub.records, writes=None).holders("0" * 64),  # type: ignore[arg-type]  # nothing is written
}  # fmt: skip


def reader_of_served(hub: Node) -> served.Served:
    upstreams = Upstreams([], httpx2.AsyncClient())
    return served.Served(me=hub.me, hub=hub, writer=None, upstreams=upstreams, log=RecordingLog())  # type: ignore[arg-type]  # nothing is written


def key_of(name: str, hub: Node) -> tuple[str, bytes]:
    node = hub.me.encode("ascii")
    return {
        "served": (served.SERVED, node),
        "offers": (offering.OFFERS, node),
        "models": (records.MODELS, b"0" * 64),
        "held": (records.HELD, node + b"/" + b"0" * 64),
    }[name]


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("defended", [True, False])
async def test_whatever_a_member_writes_is_passed_over(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch, name: str, defended: bool
) -> None:
    if not defended:
        for module in (served, offering, records):
            monkeypatch.setattr(module, "UNREADABLE", (msgspec.MsgspecError,))
    collections = [chats.chats_collection(), offering.offers_collection(), served.served_collection()]
    failed: list[str] = []
    async with record_mesh(data_dir, 1, [*collections, *records.model_collections()]) as mesh:
        hub, writer = mesh.members[0].hub, mesh.members[0].writer
        collection, key = key_of(name, hub)
        for what, value in VALUES.items():
            await writer.put(collection, key, value)
            with contextlib.suppress(RecursionError, UnicodeDecodeError):
                assert not READERS[name](hub), what
                continue
            failed.append(what)
    assert bool(failed) is not defended, failed
