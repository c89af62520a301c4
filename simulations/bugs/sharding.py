"""Bugs in sessions over stages and in the loading of models."""

from dataclasses import replace
from typing import Any

from protocol.sharding import session
from protocol.sharding.events import CancelSession
from protocol.sharding.loading import LoadingMachine
from protocol.sharding.selftests import Findings
from protocol.sharding.session import STEM_BYTES, Session
from protocol.sharding.tending import Tending
from simulations.bugs.bug import Bug, Patches
from simulations.sharding.fabric import VERSIONS


def _gaps_swallowed(patches: Patches) -> None:
    def received(self: Any, event: Any, now: float) -> None:
        original(self, replace(event, index=min(event.index, len(self.tokens))), now)

    original = patches.set(Session, "_received", received)


def _nonsense_believed(patches: Patches) -> None:
    patches.set(session, "nonsense", lambda event, tokens, bounds: "")


def _late_frames_believed(patches: Patches) -> None:
    def concerns(self: Any, peer: Any, named: bytes, *, last: bool | None) -> bool:
        is_mine = named[:STEM_BYTES] == self._stem
        return bool(original(self, peer, self.id if is_mine else named, last=last))

    original = patches.set(Session, "_concerns", concerns)


def _hang_not_noticed(patches: Patches) -> None:
    def fired(self: Any, name: str, now: float) -> None:
        if name != "silence":
            original(self, name, now)

    original = patches.set(Session, "_fired", fired)


def _cancel_not_sent(patches: Patches) -> None:
    def close(self: Any) -> None:
        original(self)
        self._out[:] = [effect for effect in self._out if not isinstance(effect, CancelSession)]

    original = patches.set(Session, "_close", close)


def _load_not_joined(patches: Patches) -> None:
    def asked(self: Any, event: Any, now: float) -> None:
        original(self, event, now)
        if self.is_coordinator:
            self._tending.begin(event.request, now)

    original = patches.set(LoadingMachine, "_asked", asked)


def _orphans_kept(patches: Patches) -> None:
    def sweep(self: Any, now: float) -> None:
        strays = dict(self._s.strays)
        self._s.strays.clear()
        original(self, now)
        self._s.strays.update(strays)

    original = patches.set(LoadingMachine, "_sweep", sweep)


def _kept_for_ever(patches: Patches) -> None:
    def look_after(self: Any, held: Any, now: float) -> None:
        if held.state == "ready":
            held.used_at = now
        original(self, held, now)

    original = patches.set(Tending, "look_after", look_after)


def _result_of_another_pair_believed(patches: Patches) -> None:
    def agreeing(self: Any, shape: Any) -> frozenset[tuple[str, str]]:
        if not original(self, shape):
            return frozenset()
        versions = {version for pair in self.differences for version in (pair.one, pair.other)} | set(VERSIONS)
        return frozenset((one, other) for one in versions for other in versions if one < other)

    original = patches.set(Findings, "agreeing", agreeing)


def sharding_bugs() -> tuple[Bug, ...]:
    """All bugs of this file."""
    return (
        Bug("gaps-swallowed", "tokens that were left out are not missed", _gaps_swallowed, "sharding", pattern="lie"),
        Bug("nonsense-believed", "whatever a last stage sends is part of the answer", _nonsense_believed, "sharding"),
        Bug(
            "late-frames-believed",
            "frames of an earlier try count for the present one",
            _late_frames_believed,
            "sharding",
        ),
        Bug(
            "hang-not-noticed",
            "a session waits for ever for a stage that stands still",
            _hang_not_noticed,
            "sharding",
            pattern="hang",
        ),
        Bug(
            "cancel-not-sent",
            "stages go on for a client that is gone",
            _cancel_not_sent,
            "sharding",
            pattern="quiet",
        ),
        Bug("load-not-joined", "every request loads the model for itself", _load_not_joined, "sharding"),
        Bug(
            "orphans-kept",
            "stages that an earlier coordinator left half-loaded are never let go",
            _orphans_kept,
            "sharding",
        ),
        Bug(
            "result-of-another-pair-believed",
            "once two versions were found to agree, all are taken to",
            _result_of_another_pair_believed,
            "sharding",
        ),
        Bug("kept-for-ever", "idle pipelines are never unloaded", _kept_for_ever, "sharding"),
    )
