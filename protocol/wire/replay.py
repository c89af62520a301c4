"""The replay window of one sender: which (boot, sequence) pairs were already taken (RFC 4303 section 3.4.3, widened).

`fresh` asks and changes nothing; `commit` is called only after the datagram was verified, so that a forged huge
sequence number cannot move the window.
"""

from protocol.wire.limits import REPLAY_WINDOW

_MASK = (1 << REPLAY_WINDOW) - 1


class ReplayWindow:
    """One sender's window. `boot` only rises; within a boot, a sequence number passes once."""

    __slots__ = ("_seen", "boot", "highest")

    def __init__(self, boot: int = 0) -> None:
        self.boot = boot
        self.highest = -1
        self._seen = 0  # bit i: sequence `highest - i` was taken

    def fresh(self, boot: int, sequence: int) -> bool:
        """Whether this pair is new. Changes nothing."""
        if boot != self.boot:
            return boot > self.boot
        behind = self.highest - sequence
        return behind < 0 or (behind < REPLAY_WINDOW and not self._seen >> behind & 1)

    def commit(self, boot: int, sequence: int) -> None:
        """Take a pair that `fresh` allowed and whose datagram was verified."""
        if boot > self.boot:
            self.boot, self.highest, self._seen = boot, -1, 0
        ahead = sequence - self.highest
        if ahead > 0:
            self._seen = (self._seen << ahead | 1) & _MASK if ahead < REPLAY_WINDOW else 1
            self.highest = sequence
        else:
            self._seen |= 1 << -ahead
