"""What the records machine takes as commands and what it publishes, and its parameters."""

from dataclasses import dataclass
from typing import Final, Literal

from protocol.ids import NodeId
from protocol.records.record import Record

# ---- commands -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PutRecord:
    """Write a value. Answered in the same list of effects by RecordChanged or RecordRefused with this `token`."""

    collection: str
    key: bytes
    value: bytes
    token: int = 0


@dataclass(frozen=True, slots=True)
class DeleteRecord:
    """Delete a key, here or not: a deletion also wins over an older version that is still on its way."""

    collection: str
    key: bytes
    token: int = 0


@dataclass(frozen=True, slots=True)
class TakeRecord:
    """A record that a member brought in a call of its own. It passes what a pushed one passes, and is answered in the
    same list of effects by RecordTaken with this `token`.
    """

    peer: NodeId
    blob: bytes
    token: int = 0


# ---- published ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RecordChanged:
    """A version took its place here, written or learnt; stored before this is published."""

    collection: str
    key: bytes
    record: Record
    deleted: bool
    token: int = 0  # of the command, where one caused it


@dataclass(frozen=True, slots=True)
class RecordWithdrawn:
    """A record left without a successor: its author was evicted before it wrote it."""

    collection: str
    key: bytes


Refusal = Literal[
    "unknown_collection", "too_large", "not_allowed", "not_a_member", "full", "overloaded", "never_deleted", "outranked"
]
"""`outranked`: what is here counts for more by the collection's order, or is the very same."""


@dataclass(frozen=True, slots=True)
class RecordRefused:
    """A command was not carried out; nothing changed. `overloaded` may succeed later, the others as they are not."""

    collection: str
    key: bytes
    reason: Refusal
    token: int = 0


Verdict = Literal[
    "applied",
    "known",
    "older",
    "held",
    "malformed",
    "unknown_collection",
    "too_large",
    "stranger",
    "evicted",
    "not_allowed",
    "bad_signature",
    "full",
    "overloaded",
]
"""What becomes of a record that somebody brings. `applied`, `known` and `older`: this node holds it, or one of its key
that counts for more. `held`: it is ahead of this node's clock, and waits in memory.
"""

TAKEN: Final[frozenset[str]] = frozenset({"applied", "known", "older"})
"""Verdicts after which this node holds what was offered, or something that counts for more."""


@dataclass(frozen=True, slots=True)
class RecordTaken:
    """Answers TakeRecord, once all is durable that was written before. `muted` and `busy`: it was not even read, as
    whoever brought it sent what no correct node sends, or more than its share.
    """

    verdict: Verdict | Literal["muted", "busy"]
    token: int = 0

    @property
    def holds(self) -> bool:
        """Whether this node holds it now, or one that counts for more."""
        return self.verdict in TAKEN


@dataclass(frozen=True, slots=True)
class RecordHeld:
    """A record is further ahead of this node's clock than the bound: it waits, neither applied nor passed on."""

    collection: str
    key: bytes
    author: NodeId
    ahead_s: float


@dataclass(frozen=True, slots=True)
class ClockContradicted:
    """This node holds records from a time that its clock has not reached: it is wrong now, or was when it took them."""

    records: int
    ahead_s: float  # of the farthest


@dataclass(frozen=True, slots=True)
class ClockAgrees:
    """After ClockContradicted: no record here is from the future any more; time has come for it, or it was replaced."""


@dataclass(frozen=True, slots=True)
class PeerMuted:
    """A peer sent what no correct node sends, again and again: its record messages are ignored for a while."""

    peer: NodeId
    for_s: float


@dataclass(frozen=True, slots=True)
class RepairCompleted:
    """This node compared everything with a peer and both now hold the same, as far as both accept it."""

    peer: NodeId
    learnt: int
    sent: int
    round_trips: int


# ---- parameters -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RecordsParams:
    """Times in seconds, sizes in bytes."""

    drift_bound_s: float = 300.0
    fanout: int = 3
    push_delay_s: float = 0.03
    push_frame_bytes_max: int = 256 * 1024
    push_bytes_per_s: int = 4 * 1024 * 1024  # beyond it, repair carries the rest
    repair_interval_s: float = 10.0
    repair_interval_min_s: float = 3.0  # at two nodes; grows by a tenth of a second per peer
    repair_eager_delay_s: float = 0.2  # after a peer came up; at 100 nodes twice that, at 200 three times
    repair_eager_max: int = 8  # peers waiting for such a repair; and how many of a mesh hurry to one that came up
    step_timeout_s: float = 10.0
    session_s_max: float = 900.0
    transfer_bytes_max: int = 256 * 1024
    transfer_records_max: int = 256
    bucket_entries_max: int = 512  # a bucket with more is compared in parts
    serve_bytes_per_s: int = 16 * 1024 * 1024  # what one peer may make this node send and check
    held_records_max: int = 256
    held_bytes_max: int = 1024 * 1024
    unstored_bytes_max: int = 32 * 1024 * 1024  # written, but the disk has not confirmed
    forgotten_max: int = 8192
    offences_max: int = 32  # in offence_window_s; then the peer is muted
    offence_window_s: float = 60.0
    mute_s: float = 60.0
    housekeeping_interval_s: float = 1.0  # only while something waits
