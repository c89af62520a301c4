"""How each peer behaves: what it may make this node do, and when it is no longer listened to."""

from collections import Counter
from dataclasses import dataclass, field

from protocol.effects import Effect, Publish
from protocol.ids import NodeId
from protocol.records.events import PeerMuted, RecordsParams


@dataclass(slots=True)
class _Peer:
    tokens: float
    refilled_at: float
    offences: list[float] = field(default_factory=list)
    muted_until: float = 0.0


class Conduct:
    """A bucket of work and a list of offences per peer, and the counters of all."""

    def __init__(self, params: RecordsParams) -> None:
        self._params = params
        self._peers: dict[NodeId, _Peer] = {}
        self.counters: Counter[str] = Counter()

    def is_muted(self, peer: NodeId, now: float) -> bool:
        """Whether its messages are ignored."""
        known = self._peers.get(peer)
        return known is not None and known.muted_until > now

    def offend(self, peer: NodeId, what: str, now: float, out: list[Effect]) -> None:
        """Count an offence; too many of them in a while mute the peer."""
        self.counters[what] += 1
        known = self._peer(peer, now)
        since = now - self._params.offence_window_s
        known.offences = [at for at in known.offences if at > since][-self._params.offences_max :]
        known.offences.append(now)
        if len(known.offences) >= self._params.offences_max:
            out.append(Publish(PeerMuted(peer, self._params.mute_s)))
            known.muted_until = now + self._params.mute_s
            known.offences.clear()
            self.counters["muted"] += 1

    def wait_s(self, peer: NodeId, now: float) -> float:
        """0 if the peer may ask for work now, else in how many seconds."""
        known = self._peer(peer, now)
        rate = self._params.serve_bytes_per_s
        known.tokens = min(float(rate), known.tokens + (now - known.refilled_at) * rate)
        known.refilled_at = now
        return 0.0 if known.tokens > 0 else max(0.01, -known.tokens / rate)

    def spend(self, peer: NodeId, cost: float, now: float) -> None:
        """Charge work done; the bucket may fall below zero once."""
        self._peer(peer, now).tokens -= cost

    def forget(self, members: set[NodeId]) -> None:
        """Keep only what concerns members."""
        self._peers = {peer: known for peer, known in self._peers.items() if peer in members}

    def _peer(self, peer: NodeId, now: float) -> _Peer:
        known = self._peers.get(peer)
        if known is None:
            known = self._peers[peer] = _Peer(float(self._params.serve_bytes_per_s), now)
        return known
