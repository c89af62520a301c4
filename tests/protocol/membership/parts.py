"""One membership machine among members that the test plays: feeds it, keeps its timers, runs its time."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from random import Random

from protocol.effects import CancelTimer, Effect, LinkReceived, Packet, SetTimer, TimerFired, TimerKey
from protocol.ids import Address, NodeId
from protocol.membership.broadcasts import Broadcasts
from protocol.membership.events import MembershipInput, StatementReceived
from protocol.membership.machine import Membership
from protocol.membership.parameters import LAN, Parameters
from protocol.wire.messages import Ack, Ping
from protocol.wire.statements import Stated
from tests.support.hub import BOOT, Mesh, address_of, sends

STEADY: Parameters = replace(LAN, verifiers=0, stall_s=1e9, report_age_s=0.0)
"""Nobody probes a suspect of its own accord and silence between events means nothing: for tables of single steps."""


class Subject:
    """Node 0 of a mesh. Timers are kept, not fired; `run` fires them in order."""

    def __init__(
        self,
        size: int,
        *,
        params: Parameters = STEADY,
        seed: int = 1,
        durable: Mapping[bytes, bytes] | None = None,
        contacts: Mapping[NodeId, Address] | None = None,
        start: bool = True,
    ) -> None:
        self.mesh = Mesh(size)
        self.now = 1000.0
        self.timers: dict[TimerKey, float] = {}
        self.machine = Membership(
            me=self.mesh.id(0),
            boot=BOOT,
            roster=self.mesh.roster,
            rng=Random(seed),
            codec=self.mesh.codec(0),
            params=params,
            durable=durable or {},
            addresses=(address_of(0),),
            contacts=contacts,
        )
        self.started: list[Effect] = []
        if start:
            self.started = self._keep(self.machine.start(self.now, 0.0))

    # ---- feeding ----

    def _keep(self, effects: list[Effect]) -> list[Effect]:
        for effect in effects:
            if isinstance(effect, SetTimer):
                self.timers[effect.key] = effect.at
            elif isinstance(effect, CancelTimer):
                self.timers.pop(effect.key, None)
        return effects

    def give(self, event: MembershipInput, after_s: float = 0.0) -> list[Effect]:
        self.now += after_s
        return self._keep(self.machine.handle(event, self.now, 0.0))

    def told(self, stated: Stated, via: int = 1) -> list[Effect]:
        return self.give(StatementReceived(self.mesh.id(via), stated))

    def packet(self, sender: int, *messages: object, source: Address | None = None) -> list[Effect]:
        return self.give(Packet(self.mesh.id(sender), source or address_of(sender), messages))

    def linked(self, peer: int, message: object) -> list[Effect]:
        return self.give(LinkReceived(self.mesh.id(peer), message))

    def know(self, *indices: int) -> None:
        """These members are up and their news has been told on."""
        for index in indices:
            self.told(self.mesh.alive(index), via=index)
        self.machine._s.broadcasts = Broadcasts()

    def hear(self, *indices: int) -> None:
        """These members were just heard from."""
        for index in indices:
            self.packet(index)

    # ---- time ----

    def fire(self, *key: str | int) -> list[Effect]:
        """Let this timer come due, exactly on time."""
        full = ("membership", *key)
        self.now = max(self.now, self.timers.pop(full))
        return self.give(TimerFired(full))

    def run(self, seconds: float, *, answering: Sequence[int] = ()) -> list[Effect]:
        """Fire what comes due in order; these members answer pings at once. All effects."""
        end, effects = self.now + seconds, list[Effect]()
        while self.timers:
            key, at = min(self.timers.items(), key=lambda pair: pair[1])
            if at > end:
                break
            self.now = max(self.now, at)
            del self.timers[key]
            made = self.give(TimerFired(key))
            effects += made
            for to, ping, _ in sends(made, Ping):
                if self.mesh.number(to) in answering:
                    effects += self.packet(self.mesh.number(to), Ack(ping.probe, self.digest))
        self.now = end
        return effects

    # ---- asking ----

    @property
    def digest(self) -> bytes:
        return self.machine.view.digest.to_bytes(8, "big")

    def up(self) -> set[int]:
        return {self.mesh.number(node) for node in self.machine.view.up}

    def down(self) -> set[int]:
        return {self.mesh.number(node) for node in self.machine.view.down}

    def probe_of(self, target: int, effects: Sequence[Effect]) -> int:
        """The number of the one ping to this member."""
        numbers = {ping.probe for to, ping, _ in sends(effects, Ping) if to == self.mesh.id(target)}
        assert len(numbers) == 1, effects
        return numbers.pop()

    def start_probe(self, target: int) -> tuple[int, list[Effect]]:
        """Let the machine probe until it is this member's turn; its number and the effects."""
        for _ in range(4 * self.mesh.size):
            effects = self.fire("probe")
            for to, ping, _ in sends(effects, Ping):
                if to == self.mesh.id(target):
                    return ping.probe, effects
                self.packet(self.mesh.number(to), Ack(ping.probe, self.digest))
        raise AssertionError("its turn never came")
