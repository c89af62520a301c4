"""Control links between computers: set-up that takes time, ordered reliable frames, and the ways in which they break.

It stands for TCP, TLS and the agent's link pool: one link per pair, made when the first frame wants to go, lost when a
path stays cut for too long, when a process dies, or when a side closes it. Frames on the way may be lost with it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from protocol.effects import FrameReceived, LinkLost, LinkOpened, NetworkInput
from protocol.ids import NodeId
from simulations.computer import DOWN, Computer

if TYPE_CHECKING:
    from simulations.world import World

FRAME_OVERHEAD_BYTES: Final = 4 + 1 + 22  # length, channel, one TLS 1.3 record
HANDSHAKE_BYTES: Final = 1500  # each way: TLS 1.3 with a certificate on both sides, then HELLO

CONNECTING: Final = 0
OPEN: Final = 1
GONE: Final = 2


@dataclass(frozen=True, slots=True)
class LinkParams:
    """Times in seconds."""

    connect_timeout_s: float = 12.0
    handshake_s: float = 0.004
    broken_after_s: float = 12.0  # pings every 5 s stay unanswered
    idle_s: float = 120.0
    retry_s: float = 0.2  # first retransmission; doubles


class Link:
    """One link of a pair; its two directions are numbered by the index of the sender."""

    __slots__ = ("arrival", "dialler", "idle_at", "other", "runs", "stalled_since", "state", "waiting")

    def __init__(self, dialler: Computer, other: Computer) -> None:
        self.dialler = dialler
        self.other = other
        self.runs = {dialler.index: dialler.run, other.index: other.run}
        self.state = CONNECTING
        self.waiting: dict[int, list[bytes]] = {dialler.index: [], other.index: []}
        self.arrival = {dialler.index: 0.0, other.index: 0.0}
        self.stalled_since: dict[int, float] = {}
        self.idle_at = 0.0

    def peer_of(self, computer: Computer) -> Computer:
        """The other end."""
        return self.other if computer is self.dialler else self.dialler


class Links:
    """All control links of one world."""

    __slots__ = ("_links", "_params", "_taps", "_world", "opened")

    def __init__(self, world: "World", params: LinkParams) -> None:
        self._world = world
        self._params = params
        self._links: dict[tuple[int, int], Link] = {}
        self._taps: list[Callable[[Computer, bytes], None]] = []
        self.opened = 0

    def tap(self, tap: Callable[[Computer, bytes], None]) -> None:
        """Call `tap(source, data)` for every frame that leaves."""
        self._taps.append(tap)

    def untap(self, tap: Callable[[Computer, bytes], None]) -> None:
        """Undo one `tap`."""
        self._taps.remove(tap)

    def __len__(self) -> int:
        return len(self._links)

    def send(self, source: Computer, to: NodeId, data: bytes) -> None:
        """Queue one frame, dialling if there is no link."""
        target = self._world.find(to)
        if target is None or target is source:
            self._tell(source, source.run, LinkLost(to, "no known address answers"))
            return
        link = self._links.get(_pair(source, target))
        if link is None:
            link = self._dial(source, target)
        link.waiting[source.index].append(data)
        if link.state == OPEN and source.index not in link.stalled_since:
            self._flush(link, source)

    def close(self, source: Computer, to: NodeId, reason: str) -> None:
        """Cut the link from this side; the other side hears of it, unless the path is cut."""
        target = self._world.find(to)
        link = None if target is None else self._links.get(_pair(source, target))
        if link is not None and target is not None:
            self._end(link)
            if link.state == OPEN or link.dialler is target:
                self._tell_later(link, target, source, f"closed by peer: {reason}")
            link.state = GONE

    def drop_computer(self, computer: Computer, *, silent: bool) -> None:
        """A process is gone. Its kernel resets its connections, unless the plug was pulled (`silent`)."""
        for link in [self._links[pair] for pair in sorted(self._links) if computer.index in pair]:
            self._end(link)
            peer = link.peer_of(computer)
            if link.state == OPEN or link.dialler is peer:
                if silent:
                    lost = LinkLost(computer.node_id, "no answer to keep-alives")
                    self._tell_in(self._params.broken_after_s, peer, link.runs[peer.index], lost)
                else:
                    self._tell_later(link, peer, computer, "reset by peer")
            link.state = GONE

    # ---- set-up ---------------------------------------------------------------------------------------------------

    def _dial(self, source: Computer, target: Computer) -> Link:
        link = self._links[_pair(source, target)] = Link(source, target)
        self._world.after(self._world.network.delay() * 2, self._try, link, self._world.now)
        return link

    def _try(self, link: Link, since: float) -> None:
        if link.state != CONNECTING:
            return
        world, source, target = self._world, link.dialler, link.other
        if world.now - since > self._params.connect_timeout_s:
            self._fail(link, "connecting timed out")
        elif not (world.network.open(source, target) and world.network.open(target, source)) or target.paused:
            # A lost SYN comes again after a second; a frozen process leaves the handshake hanging.
            world.after(0.5, self._try, link, since)
        elif target.machine is None:
            self._fail(link, "connection refused")
        elif not target.program.accepts(target.machine, source.node_id):
            shown = target.program.tombstone(target.machine, source.node_id)
            self._fail(link, "refused: not a member", "evicted" if shown else "not_a_member", shown)
        elif any(self._is_open(target, twin) and _boot(twin) > _boot(source) for twin in world.copies(source)):
            self._fail(link, "refused: a newer link under that key stands", "conflict")
        else:
            link.runs[target.index] = target.run
            delay = self._params.handshake_s + world.network.delay() * 4
            world.after(delay, self._established, link, target.run)

    def _established(self, link: Link, run: int) -> None:
        if link.state != CONNECTING:
            return
        source, target = link.dialler, link.other
        if target.run != run or target.machine is None or source.machine is None:
            self._fail(link, "reset in the handshake")
            return
        link.state = OPEN
        self.opened += 1
        for one, other in ((source, target), (target, source)):
            one.link_sent_bytes += HANDSHAKE_BYTES
            for twin in self._world.copies(other):
                self._replace(one, twin)
            assert other.machine is not None  # checked above, before anything was told
            one.input(LinkOpened(other.node_id, other.program.boot_epoch(other.machine)))
            if link.state != OPEN:
                return
        self._flush(link, source)
        self._flush(link, target)
        link.idle_at = self._world.now + self._params.idle_s
        self._world.after(self._params.idle_s, self._idle, link)

    def _is_open(self, one: Computer, other: Computer) -> bool:
        link = self._links.get(_pair(one, other))
        return link is not None and link.state == OPEN

    def _replace(self, one: Computer, twin: Computer) -> None:
        """Another computer has just linked under the twin's key: an agent holds one link for each key."""
        link = self._links.get(_pair(one, twin))
        if link is not None and link.state == OPEN:
            self._end(link)
            link.state = GONE
            one.input(LinkLost(twin.node_id, "replaced by a newer link"))
            self._tell_later(link, twin, one, "closed by peer: replaced")

    def _fail(self, link: Link, reason: str, code: str = "", tombstone: bytes = b"") -> None:
        self._end(link)
        link.state = GONE
        for one in (link.dialler, link.other):
            # Whoever queued frames for the peer must learn that they did not go.
            if one is link.dialler or link.waiting[one.index]:
                self._tell(one, link.runs[one.index], LinkLost(link.peer_of(one).node_id, reason, code, tombstone))

    # ---- frames ---------------------------------------------------------------------------------------------------

    def _flush(self, link: Link, source: Computer) -> None:
        waiting = link.waiting[source.index]
        if not waiting or link.state != OPEN:
            return
        world, target = self._world, link.peer_of(source)
        if not world.network.open(source, target) or not world.network.open(target, source):
            link.stalled_since.setdefault(source.index, world.now)
            world.after(self._params.retry_s, self._retry, link, (source, self._params.retry_s))
            return
        link.stalled_since.pop(source.index, None)
        link.idle_at = world.now + self._params.idle_s
        for data in waiting:
            size = len(data) + FRAME_OVERHEAD_BYTES
            source.link_sent_bytes += size
            for tap in self._taps:
                tap(source, data)
            delay = world.network.delay() + size * 8e-9  # a gigabit a second
            loss = world.network.params.loss + source.loss + target.loss
            if loss and source.rng.random() < loss:
                delay += self._params.retry_s
            arrival = max(world.now + delay, link.arrival[source.index])
            link.arrival[source.index] = arrival
            world.push(arrival, self._arrive, link, (source, data))
        waiting.clear()

    def _arrive(self, link: Link, frame: tuple[Computer, bytes]) -> None:
        source, data = frame
        target = link.peer_of(source)
        if link.state == OPEN and target.run == link.runs[target.index] and target.state != DOWN:
            target.input(FrameReceived(source.node_id, data))

    def _retry(self, link: Link, attempt: tuple[Computer, float]) -> None:
        source, pause = attempt
        if link.state != OPEN:
            return
        target = link.peer_of(source)
        if self._world.network.open(source, target) and self._world.network.open(target, source):
            self._flush(link, source)
        elif self._world.now - link.stalled_since[source.index] > self._params.broken_after_s:
            self._end(link)
            link.state = GONE
            for one in (source, target):
                lost = LinkLost(link.peer_of(one).node_id, "no acknowledgement")
                self._tell(one, link.runs[one.index], lost)
        else:
            pause = min(pause * 2, 3.0)
            self._world.after(pause, self._retry, link, (source, pause))

    def _idle(self, link: Link) -> None:
        if link.state != OPEN:
            return
        if link.idle_at > self._world.now:
            self._world.at(link.idle_at, self._idle, link)
            return
        self._end(link)
        link.state = GONE
        for one in (link.dialler, link.other):
            self._tell(one, link.runs[one.index], LinkLost(link.peer_of(one).node_id, "idle"))

    # ---- endings --------------------------------------------------------------------------------------------------

    def _end(self, link: Link) -> None:
        self._links.pop(_pair(link.dialler, link.other), None)

    def _tell(self, computer: Computer, run: int, event: NetworkInput) -> None:
        """Never within the call that caused it: a driver's failures come back as later inputs."""
        self._tell_in(0.0, computer, run, event)

    def _tell_later(self, link: Link, computer: Computer, source: Computer, reason: str) -> None:
        is_open = self._world.network.open(source, computer)
        delay = self._world.network.delay() if is_open else self._params.broken_after_s
        self._tell_in(delay, computer, link.runs[computer.index], LinkLost(source.node_id, reason))

    def _tell_in(self, delay: float, computer: Computer, run: int, event: NetworkInput) -> None:
        self._world.after(delay, self._deliver, computer, (run, event))

    def _deliver(self, computer: Computer, told: tuple[int, NetworkInput]) -> None:
        run, event = told
        if computer.run == run:
            computer.input(event)


def _boot(computer: Computer) -> int:
    return 0 if computer.machine is None else computer.program.boot_epoch(computer.machine)


def _pair(one: Computer, other: Computer) -> tuple[int, int]:
    return (one.index, other.index) if one.index < other.index else (other.index, one.index)
