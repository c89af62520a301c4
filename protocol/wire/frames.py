"""Frames of a link, and the first words that two nodes exchange on one.

A frame is u32 length (of what follows, big-endian), u8 channel, payload. The decoder is incremental and refuses a frame
by its header, before any of it is kept. HELLO, HELLO_OK and REFUSED open a connection; the rest of the link's own
messages keep it alive and end it without losing a frame. What travels on the other channels is not looked at here, and
who may connect is for the roster.
"""

from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import Annotated, Final

import msgspec

from protocol.ids import NODE_ID_BYTES, NodeId
from protocol.wire.limits import BOOT_MAX, FRAME_BYTES_MAX, FRAME_HEADER_BYTES, PROTOCOL_VERSION, PROTOCOL_VERSION_MIN

HELLO_FRAME_BYTES_MAX: Final = 4096
"""The longest frame before both HELLOs are done: a stranger may not make this node keep more."""

LINK_MESSAGE_BYTES_MAX: Final = 4096
FRAME_PAYLOAD_BYTES_MAX: Final = FRAME_BYTES_MAX - 1
FEATURES_MAX: Final = 32
GRANT_BYTES: Final = 16
REASON_BYTES_MAX: Final = 1024
TOMBSTONE_BYTES_MAX: Final = 1024


class Channel(IntEnum):
    """What a frame carries: typed messages of the machines, rpc, or the link's own messages."""

    MACHINES = 0
    RPC = 1
    LINK = 2


class RemoteProtocolError(Exception):
    """The peer broke the protocol; the connection is of no further use. The text is for the local log."""


class FrameTooLarge(RemoteProtocolError):  # noqa: N818 -- named after what happened, as all wire errors are
    """A header announced more than the limit; none of the frame was kept."""


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame as it arrived."""

    channel: int
    payload: bytes


def encode_frame(channel: Channel, payload: bytes) -> bytes:
    """The bytes of one frame. Raises ValueError if the payload exceeds FRAME_PAYLOAD_BYTES_MAX: our own mistake."""
    if len(payload) > FRAME_PAYLOAD_BYTES_MAX:
        raise ValueError(f"a frame's payload has at most {FRAME_PAYLOAD_BYTES_MAX} bytes, not {len(payload)}")
    return b"".join(((len(payload) + 1).to_bytes(4, "big"), bytes((channel,)), payload))


class FrameDecoder:
    """Bytes in, frames out. It keeps at most one incomplete frame and what was fed last."""

    def __init__(self, *, frame_bytes_max: int) -> None:
        self._frame_bytes_max = frame_bytes_max
        self._buffer = bytearray()
        self._start = 0

    @property
    def buffered_bytes(self) -> int:
        """How many bytes are kept and not yet given out."""
        return len(self._buffer) - self._start

    @property
    def missing_bytes(self) -> int:
        """How many bytes the frame at the front still lacks, as far as is known: reading no more stops at its end."""
        have = self.buffered_bytes
        if have < 4:
            return 4 - have
        return max(0, 4 + int.from_bytes(self._buffer[self._start : self._start + 4], "big") - have)

    def feed(self, data: bytes | memoryview) -> None:
        """Take bytes from the network. Call next_frame until it returns None before feeding more."""
        if self._start:
            del self._buffer[: self._start]
            self._start = 0
        self._buffer += data

    def next_frame(self) -> Frame | None:
        """The next whole frame, or None until more bytes come.

        Raises FrameTooLarge or RemoteProtocolError as soon as a header says so; the decoder is then useless.
        """
        buffer, start = self._buffer, self._start
        if len(buffer) - start < 4:
            return None
        length = int.from_bytes(buffer[start : start + 4], "big")
        if length > self._frame_bytes_max:
            self._buffer = bytearray()
            self._start = 0
            raise FrameTooLarge(f"a frame of {length} bytes was announced; {self._frame_bytes_max} are allowed here")
        if length < 1:
            raise RemoteProtocolError("a frame without a channel")
        end = start + 4 + length
        if len(buffer) < end:
            return None
        with memoryview(buffer) as view:
            payload = bytes(view[start + FRAME_HEADER_BYTES : end])
        self._start = end
        return Frame(buffer[start + 4], payload)


# ---- the link's own messages ----------------------------------------------------------------------------------------

Version = Annotated[int, msgspec.Meta(ge=0, le=255)]
Attempt = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
WallMs = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
Text = Annotated[str, msgspec.Meta(max_length=64)]
Reason = Annotated[str, msgspec.Meta(max_length=REASON_BYTES_MAX)]
Features = Annotated[list[Annotated[str, msgspec.Meta(max_length=32)]], msgspec.Meta(max_length=FEATURES_MAX)]


class _LinkMessage(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Arrays with an integer tag; unknown trailing fields are ignored, so a later version may append."""


class Hello(_LinkMessage, frozen=True, tag=1):
    """The dialler's first words. `kind` 0 asks for the control link, 1 for a bulk stream under `grant`.

    `attempt` numbers the dials of this process, so that the other side can tell a given up dial from a new one.
    """

    version_min: Version
    version_max: Version
    features: Features
    node_id: Annotated[bytes, msgspec.Meta(min_length=NODE_ID_BYTES, max_length=NODE_ID_BYTES)]
    boot: Annotated[int, msgspec.Meta(ge=0, le=BOOT_MAX)]
    attempt: Attempt
    agent: Text
    kind: Annotated[int, msgspec.Meta(ge=0, le=1)]
    grant: Annotated[bytes, msgspec.Meta(max_length=GRANT_BYTES)] = b""
    purpose: Text = ""


class HelloOk(_LinkMessage, frozen=True, tag=2):
    """The other side's answer: the connection stands, in `version`. Nothing before it is to be believed.

    `attempt` is the highest number under which the answering node ever dialled: all those dials are given up.
    `wall_ms` is the answering node's clock, as in Pong.
    """

    version: Version
    features: Features
    boot: Annotated[int, msgspec.Meta(ge=0, le=BOOT_MAX)]
    attempt: Attempt
    agent: Text
    wall_ms: WallMs = 0


class Refused(_LinkMessage, frozen=True, tag=3):
    """No, and why. `code` is one of the agent's error codes or DUPLICATE; the range is what this node speaks."""

    code: Text
    message: Reason
    retryable: bool
    version_min: Version = PROTOCOL_VERSION_MIN
    version_max: Version = PROTOCOL_VERSION
    # To an evicted node alone, which has proven its key: the root's statement about it.
    tombstone: Annotated[bytes, msgspec.Meta(max_length=TOMBSTONE_BYTES_MAX)] = b""


class Ping(_LinkMessage, frozen=True, tag=4):
    """Are you there? Sent when nothing was heard for a while."""

    number: Attempt


class Pong(_LinkMessage, frozen=True, tag=5):
    """I am. Also sent unasked, number 0, by a node that has much to read and may not reach the Ping in it soon.

    `wall_ms` is the sender's clock (unix milliseconds) when it answers, so that clocks can be compared; 0: not told.
    """

    number: Attempt
    wall_ms: WallMs = 0


class IdleOffer(_LinkMessage, frozen=True, tag=6):
    """I have nothing to say and will say nothing until you answer: shall we hang up?"""


class IdleAgree(_LinkMessage, frozen=True, tag=7):
    """Yes: I will say nothing more on this connection. The offerer closes it."""


class IdleDecline(_LinkMessage, frozen=True, tag=8):
    """No, I still need it."""


class Farewell(_LinkMessage, frozen=True, tag=9):
    """I am closing this connection on purpose."""

    reason: Reason


LinkMessage = Hello | HelloOk | Refused | Ping | Pong | IdleOffer | IdleAgree | IdleDecline | Farewell

DUPLICATE: Final = "duplicate"
"""The code of a refusal that is no failure: another connection between the same two nodes survives."""

_decoder: Final[msgspec.msgpack.Decoder[LinkMessage]] = msgspec.msgpack.Decoder(LinkMessage)


def encode_link_message(message: LinkMessage) -> bytes:
    """The whole frame of one link message."""
    return encode_frame(Channel.LINK, msgspec.msgpack.encode(message))


def decode_link_message(payload: bytes) -> LinkMessage:
    """The message in a frame of channel LINK. Raises RemoteProtocolError on anything else."""
    if len(payload) > LINK_MESSAGE_BYTES_MAX:
        raise FrameTooLarge(f"a link message of {len(payload)} bytes; {LINK_MESSAGE_BYTES_MAX} are allowed")
    try:
        return _decoder.decode(payload)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise RemoteProtocolError(f"a link message that cannot be read: {error}") from error


# ---- decisions at HELLO ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Versions:
    """The inclusive range of protocol versions that a node speaks."""

    min: int = PROTOCOL_VERSION_MIN
    max: int = PROTOCOL_VERSION

    def __str__(self) -> str:
        return f"{self.min}" if self.min == self.max else f"{self.min} to {self.max}"


def agree(ours: Versions, theirs: Versions) -> int | None:
    """The highest version in both ranges, or None."""
    highest = min(ours.max, theirs.max)
    return highest if highest >= max(ours.min, theirs.min) else None


def refuse_versions(ours: Versions, theirs: Versions) -> Refused:
    """The refusal that names both ranges, in the words of the node that refuses."""
    older = "that node" if theirs.max < ours.min else "this node"
    return Refused(
        code="incompatible_version",
        message=f"This node speaks protocol version {ours}, the other {theirs}. Update meshnode on {older}.",
        retryable=False,
        version_min=ours.min,
        version_max=ours.max,
    )


def strange_for_its_version(ours: Versions, refused: Refused) -> bool:
    """Whether who refuses this node as no member speaks no version of its, and so hears of no admissions."""
    return refused.code == "not_a_member" and agree(ours, Versions(refused.version_min, refused.version_max)) is None


class Verdict(Enum):
    """What becomes of a dial that came in. OBSOLETE and DUPLICATE are both refusals."""

    ACCEPT = "accept"  # it becomes the link; a dial of our own is given up, a link that stood is replaced
    DUPLICATE = "duplicate"  # our own dial to this peer survives
    OBSOLETE = "obsolete"  # a dial that the peer itself gave up


@dataclass(frozen=True, slots=True)
class Standing:
    """A control link that stands: the peer's boot epoch and the highest of its dial numbers known to be done with."""

    boot: int
    attempt: int


def judge_dial(*, me: NodeId, peer: NodeId, hello: Hello, greeting: bool, standing: Standing | None) -> Verdict:
    """Which of two connections survives when both sides dial: the one dialled by the lower node id.

    `greeting` says that this node has sent its own HELLO to the peer and waits for the answer: only then is its dial
    known to work, so that a node which can be dialled but cannot dial is never refused for a dial that goes nowhere.
    Both sides come to the same verdict before a frame travels on either connection, so none is lost.
    """
    if standing is not None:
        known = (standing.boot, standing.attempt)
        return Verdict.ACCEPT if (hello.boot, hello.attempt) > known else Verdict.OBSOLETE
    if greeting and me < peer:
        return Verdict.DUPLICATE
    return Verdict.ACCEPT
