"""Bugs in keys and evictions."""

from typing import Any

from protocol.membership.machine import Membership
from protocol.trust.keyring import Keyring
from simulations.bugs.bug import Bug, Patches


def _never_fetches(patches: Patches) -> None:
    patches.set(Keyring, "_unknown_key", lambda self, sender, key_id, now: [])
    patches.set(Keyring, "_link_opened", lambda self, peer, now: [])
    patches.set(Keyring, "_peer_up", lambda self, peer, now: [])


def _drops_at_once(patches: Patches) -> None:
    def learn(self: Any, key: Any, source: Any, now: float) -> Any:
        for held in self._held.values():
            held.retire_at = now
        return original(self, key, source, now)

    original = patches.set(Keyring, "_learn", learn)


def _keeps_its_own(patches: Patches) -> None:
    def granted(self: Any, peer: Any, grant: Any, now: float, wall: float) -> Any:
        if self._newest is not None and grant.epoch <= self._newest.value.epoch:
            return []  # two keys of one epoch: each side stays with the one it has
        return original(self, peer, grant, now, wall)

    original = patches.set(Keyring, "_granted", granted)


def _evicted_stays_listed(patches: Patches) -> None:
    patches.set(Membership, "_forget", lambda self, peer: None)


def trust_bugs() -> tuple[Bug, ...]:
    """All bugs of this file."""
    return (
        Bug(
            "key-never-fetched", "who was away during a rotation never gets the new key", _never_fetches, "rotation", 16
        ),
        Bug(
            "old-key-dropped-at-once",
            "the old key is dropped before the others use the new one",
            _drops_at_once,
            "rotation",
            16,
        ),
        Bug(
            "each-side-keeps-its-key",
            "of two keys minted at once, each side keeps its own",
            _keeps_its_own,
            "rotation",
            16,
        ),
        Bug("evicted-stays-listed", "an eviction does not take the node out of the views", _evicted_stays_listed),
    )
