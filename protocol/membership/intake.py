"""Statements that links brought and that are still to be verified: bounded, taken a few at a time, in turn by peer.

A view is repaired by thousands of statements at once, and each costs a signature check. Taken in one go they would keep
this node from answering pings. To a node that returns to a large mesh hundreds of peers bring the same ones: what is no
news is passed over without being counted. A member that never stops telling news of itself is heard at a pace: at 64 in
each pause it took half a core of every node. What they mean is the machine's business.
"""

from collections import deque
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Final

from protocol.ids import NodeId
from protocol.wire.statements import Paces

INTAKE_SLICE: Final = 64  # statements verified in one go: some 5 ms
INTAKE_LOOKED_MAX: Final = 8192  # looked at for them, most of them no news: some 5 ms too
INTAKE_PAUSE_S: Final = 0.02
INTAKE_PER_PEER_MAX: Final = 4096  # statements waiting; what is over is dropped, and repaired later
INTAKE_BURST: Final = 4096  # verified of one peer as fast as that: a whole answer to an offer of views ...
INTAKE_PER_S: Final = 200  # ... and so many a second after it


class Intake:
    """Who brought what, in order."""

    def __init__(self) -> None:
        self._waiting: dict[NodeId, deque[bytes]] = {}
        # Kept when a link is lost: to open another must not be a way to be heard more.
        self._paces = Paces(per_s=INTAKE_PER_S, burst=INTAKE_BURST)
        self.dropped = 0

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def put(self, peer: NodeId, statements: Sequence[bytes]) -> None:
        """Queue what a peer brought, as far as there is room for it."""
        if not statements:
            return
        queue = self._waiting.setdefault(peer, deque())
        room = INTAKE_PER_PEER_MAX - len(queue)
        queue.extend(islice(statements, room))
        self.dropped += max(0, len(statements) - room)

    def take(self, is_held: Callable[[bytes], bool], now: float) -> list[tuple[NodeId, bytes]]:
        """The next INTAKE_SLICE at most, evenly from all peers: one that sends much delays only itself.

        `is_held`: whether this very statement changes nothing any more. `now`: monotonic seconds.
        """
        taken: dict[bytes, NodeId] = {}
        hasty: dict[NodeId, deque[bytes]] = {}  # whose turn comes again when their pace allows it
        looked = 0
        while self._waiting and len(taken) < INTAKE_SLICE and looked < INTAKE_LOOKED_MAX:
            share = max(1, (INTAKE_SLICE - len(taken)) // len(self._waiting))
            for peer in list(islice(self._waiting, INTAKE_SLICE - len(taken))):
                queue = self._waiting.pop(peer)
                for _ in range(min(share, len(queue))):
                    looked += 1
                    if not is_held(queue[0]) and queue[0] not in taken:
                        if not self._paces.admits(peer, now):
                            hasty[peer] = queue
                            break
                        taken[queue[0]] = peer
                    queue.popleft()
                if queue and peer not in hasty:
                    self._waiting[peer] = queue
        self._waiting.update(hasty)
        return [(peer, blob) for blob, peer in taken.items()]

    def forget(self, peer: NodeId) -> None:
        """The link is gone, or the peer: what it brought is not worth the work."""
        self._waiting.pop(peer, None)
