"""Stored conversations: records of the mesh, so that every member has them and none is lost with a machine.

A chat is a head record, one for the title that a person gave it, and one for each message; a long message is several,
and is there for readers once all of them are. Two nodes that write to one chat at the same time lose nothing: messages
have names of their own, and the head only repeats what can be made up from them.
"""

import math
import re
import secrets
from collections.abc import Callable, Iterator, Sequence
from typing import Final, TypeVar, get_args

import msgspec
import trio

from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.kernel.records import RecordWriter
from meshnode.kernel.times import rfc3339
from meshnode.llm.model import UNREADABLE, ChatLine, ChatSession, MessageRole
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
CLEAN_UP_S: Final = 10.0
_CHAT: Final = re.compile(r"sess_[0-9a-zA-Z]{1,59}", re.ASCII)
_MESSAGE: Final = re.compile(rb"/[0-9a-f]{21}/[0-9a-f]{4}")
_MOMENT_MAX: Final = 16**13 - 1
_ROLES: Final = frozenset(get_args(MessageRole))

Wanted = TypeVar("Wanted")


def chats_collection() -> Collection:
    """Any member may write: people sit at any machine. A deleted chat may be forgotten after a month."""
    return Collection(CHATS, tombstone_life_s=30 * 86_400.0, records_max=100_000)


class _Head(msgspec.Struct, frozen=True, array_like=True):
    model: str
    title: str
    created: float
    updated: float


class _Piece(msgspec.Struct, frozen=True, array_like=True):
    role: str
    sent: float
    content: str
    pieces: int  # of the whole message


class _Title(msgspec.Struct, frozen=True, array_like=True):
    title: str


class Chats:
    """The verbs. Reads are from this node's own copy; writes are durable here when they return."""

    def __init__(self, *, hub: Node, writer: RecordWriter, wall: Callable[[], float]) -> None:
        self._hub = hub
        self._writer = writer
        self._wall = wall

    def list(self) -> list[ChatSession]:
        """Every chat without its messages, the last used first."""
        heads = list(self._heads())
        heads.sort(key=lambda entry: (-entry[1].updated if math.isfinite(entry[1].updated) else 0.0, entry[0]))
        return [self._session(chat, head) for chat, head in heads]

    def read(self, chat: str) -> ChatSession:
        """One with all messages, in order. Raises MeshError NOT_FOUND."""
        return self._session(chat, self._head(chat), tuple(self._lines(chat)))

    async def create(self, model: str) -> ChatSession:
        """A new, empty chat."""
        now = self._wall()
        chat = f"sess_{secrets.token_hex(8)}"
        head = _Head(model, NEW_TITLE, now, now)
        await self._put(chat, head)
        return self._session(chat, head)

    async def append(self, chat: str, role: str, content: str, sent_at: float | None = None) -> None:
        """Add a message. The first one of a user gives the chat its title, until a person gives it one.

        Raises MeshError NOT_FOUND, BAD_REQUEST, TOO_LARGE beyond MESSAGE_BYTES_MAX or MESSAGES_MAX, and as the records
        do; then nothing of it stays.
        """
        head, now = self._head(chat), self._wall()
        last, messages = self._end(chat)
        try:
            size = len(content.encode())
        except UnicodeEncodeError:
            message = "The message holds half a surrogate pair, which is no text. Send UTF-8."
            raise MeshError(ErrorCode.BAD_REQUEST, message) from None
        if size > MESSAGE_BYTES_MAX or messages >= MESSAGES_MAX:
            raise MeshError(
                ErrorCode.TOO_LARGE,
                f"A message has at most {MESSAGE_BYTES_MAX // 1024} KiB and a chat at most {MESSAGES_MAX} messages. "
                "Begin a new chat, or put the text into a file.",
            )
        # Named by time and chance, after the last that is known: the order is the same everywhere, whatever clocks say,
        # and two writers never meet.
        moment = min(max(int(now * 1000), last + 1), _MOMENT_MAX)
        name = f"{chat}/{moment:013x}{secrets.token_hex(4)}"
        pieces = list(_pieces(content))
        sent = now if sent_at is None else sent_at
        await self._write(name, [_Piece(role, sent, piece, len(pieces)) for piece in pieces])
        title = head.title
        if title == NEW_TITLE and role == "user" and content.split():
            title = " ".join(content.split()[:TITLE_WORDS])[:TITLE_CHARS_MAX]
        await self._put(chat, msgspec.structs.replace(head, title=title, updated=now))

    async def rename(self, chat: str, title: str) -> None:
        """Give it a title. Raises MeshError NOT_FOUND, BAD_REQUEST."""
        title = " ".join(title.split())
        if not title or len(title) > TITLE_CHARS_MAX:
            raise MeshError(ErrorCode.BAD_REQUEST, f"A title has 1 to {TITLE_CHARS_MAX} characters.")
        head = self._head(chat)
        # Apart from the head, which whoever adds a message writes anew without having seen this.
        await self._writer.put(CHATS, _title_key(chat), msgspec.msgpack.encode(_Title(title)))
        await self._put(chat, msgspec.structs.replace(head, updated=self._wall()))

    async def delete(self, chat: str) -> None:
        """Delete it everywhere, whether it is there or not."""
        keys = [record.key for record in self._records(chat)]
        # The head goes first: a chat whose deletion was cut short is gone for readers, not half there.
        for key in (_key(chat), _title_key(chat), *keys):
            if self._hub.records.get(CHATS, key) is not None:
                await self._writer.delete(CHATS, key)

    async def _write(self, name: str, pieces: Sequence[_Piece]) -> None:
        keys = [f"{name}/{number:04x}".encode("ascii") for number in range(len(pieces))]
        written = 0
        try:
            for key, piece in zip(keys, pieces, strict=True):
                await self._writer.put(CHATS, key, msgspec.msgpack.encode(piece))
                written += 1
        finally:
            if written < len(pieces):
                with trio.move_on_after(CLEAN_UP_S, shield=True):
                    for key in keys[:written]:
                        await self._writer.delete(CHATS, key)

    async def _put(self, chat: str, head: _Head) -> None:
        await self._writer.put(CHATS, _key(chat), msgspec.msgpack.encode(head))

    def _heads(self) -> Iterator[tuple[str, _Head]]:
        for record in self._scan(b""):
            chat = record.key.decode("ascii", "replace")
            head = _decoded(record, _Head) if _CHAT.fullmatch(chat) else None
            if head is not None:
                yield chat, head

    def _head(self, chat: str) -> _Head:
        record = self._hub.records.get(CHATS, _key(chat))
        head = None if record is None else _decoded(record, _Head)
        if head is None:
            raise _unknown(chat)
        return head

    def _session(self, chat: str, head: _Head, lines: tuple[ChatLine, ...] = ()) -> ChatSession:
        record = self._hub.records.get(CHATS, _title_key(chat))
        given = None if record is None else _decoded(record, _Title)
        return ChatSession(
            id=chat,
            model=head.model,
            title=head.title if given is None else given.title,
            created_at=rfc3339(head.created),
            updated_at=rfc3339(head.updated),
            messages=lines,
        )

    def _lines(self, chat: str) -> Iterator[ChatLine]:
        name, parts = b"", list[_Piece]()
        for record in self._records(chat):
            piece, owner = _decoded(record, _Piece), record.key[:-5]
            if piece is None or piece.role not in _ROLES:
                continue
            if owner != name:
                name, parts = owner, []
            if int(record.key[-4:], 16) == len(parts):
                parts.append(piece)
                if len(parts) == parts[0].pieces:
                    content = "".join(part.content for part in parts)
                    yield ChatLine(role=parts[0].role, content=content, sent_at=rfc3339(parts[0].sent))

    def _end(self, chat: str) -> tuple[int, int]:
        """The moment in the last message's name, and how many messages there are."""
        last, names = 0, set[bytes]()
        for record in self._records(chat):
            last = int(record.key[len(chat) + 1 :][:13], 16)
            names.add(record.key[:-5])
        return last, len(names)

    def _records(self, chat: str) -> Iterator[Record]:
        """The pieces of its messages, in order."""
        prefix = _key(chat)
        for record in self._scan(prefix + b"/"):
            if _MESSAGE.fullmatch(record.key, len(prefix)):
                yield record

    def _scan(self, prefix: bytes) -> Iterator[Record]:
        cursor: bytes | None = None
        while True:
            page = self._hub.records.scan(CHATS, prefix, cursor, _SCAN)
            yield from page.records
            if page.cursor is None:
                return
            cursor = page.cursor


def _key(chat: str) -> bytes:
    if not _CHAT.fullmatch(chat):
        raise _unknown(chat)
    return chat.encode("ascii")


def _title_key(chat: str) -> bytes:
    return _key(chat) + b":title"


def _unknown(chat: str) -> MeshError:
    return MeshError(ErrorCode.NOT_FOUND, f"There is no chat {chat[:64]!r}. `GET /api/llm/sessions` lists them.")


def _pieces(content: str) -> Iterator[str]:
    """Parts of a text that fit a record each, cut between characters; an empty text is one empty part."""
    size = _PIECE_BYTES // 4
    for start in range(0, max(1, len(content)), size):
        yield content[start : start + size]


def _decoded(record: Record, wanted: type[Wanted]) -> Wanted | None:
    """A value that another version or a lying member wrote otherwise is passed over."""
    try:
        return msgspec.msgpack.decode(record.value, type=wanted)
    except UNREADABLE:
        return None
