"""Stored conversations: records of the mesh, so that every member has them and none is lost with a machine.

A chat is a head record and one record for each message; a long message is several. Two nodes that write to one chat at
the same time lose nothing: messages have names of their own, and the head only repeats what can be made up from them.
"""

import secrets
from collections.abc import Callable, Iterator
from typing import Final, TypeVar

import msgspec

from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.kernel.records import RecordWriter
from meshnode.kernel.times import rfc3339
from meshnode.llm.model import ChatLine, ChatSession
from protocol.node import Node
from protocol.records.collection import Collection
from protocol.records.record import Record

CHATS: Final = "llm/chats"
TITLE_WORDS: Final = 6
TITLE_CHARS_MAX: Final = 200
MESSAGE_BYTES_MAX: Final = 1024 * 1024
MESSAGES_MAX: Final = 10_000
_PIECE_BYTES: Final = 60_000
_SCAN: Final = 1_000
NEW_TITLE: Final = "New Chat"

Wanted = TypeVar("Wanted")


def chats_collection() -> Collection:
    """Any member may write: people sit at any machine. A deleted chat may be forgotten after a month."""
    return Collection(CHATS, tombstone_life_s=30 * 86_400.0, records_max=100_000)


class _Head(msgspec.Struct, frozen=True, array_like=True):
    model: str
    title: str
    created: float
    updated: float
    titled: bool  # by a person, not from the first words


class _Piece(msgspec.Struct, frozen=True, array_like=True):
    role: str
    sent: float
    content: str


class Chats:
    """The verbs. Reads are from this node's own copy; writes are durable here when they return."""

    def __init__(self, *, hub: Node, writer: RecordWriter, wall: Callable[[], float]) -> None:
        self._hub = hub
        self._writer = writer
        self._wall = wall

    def list(self) -> list[ChatSession]:
        """Every chat without its messages, the last used first."""
        heads = [(key, head) for key, head in self._heads()]
        heads.sort(key=lambda entry: (-entry[1].updated, entry[0]))
        return [_session(key, head) for key, head in heads]

    def read(self, chat: str) -> ChatSession:
        """One with all messages, in order. Raises MeshError NOT_FOUND."""
        return _session(chat, self._head(chat), tuple(self._lines(chat)))

    async def create(self, model: str) -> ChatSession:
        """A new, empty chat."""
        now = self._wall()
        chat = f"sess_{secrets.token_hex(8)}"
        head = _Head(model, NEW_TITLE, now, now, False)
        await self._put(chat, head)
        return _session(chat, head)

    async def append(self, chat: str, role: str, content: str, sent_at: float | None = None) -> None:
        """Add a message. The first one of a user gives the chat its title, until a person gives it one.

        Raises MeshError NOT_FOUND, and TOO_LARGE beyond MESSAGE_BYTES_MAX or MESSAGES_MAX.
        """
        head, now = self._head(chat), self._wall()
        data = content.encode("utf-8", "surrogatepass")
        count = sum(1 for _ in self._records(chat))
        if len(data) > MESSAGE_BYTES_MAX or count >= MESSAGES_MAX:
            raise MeshError(
                ErrorCode.TOO_LARGE,
                f"A message has at most {MESSAGE_BYTES_MAX // 1024} KiB and a chat at most {MESSAGES_MAX} messages. "
                "Begin a new chat, or put the text into a file.",
            )
        sent = now if sent_at is None else sent_at
        # Named by time and chance: the order is the same everywhere, and two writers never meet.
        name = f"{chat}/{int(now * 1000):013x}{secrets.token_hex(4)}"
        for number, piece in enumerate(_pieces(content)):
            value = msgspec.msgpack.encode(_Piece(role, sent, piece))
            await self._writer.put(CHATS, f"{name}/{number:04x}".encode("ascii"), value)
        title = head.title
        if not head.titled and title == NEW_TITLE and role == "user" and content.split():
            title = " ".join(content.split()[:TITLE_WORDS])[:TITLE_CHARS_MAX]
        await self._put(chat, msgspec.structs.replace(head, title=title, updated=now))

    async def rename(self, chat: str, title: str) -> None:
        """Give it a title. Raises MeshError NOT_FOUND, BAD_REQUEST."""
        title = " ".join(title.split())
        if not title or len(title) > TITLE_CHARS_MAX:
            raise MeshError(ErrorCode.BAD_REQUEST, f"A title has 1 to {TITLE_CHARS_MAX} characters.")
        head = self._head(chat)
        await self._put(chat, msgspec.structs.replace(head, title=title, titled=True, updated=self._wall()))

    async def delete(self, chat: str) -> None:
        """Delete it everywhere, whether it is there or not."""
        keys = [record.key for record in self._records(chat)]
        # The head goes first: a chat whose deletion was cut short is gone for readers, not half there.
        for key in (_key(chat), *keys):
            await self._writer.delete(CHATS, key)

    async def _put(self, chat: str, head: _Head) -> None:
        await self._writer.put(CHATS, _key(chat), msgspec.msgpack.encode(head))

    def _heads(self) -> Iterator[tuple[str, _Head]]:
        for record in self._scan(b""):
            if b"/" not in record.key:
                head = _decoded(record, _Head)
                if head is not None:
                    yield record.key.decode("ascii", "replace"), head

    def _head(self, chat: str) -> _Head:
        record = self._hub.records.get(CHATS, _key(chat))
        head = None if record is None else _decoded(record, _Head)
        if head is None:
            raise MeshError(ErrorCode.NOT_FOUND, f"There is no chat {chat!r}. `GET /api/llm/sessions` lists them.")
        return head

    def _lines(self, chat: str) -> Iterator[ChatLine]:
        name, role, sent, parts = b"", "", 0.0, list[str]()
        for record in self._records(chat):
            piece = _decoded(record, _Piece)
            if piece is None:
                continue
            owner = record.key.rpartition(b"/")[0]
            if owner != name and parts:
                yield ChatLine(role=role, content="".join(parts), sent_at=rfc3339(sent))
                parts = []
            name, role, sent = owner, piece.role, piece.sent
            parts.append(piece.content)
        if parts:
            yield ChatLine(role=role, content="".join(parts), sent_at=rfc3339(sent))

    def _records(self, chat: str) -> Iterator[Record]:
        return self._scan(_key(chat) + b"/")

    def _scan(self, prefix: bytes) -> Iterator[Record]:
        cursor: bytes | None = None
        while True:
            page = self._hub.records.scan(CHATS, prefix, cursor, _SCAN)
            yield from page.records
            if page.cursor is None:
                return
            cursor = page.cursor


def _key(chat: str) -> bytes:
    if not (chat.startswith("sess_") and chat.isascii() and chat[5:].isalnum() and len(chat) <= 64):
        raise MeshError(ErrorCode.NOT_FOUND, f"There is no chat {chat[:64]!r}. `GET /api/llm/sessions` lists them.")
    return chat.encode("ascii")


def _pieces(content: str) -> Iterator[str]:
    """Parts of a text that fit a record each, cut between characters; an empty text is one empty part."""
    size = _PIECE_BYTES // 4
    for start in range(0, max(1, len(content)), size):
        yield content[start : start + size]


def _decoded(record: Record, wanted: type[Wanted]) -> Wanted | None:
    """A value that another version or a lying member wrote otherwise is passed over."""
    try:
        return msgspec.msgpack.decode(record.value, type=wanted)
    except (msgspec.DecodeError, msgspec.ValidationError):
        return None


def _session(chat: str, head: _Head, lines: tuple[ChatLine, ...] = ()) -> ChatSession:
    return ChatSession(
        id=chat,
        model=head.model,
        title=head.title,
        created_at=rfc3339(head.created),
        updated_at=rfc3339(head.updated),
        messages=lines,
    )
