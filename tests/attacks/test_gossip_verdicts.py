"""Case 5, and what else a lying member may try on verdicts: accusations, view reports, relays.

Each attack runs against the real hub as it is, and once more with its one defence taken away, where it must succeed.
"""

from functools import partial
from itertools import count

import pytest

from protocol.effects import SendDatagram
from protocol.ids import NodeId
from protocol.membership.events import PeerDown
from protocol.membership.healing import Healing
from protocol.membership.probing import Probing
from protocol.membership.state import State
from protocol.membership.suspicion import Suspicions
from protocol.wire.messages import Accusation, Ack, Gossip, PingRequest, Relayed, ViewReport
from protocol.wire.statements import Stated
from tests.protocol.wire.hubs import Host, Hubs, settled, statement

LABELS = ("judge", "victim", "liar", "second", "third", "honest")
NUMBERS = count(1_000_000)


def needs(monkeypatch: pytest.MonkeyPatch, witnesses: int) -> None:
    """The defence taken away: fewer distinct witnesses are enough."""
    monkeypatch.setattr(State, "witnesses_needed", lambda self, target: witnesses)


def accusation(mesh: Hubs, accuser: str, victim: Host) -> bytes:
    """A signed accusation of the victim's present incarnation."""
    host = mesh[accuser]
    boot, incarnation = mesh["judge"].live.membership.view.rank(victim.node_id)
    body = Accusation(host.short, host.boot, next(NUMBERS), victim.short, boot, incarnation)
    return statement(accuser, mesh.root, body)


def judged(mesh: Hubs, accusers: tuple[str, ...]) -> bool:
    """Whether the judge takes the victim for dead on these accusations, while the victim cannot refute them.

    The network is cut: only what the attackers tell reaches the judge, and a judge that is cut off accuses nobody.
    """
    victim, judge = mesh["victim"], mesh["judge"]
    mesh.cut = lambda source, target: True
    for accuser in accusers:
        mesh.tell("liar", "judge", Gossip([accusation(mesh, accuser, victim)]))
    mesh.run(3.0)
    return victim.node_id not in judge.up()


@pytest.mark.parametrize("defended", [True, False])
def test_case_05_a_member_alone_declares_nobody_dead(defended: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    mesh = settled(*LABELS)
    if not defended:
        needs(monkeypatch, 1)
    assert judged(mesh, ("liar",)) is not defended


@pytest.mark.parametrize("defended", [True, False])
def test_case_05_nor_do_one_fewer_than_needed(defended: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    mesh = settled(*LABELS)
    if not defended:
        needs(monkeypatch, 2)
    assert judged(mesh, ("liar", "second")) is not defended


@pytest.mark.parametrize("defended", [True, False])
def test_case_05_nor_does_one_that_repeats_itself(defended: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    mesh = settled(*LABELS)
    if not defended:
        heard = Suspicions.heard

        def by_number(self: Suspicions, stated: Stated, body: Accusation) -> bool:
            """Accusations counted, not accusers."""
            signer = NodeId(f"{stated.signer}/{body.number}")
            self._s.view._up[signer] = None
            return heard(self, stated._replace(signer=signer), body)

        monkeypatch.setattr(Suspicions, "heard", by_number)
    assert judged(mesh, ("liar",) * 10) is not defended


def test_case_05_as_many_as_needed_are_believed() -> None:
    """The counterpart: without it, the tests above would pass where nobody is ever believed."""
    mesh = settled(*LABELS)
    assert judged(mesh, ("liar", "second", "third"))
    down = [event for event in mesh["judge"].published if isinstance(event, PeerDown)]
    assert {len(event.witnesses) for event in down} == {3}


def test_case_05_a_living_node_refutes_even_enough_liars() -> None:
    """With the network as it is, the victim hears of the accusations in time and nobody takes it for dead."""
    mesh = settled(*LABELS)
    for accuser in ("liar", "second", "third"):
        mesh.tell("liar", "judge", Gossip([accusation(mesh, accuser, mesh["victim"])]))
    mesh.run(6.0)
    for label in LABELS:
        assert not any(isinstance(event, PeerDown) for event in mesh[label].published)
    assert mesh["judge"].live.membership.view.rank(mesh["victim"].node_id)[1] > 0


# ---- view reports ----


def report(mesh: Hubs, signer: str, *, number: int, boot: int | None = None, up: bool = True) -> bytes:
    """A report by this member that everybody is up, or everybody but the victim."""
    host, roster = mesh[signer], mesh["judge"].live.roster
    bits = (1 << len(roster)) - 1
    index = roster.index(mesh["victim"].node_id)
    if not up and index is not None:
        bits ^= 1 << index
    body = ViewReport(host.short, boot or host.boot, number, roster.digest, bits.to_bytes(1, "little"))
    return statement(signer, mesh.root, body)


def mourning() -> Hubs:
    """A mesh in which the victim is dead, and known to be; its network is cut, so that the judge hears only liars."""
    mesh = settled(*LABELS)
    mesh.stop("victim")
    mesh.run(10.0)
    assert mesh["victim"].node_id not in mesh["judge"].up()
    mesh.cut = lambda source, target: True
    return mesh


def resurrected(mesh: Hubs, *reports: bytes) -> bool:
    """Whether the judge takes the victim for alive after these."""
    for blob in reports:
        mesh.tell("liar", "judge", Gossip([blob]))
    return mesh["victim"].node_id in mesh["judge"].up()


@pytest.mark.parametrize("defended", [True, False])
def test_mesh_two_lying_reports_resurrect_nobody(defended: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    mesh = mourning()
    if not defended:
        witness = Healing._witness

        def one_is_enough(self: Healing, stated: Stated, theirs: int, mine: int) -> None:
            witness(self, stated, theirs, mine)
            self.revive(mesh["victim"].node_id)

        monkeypatch.setattr(Healing, "_witness", one_is_enough)
    said = [report(mesh, signer, number=next(NUMBERS)) for signer in ("liar", "second")]
    assert resurrected(mesh, *said[: 2 if defended else 1]) is not defended


def test_mesh_three_reports_are_believed() -> None:
    mesh = mourning()
    assert resurrected(mesh, *(report(mesh, label, number=next(NUMBERS)) for label in ("liar", "second", "third")))


def test_mesh_a_report_repeated_counts_once() -> None:
    mesh = mourning()
    one, two = (report(mesh, signer, number=next(NUMBERS)) for signer in ("liar", "second"))
    assert not resurrected(mesh, one, two, one, two, one, two)


@pytest.mark.parametrize("defended", [True, False])
@pytest.mark.parametrize("former_boot", [False, True])
def test_mesh_an_old_report_replayed_resurrects_nobody(
    former_boot: bool, defended: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A liar kept what honest members said when the victim was up; they have said otherwise since, or restarted."""
    witnesses = ("second", "third", "honest")
    mesh = settled(*LABELS)
    kept = [report(mesh, label, number=5) for label in witnesses]
    mesh.stop("victim")
    if former_boot:
        for label in witnesses:
            mesh.stop(label)
            mesh.start(label)
    mesh.run(12.0)
    assert mesh["victim"].node_id not in mesh["judge"].up()
    mesh.cut = lambda source, target: True
    if not former_boot:
        newer = [report(mesh, label, number=6, up=False) for label in witnesses]
        assert not resurrected(mesh, *newer)
    if not defended:
        monkeypatch.setattr(mesh["judge"].live.membership._healing, "_report_numbers", {})
        monkeypatch.setattr("protocol.membership.view.View.rank", lambda self, peer: (0, 0))
    assert resurrected(mesh, *kept) is not defended


# ---- relays ----


def relay_liar(mesh: Hubs, victim: Host) -> None:
    """The liar tells whoever pings the victim that the victim answered. It counts the numbers of their pings along."""
    liar = mesh["liar"]
    told = len(mesh.sent)

    def answer() -> None:
        nonlocal told
        for _, host, effect in mesh.sent[told:]:
            if effect.address == victim.address and host is not liar:
                numbers = list(host.live.membership._probing._probes)
                mesh.after(0.31, partial(_lie, mesh, host, numbers))
        told = len(mesh.sent)
        mesh.after(0.05, answer)

    answer()


def _lie(mesh: Hubs, host: Host, numbers: list[int]) -> None:
    for number in numbers[:16]:
        mesh.tell("liar", host.label, Relayed(number))


@pytest.mark.parametrize("defended", [True, False])
def test_mesh_one_lying_relay_keeps_no_dead_node_alive(defended: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its word counts only where it was asked, and elsewhere enough witnesses remain."""
    if not defended:

        def from_anybody(self: Probing, number: int, relay: NodeId) -> None:
            if number in self._probes:
                self._drop(number)

        monkeypatch.setattr(Probing, "relayed", from_anybody)
    mesh = settled(*(f"n{index}" for index in range(10)), "liar", "victim")
    victim = mesh["victim"]
    mesh.stop("victim")
    relay_liar(mesh, victim)
    mesh.run(15.0)
    survivors = [host for host in mesh.hosts.values() if host.hub is not None and host.label != "liar"]
    still_up = sum(victim.node_id in host.up() for host in survivors)
    assert still_up == 0 if defended else still_up > 0


@pytest.mark.parametrize("defended", [True, False])
def test_mesh_only_the_target_answers_a_relayed_ping(defended: bool) -> None:
    """`second` pings the victim for the judge; an Ack by anybody else must not become `Relayed`."""
    mesh = settled(*LABELS)
    mesh.cut = lambda source, target: True
    relay = mesh["second"]
    mesh.tell("judge", "second", PingRequest(5, mesh["victim"].short))
    relays = relay.live.membership._probing._relays
    ((number, entry),) = relays.items()
    if not defended:
        relays[number] = (*entry[:3], mesh["liar"].node_id)
    effects = mesh.tell("liar", "second", Ack(number, bytes(8)))
    passed_on = [effect for effect in effects if isinstance(effect, SendDatagram)]
    assert len(passed_on) == (0 if defended else 1)
