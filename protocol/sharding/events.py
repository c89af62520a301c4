"""What the session machine is told and what it asks for, beside the inputs and effects that all machines share.

Frames of stages come as events with the peer whose link proved it; frames.py has their bytes. The events and effects of
loading are in pipelines.py.
"""

from dataclasses import dataclass
from typing import Final

from protocol.effects import CancelTimer, SetTimer, TimerFired
from protocol.ids import NodeId
from protocol.membership.events import PeerDown, PeerLeft
from protocol.sharding.pipelines import Answer

FINISH_NONE: Final = 0
FINISH_EOG: Final = 1
FINISH_LENGTH: Final = 2
FINISH_ERROR: Final = 3

# ---- inputs ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class EnsureAnswered:
    """The coordinator answered the Ensure of this number."""

    ask: int
    answer: Answer


@dataclass(frozen=True, slots=True)
class EnsureFailed:
    """The Ensure of this number came to nothing: no coordinator is known, or it did not answer."""

    ask: int
    words: str


@dataclass(frozen=True, slots=True)
class SessionAccepted:
    """ACCEPTED. Comes again when a queued session begins."""

    peer: NodeId
    session: bytes
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class SessionRefused:
    """REFUSED."""

    peer: NodeId
    session: bytes
    code: str
    words: str


@dataclass(frozen=True, slots=True)
class PiecesReceived:
    """PIECES. `details` are the alternatives of each token, as they came; the machine only hands them on."""

    peer: NodeId
    session: bytes
    index: int
    tokens: tuple[int, ...]
    pieces: tuple[bytes, ...]
    finish: int = FINISH_NONE
    details: tuple[object, ...] = ()


@dataclass(frozen=True, slots=True)
class StageErred:
    """ERROR for this session. `stage`: whom the sender blames, by index."""

    peer: NodeId
    session: bytes
    code: str
    words: str
    stage: int | None = None


@dataclass(frozen=True, slots=True)
class StageAlive:
    """The agent of this stage shows life; it watches over its engine, which may take long for a step."""

    peer: NodeId


@dataclass(frozen=True, slots=True)
class StreamLost:
    """The stream on which this peer's frames came, or ours went, is gone."""

    peer: NodeId
    words: str


@dataclass(frozen=True, slots=True)
class ClientLeft:
    """Nobody waits for the answer any more."""


@dataclass(frozen=True, slots=True)
class StopFound:
    """A stop string stands in what was emitted: the answer is complete."""


SessionInput = (
    EnsureAnswered
    | EnsureFailed
    | SessionAccepted
    | SessionRefused
    | PiecesReceived
    | StageErred
    | StageAlive
    | StreamLost
    | PeerDown
    | PeerLeft
    | ClientLeft
    | StopFound
    | TimerFired
)

# ---- effects --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Ensure:
    """Ask the coordinator for a pipeline; answered by EnsureAnswered or EnsureFailed with the same number.

    `without`: nodes that this session has reason to avoid. `complaint`: the pipeline that failed it, and how.
    """

    ask: int
    model: str
    context: int
    without: tuple[NodeId, ...] = ()
    complaint: tuple[bytes, str] | None = None
    stages_min: int = 1
    engine: str = ""


@dataclass(frozen=True, slots=True)
class OpenSession:
    """Send OPEN to the first stage, with what was generated so far."""

    to: NodeId
    session: bytes
    pipeline: bytes
    prompt: tuple[int, ...]
    generated: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class CancelSession:
    """Send CANCEL to the first stage."""

    to: NodeId
    session: bytes


@dataclass(frozen=True, slots=True)
class Emit:
    """These tokens, each exactly once and in order, are part of the answer."""

    index: int
    tokens: tuple[int, ...]
    pieces: tuple[bytes, ...]
    details: tuple[object, ...] = ()


@dataclass(frozen=True, slots=True)
class Progressed:
    """For whoever waits: what is being done instead of generating. `share` 0..1 where it is known."""

    stage: str  # planning, loading, recovering, ...
    words: str
    share: float | None = None


@dataclass(frozen=True, slots=True)
class Accuse:
    """This peer did what no honest one does; count it, log it, and drop its stream."""

    peer: NodeId
    words: str


@dataclass(frozen=True, slots=True)
class Finish:
    """The end, and a good one: stop (end of generation or a stop string), length, or cancelled."""

    reason: str
    tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class Fail:
    """The end, and no good one; `code` is one of the agent's error codes."""

    code: str
    words: str
    retryable: bool


SessionEffect = (
    Ensure | OpenSession | CancelSession | Emit | Progressed | Accuse | Finish | Fail | SetTimer | CancelTimer
)
