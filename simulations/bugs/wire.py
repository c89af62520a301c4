"""Bugs in the datagram layer: replays, nonces, keys that fit too many, forged statements."""

from typing import Any

from protocol.wire.datagram import DatagramCodec
from protocol.wire.replay import ReplayWindow
from protocol.wire.statements import StatementCodec
from simulations.bugs.bug import Bug, Patches
from simulations.suite import SimSuite


def _window_forgets(patches: Patches) -> None:
    patches.set(ReplayWindow, "commit", lambda self, boot, sequence: None)


def _window_moves_unverified(patches: Patches) -> None:
    def fresh(self: Any, boot: int, sequence: int) -> bool:
        is_fresh = bool(original(self, boot, sequence))
        if is_fresh:
            self.commit(boot, sequence)
        return is_fresh

    original = patches.set(ReplayWindow, "fresh", fresh)


def _any_sequence_passes(patches: Patches) -> None:
    patches.set(ReplayWindow, "fresh", lambda self, boot, sequence: boot >= self.boot)


def _key_without_receiver_boot(patches: Patches) -> None:
    def pair_key(self: Any, gossip: bytes, public: bytes, sender: Any, receiver: Any, boot: int) -> Any:
        return original(self, gossip, public, sender, receiver, 0)

    original = patches.set(SimSuite, "pair_key", pair_key)


def _one_key_for_all(patches: Patches) -> None:
    patches.set(SimSuite, "pair_key", lambda self, gossip, public, sender, receiver, boot: gossip[:8])


def _nonce_used_twice(patches: Patches) -> None:
    def seal(self: Any, to: Any, messages: Any) -> Any:
        if self._sequence % 64 == 63:
            self._sequence -= 1
        return original(self, to, messages)

    original = patches.set(DatagramCodec, "seal", seal)


def _statements_unverified(patches: Patches) -> None:
    def unverified(self: Any, blob: bytes, *brought: Any, **named: Any) -> Any:
        suite = self._suite
        self._suite = _Gullible()
        try:
            return original(self, blob, *brought, **named)
        finally:
            self._suite = suite

    original = patches.set(StatementCodec, "open", unverified)


class _Gullible:
    def verify(self, public_key: bytes, domain: bytes, body: bytes, signature: bytes) -> bool:
        """Believes everything."""
        return True


def _datagram_unverified(patches: Patches) -> None:
    patches.set(SimSuite, "open", lambda self, key, nonce, aad, ciphertext: ciphertext[:-16])


def wire_bugs() -> tuple[Bug, ...]:
    """All bugs of this file."""
    return (
        Bug("window-forgets", "the replay window never notes what it has seen", _window_forgets, "replay"),
        Bug(
            "window-moves-unverified",
            "the replay window moves before the datagram is verified",
            _window_moves_unverified,
            "replay",
        ),
        Bug("any-sequence-passes", "within a boot, any sequence number passes", _any_sequence_passes, "replay"),
        Bug(
            "key-without-receiver-boot",
            "the pairwise key does not depend on the receiver's boot, so that old traffic opens after a restart",
            _key_without_receiver_boot,
            "replay",
        ),
        Bug(
            "one-key-for-all",
            "every pair has the same key, so that a datagram opens anywhere",
            _one_key_for_all,
            "replay",
        ),
        Bug("nonce-used-twice", "every 64th datagram reuses the nonce of the one before", _nonce_used_twice),
        Bug("statements-unverified", "signatures of statements are not checked", _statements_unverified, "replay"),
        Bug("tag-unverified", "a datagram's tag is not checked", _datagram_unverified, "replay"),
    )
