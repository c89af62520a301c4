"""Stored chats on real hubs, drivers and databases: one node, two at once, liars, and a full collection."""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from itertools import count
from pathlib import Path

import msgspec
import pytest
import trio

from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.llm.model import ChatSession
from meshnode.llm.service.chats import (
    _PIECE_BYTES,
    CHATS,
    MESSAGE_BYTES_MAX,
    MESSAGES_MAX,
    NEW_TITLE,
    TITLE_CHARS_MAX,
    Chats,
    chats_collection,
)
from protocol.records.collection import Collection
from tests.support.record_mesh import RecordMesh, record_mesh

BEGAN = 1_800_000_000.0


class Clock:
    """Wall time that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = BEGAN

    def __call__(self) -> float:
        return self.now


class Alone:
    """One node's chats."""

    def __init__(self, mesh: RecordMesh) -> None:
        self.mesh = mesh
        self.clock = Clock()
        self.hub, self.writer = mesh.members[0].hub, mesh.members[0].writer
        self.chats = Chats(hub=self.hub, writer=self.writer, wall=self.clock)

    def said(self, chat: ChatSession) -> list[tuple[str, str]]:
        return said(self.chats, chat)

    def stored(self) -> list[bytes]:
        return [record.key for record in self.hub.records.scan(CHATS, limit=1000).records]


def said(chats: Chats, chat: ChatSession) -> list[tuple[str, str]]:
    return [(line.role, line.content) for line in chats.read(chat.id).messages]


@asynccontextmanager
async def alone(folder: Path, collection: Collection | None = None) -> AsyncIterator[Alone]:
    async with record_mesh(folder, 1, [collection or chats_collection()]) as mesh:
        yield Alone(mesh)


@pytest.fixture
async def one(data_dir: Path) -> AsyncIterator[Alone]:
    async with alone(data_dir) as it:
        yield it


@asynccontextmanager
async def refused(code: ErrorCode) -> AsyncIterator[None]:
    with pytest.raises(MeshError) as caught:
        yield
    assert caught.value.code is code


# ---- one node -------------------------------------------------------------------------------------------------------


async def test_a_chat_grows_and_is_listed_without_its_messages(one: Alone) -> None:
    assert one.chats.list() == []
    chat = await one.chats.create("demo")
    assert (chat.model, chat.title, chat.messages) == ("demo", NEW_TITLE, ())
    assert (chat.id[:5], len(chat.id)) == ("sess_", 21)
    assert one.chats.read(chat.id) == chat
    await one.chats.append(chat.id, "user", "  why is\nthe sky blue and not green at noon?  ")
    one.clock.now += 5
    await one.chats.append(chat.id, "assistant", "", sent_at=BEGAN + 3)
    read = one.chats.read(chat.id)
    assert one.said(chat) == [("user", "  why is\nthe sky blue and not green at noon?  "), ("assistant", "")]
    assert [line.sent_at for line in read.messages] == ["2027-01-15T08:00:00.000Z", "2027-01-15T08:00:03.000Z"]
    assert read.title == "why is the sky blue and"
    assert (read.created_at, read.updated_at) == ("2027-01-15T08:00:00.000Z", "2027-01-15T08:00:05.000Z")
    assert one.chats.list() == [msgspec.structs.replace(read, messages=())]


async def test_a_title_comes_from_the_first_words_until_a_person_gives_one(one: Alone) -> None:
    chat = await one.chats.create("demo")
    for role, content in (("system", "be brief"), ("user", " \n "), ("user", "x" * 500), ("user", "later words")):
        await one.chats.append(chat.id, role, content)
    assert one.chats.read(chat.id).title == "x" * TITLE_CHARS_MAX
    named = await one.chats.create("demo")
    await one.chats.rename(named.id, "  the \n sky ")
    await one.chats.append(named.id, "user", "first words")
    assert one.chats.read(named.id).title == "the sky"
    for title in ("", " \n", "x" * (TITLE_CHARS_MAX + 1)):
        async with refused(ErrorCode.BAD_REQUEST):
            await one.chats.rename(named.id, title)
    await one.chats.rename(named.id, NEW_TITLE)
    await one.chats.append(named.id, "user", "other words")
    assert one.chats.read(named.id).title == NEW_TITLE, "this too a person chose"


async def test_the_last_used_is_listed_first(one: Alone) -> None:
    made = []
    for _ in range(3):
        one.clock.now += 1
        made.append(await one.chats.create("demo"))
    one.clock.now += 1
    await one.chats.append(made[0].id, "user", "again")
    assert [chat.id for chat in one.chats.list()] == [made[0].id, made[2].id, made[1].id]
    one.clock.now += 1
    await one.chats.rename(made[1].id, "mine")
    assert one.chats.list()[0].id == made[1].id


@pytest.mark.parametrize("start", range(4))
async def test_a_long_message_comes_back_whole_wherever_it_is_cut(one: Alone, start: int) -> None:
    chat = await one.chats.create("demo")
    text = ("a" * start + "\U0001f469\u200d\U0001f680" * (MESSAGE_BYTES_MAX // 11))[: MESSAGE_BYTES_MAX // 4]
    assert len(text.encode()) > 6 * _PIECE_BYTES
    await one.chats.append(chat.id, "user", text)
    await one.chats.append(chat.id, "assistant", "short")
    assert one.said(chat) == [("user", text), ("assistant", "short")]


async def test_a_mebibyte_is_a_message_and_a_byte_more_is_none(one: Alone) -> None:
    chat = await one.chats.create("demo")
    await one.chats.append(chat.id, "user", "x" * MESSAGE_BYTES_MAX)
    assert one.said(chat) == [("user", "x" * MESSAGE_BYTES_MAX)]
    before = one.stored()
    for too_long in ("x" * (MESSAGE_BYTES_MAX + 1), "\u00e9" * (MESSAGE_BYTES_MAX // 2) + "x"):
        async with refused(ErrorCode.TOO_LARGE):
            await one.chats.append(chat.id, "user", too_long)
    assert one.stored() == before


async def test_text_that_is_none_is_refused(one: Alone) -> None:
    chat = await one.chats.create("demo")
    async with refused(ErrorCode.BAD_REQUEST):
        await one.chats.append(chat.id, "user", "half a pair: \ud83d")
    assert one.said(chat) == []


async def test_messages_of_one_moment_keep_their_order(one: Alone) -> None:
    chat = await one.chats.create("demo")
    for number in range(20):
        await one.chats.append(chat.id, "user", str(number))
    assert [content for _, content in one.said(chat)] == [str(number) for number in range(20)]


async def test_an_answer_from_a_clock_that_is_behind_stands_behind_its_question(one: Alone) -> None:
    chat = await one.chats.create("demo")
    await one.chats.append(chat.id, "user", "question")
    one.clock.now -= 30
    await one.chats.append(chat.id, "assistant", "answer")
    assert [content for _, content in one.said(chat)] == ["question", "answer"]


async def test_a_deleted_chat_is_gone_with_everything(one: Alone) -> None:
    chat, other = await one.chats.create("demo"), await one.chats.create("demo")
    await one.chats.append(chat.id, "user", "x" * 200_000)
    await one.chats.rename(chat.id, "mine")
    await one.chats.delete(chat.id)
    await one.chats.delete(chat.id)
    assert [key.decode() for key in one.stored()] == [other.id]
    assert [left.id for left in one.chats.list()] == [other.id]
    for ask in (one.chats.append(chat.id, "user", "x"), one.chats.rename(chat.id, "x")):
        async with refused(ErrorCode.NOT_FOUND):
            await ask
    async with refused(ErrorCode.NOT_FOUND):
        one.chats.read(chat.id)


@pytest.mark.parametrize("name", ["", "sess_", "sess_../x", "sess_a/b", "sess_\u00e9", "other", "sess_" + "a" * 60])
async def test_what_is_no_name_of_a_chat_is_not_found(one: Alone, name: str) -> None:
    for ask in (one.chats.append(name, "user", "x"), one.chats.rename(name, "x"), one.chats.delete(name)):
        async with refused(ErrorCode.NOT_FOUND):
            await ask
    async with refused(ErrorCode.NOT_FOUND):
        one.chats.read(name)


async def test_a_chat_has_an_end(one: Alone, monkeypatch: pytest.MonkeyPatch) -> None:
    assert MESSAGES_MAX == 10_000
    monkeypatch.setattr("meshnode.llm.service.chats.MESSAGES_MAX", 3)
    chat = await one.chats.create("demo")
    await one.chats.append(chat.id, "user", "x" * 100_000)  # several records, one message
    await one.chats.append(chat.id, "user", "2")
    await one.chats.append(chat.id, "user", "3")
    async with refused(ErrorCode.TOO_LARGE):
        await one.chats.append(chat.id, "user", "4")


# ---- liars and full disks -------------------------------------------------------------------------------------------

LIES = [
    b"", b"\xc1", b"\x00" * 100, msgspec.msgpack.encode({"role": "user"}), msgspec.msgpack.encode(["user", 1.0]),
    msgspec.msgpack.encode([1, 2, 3, 4]), msgspec.msgpack.encode(["user", "now", "x", 1]),
    *(msgspec.msgpack.encode(["user", 1.0, "x", pieces]) for pieces in (-1, 0, 2, 2**40)),
    msgspec.msgpack.encode(["king", 1.0, "x", 1]),
    b"\x94\xa4user\xcb\x3f\xf0" + bytes(6) + b"\xa2\xff\xfe\x01",
]  # fmt: skip


@pytest.mark.parametrize("lie", LIES, ids=range(len(LIES)))
async def test_lying_records_are_passed_over(one: Alone, lie: bytes) -> None:
    chat = await one.chats.create("demo")
    await one.chats.append(chat.id, "user", "before")
    await one.writer.put(CHATS, f"{chat.id}/{int(BEGAN * 1000):013x}ffffffff/0000".encode(), lie)
    await one.chats.append(chat.id, "assistant", "after")
    assert one.said(chat) == [("user", "before"), ("assistant", "after")]
    for key in (b"sess_lie", b"\xff\xfe", b"sess_\n", b"x", chat.id.encode() + b":title"):
        await one.writer.put(CHATS, key, lie)
    assert [left.id for left in one.chats.list()] == [chat.id]


@pytest.mark.parametrize("moment", [float("nan"), float("inf"), -float("inf"), 1e300, -1.0])
async def test_times_that_are_none_do_no_harm(one: Alone, moment: float) -> None:
    good = await one.chats.create("demo")
    head = msgspec.msgpack.encode(["demo", "lie", moment, moment])
    await one.writer.put(CHATS, b"sess_lie", head)
    piece = msgspec.msgpack.encode(["user", moment, "text", 1])
    await one.writer.put(CHATS, b"sess_lie/" + b"f" * 21 + b"/0000", piece)
    assert {chat.id for chat in one.chats.list()} == {good.id, "sess_lie"}
    assert [line.content for line in one.chats.read("sess_lie").messages] == ["text"]
    # A message whose name lies in the far future leaves no room behind it, but does not end the chat.
    await one.chats.append("sess_lie", "user", "more")
    assert {line.content for line in one.chats.read("sess_lie").messages} == {"text", "more"}


async def test_a_name_that_no_chat_has_is_not_listed(one: Alone) -> None:
    head = msgspec.msgpack.encode(["demo", "lie", BEGAN, BEGAN])
    for key in (b"\xff\xfe", b"sess_\n", b"x", b"sess_" + b"a" * 60, b"sess_\xc3\xa9"):
        await one.writer.put(CHATS, key, head)
    assert one.chats.list() == []


async def test_a_full_collection_says_so_and_keeps_no_half_message(data_dir: Path) -> None:
    async with alone(data_dir, Collection(CHATS, tombstone_life_s=3600.0, records_max=6)) as one:
        chat = await one.chats.create("demo")
        await one.chats.append(chat.id, "user", "fits")
        with pytest.raises(MeshError, match="the collection is full; delete what is not needed") as caught:
            await one.chats.append(chat.id, "user", "x" * MESSAGE_BYTES_MAX)
        assert caught.value.code is ErrorCode.CONFLICT
        assert one.said(chat) == [("user", "fits")]


# ---- two nodes ------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def two(folder: Path) -> AsyncIterator[tuple[RecordMesh, list[Chats]]]:
    async with record_mesh(folder, 2, [chats_collection()]) as mesh:
        clock: Iterator[int] = count()
        yield (
            mesh,
            [Chats(hub=node.hub, writer=node.writer, wall=lambda: BEGAN + next(clock) / 50) for node in mesh.members],
        )


async def test_two_nodes_that_write_to_one_chat_at_once_lose_nothing(data_dir: Path) -> None:
    async with two(data_dir) as (mesh, (here, there)):
        chat = await here.create("demo")
        await mesh.agree(CHATS)

        async def write(chats: Chats, name: str) -> None:
            for number in range(25):
                await chats.append(chat.id, "user", f"{name}{number} " + "y" * (20_000 * (number % 3)))

        mesh.apart = True
        async with trio.open_nursery() as nursery:
            nursery.start_soon(write, here, "h")
            nursery.start_soon(write, there, "t")
        mesh.apart = False
        await mesh.agree(CHATS)
        assert said(here, chat) == said(there, chat)
        for name in "ht":
            words = [content.split()[0] for _, content in said(here, chat) if content.startswith(name)]
            assert words == [f"{name}{number}" for number in range(25)]
        assert here.list() == there.list()


async def test_a_title_given_on_one_node_outlives_what_the_other_writes_meanwhile(data_dir: Path) -> None:
    async with two(data_dir) as (mesh, (here, there)):
        chat = await here.create("demo")
        await mesh.agree(CHATS)
        mesh.apart = True
        await here.rename(chat.id, "mine")
        await there.append(chat.id, "user", "words of theirs")
        mesh.apart = False
        await mesh.agree(CHATS)
        assert [chats.read(chat.id).title for chats in (here, there)] == ["mine", "mine"]


async def test_a_chat_deleted_on_one_node_is_gone_on_the_other(data_dir: Path) -> None:
    async with two(data_dir) as (mesh, (here, there)):
        chat = await here.create("demo")
        await here.append(chat.id, "user", "x")
        await mesh.agree(CHATS)
        await there.delete(chat.id)
        await mesh.agree(CHATS)
        assert here.list() == []
