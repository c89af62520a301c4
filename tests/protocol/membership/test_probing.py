"""Probes: their stages and timers, what concludes nothing, relaying for others, bounds, tunnels."""

from dataclasses import replace

import pytest

from protocol.effects import TimerFired
from protocol.ids import Address
from protocol.membership.events import DatagramsPass, PeerDown, PeerMeasured, PeerSuspected, Stalled
from protocol.membership.parameters import LAN, parameters
from protocol.membership.probing import LATE_S, RELAYS_MAX, UDP_RETRY_MIN_S, UDP_RETRY_S
from protocol.membership.state import TUNNEL
from protocol.wire.messages import Accusation, Ack, Gossip, Nack, Ping, PingRequest, Relayed
from tests.protocol.membership.parts import STEADY, Subject
from tests.support.hub import address_of, cancelled, events, sends, timers


def accused(effects: list, subject: Subject) -> set[int]:  # type: ignore[type-arg]  # effects of any kind
    return {subject.mesh.number(event.peer) for event in events(effects, PeerSuspected)}


def test_the_stages_of_a_probe_come_in_order_and_on_time() -> None:
    subject = Subject(6)
    subject.know(1, 2, 3, 4, 5)
    number, effects = subject.start_probe(1)
    began = subject.now
    assert timers(effects)["membership", "stage", number] == began + LAN.direct_timeout_s

    effects = subject.fire("stage", number)
    asked = sends(effects, PingRequest)
    assert len(asked) == LAN.relays
    assert len({to for to, _, _ in asked}) == LAN.relays
    assert subject.mesh.id(1) not in {to for to, _, _ in asked}
    assert all(request == PingRequest(number, subject.mesh.short(1)) for _, request, _ in asked)
    assert timers(effects)["membership", "stage", number] == pytest.approx(began + LAN.relay_timeout_s)

    effects = subject.fire("stage", number)
    assert [(address, ping.probe) for _, ping, address in sends(effects, Ping)] == [(TUNNEL, number)]
    assert timers(effects)["membership", "stage", number] == pytest.approx(began + LAN.probe_timeout_s)

    subject.hear(2, 3)
    effects = subject.fire("stage", number)
    assert accused(effects, subject) == {1}
    assert subject.machine.suspects() == [subject.mesh.id(1)]
    assert 1 in subject.up(), "an accusation is no verdict"


def test_an_answer_at_any_stage_ends_it() -> None:
    for stages in range(3):
        subject = Subject(4)
        subject.know(1, 2, 3)
        number, _ = subject.start_probe(1)
        began = subject.now
        for _ in range(stages):
            subject.fire("stage", number)
        subject.now += 0.05
        effects = subject.packet(1, Ack(number, subject.digest))
        assert ("membership", "stage", number) in cancelled(effects)
        measured = events(effects, PeerMeasured)
        if stages == 0:
            assert [(one.peer, one.tunnelled) for one in measured] == [(subject.mesh.id(1), False)]
            assert measured[0].rtt_s == pytest.approx(0.05)
        else:
            assert measured == [], "how long a relayed or repeated ping took says nothing"
        assert subject.now > began
        assert subject.give(TimerFired(("membership", "stage", number))) == []


def test_a_relay_that_reached_it_ends_it() -> None:
    subject = Subject(4)
    subject.know(1, 2, 3)
    number, _ = subject.start_probe(1)
    subject.fire("stage", number)
    effects = subject.packet(2, Relayed(number))
    assert ("membership", "stage", number) in cancelled(effects)


def test_an_answer_by_another_node_ends_nothing() -> None:
    subject = Subject(4)
    subject.know(1, 2, 3)
    number, _ = subject.start_probe(1)
    effects = subject.packet(2, Ack(number, subject.digest))
    assert cancelled(effects) == set()
    assert ("membership", "stage", number) in subject.timers


def test_one_that_is_cut_off_itself_accuses_nobody() -> None:
    subject = Subject(6)
    subject.know(1, 2, 3, 4, 5)
    number, _ = subject.start_probe(1)
    subject.hear(2, 3)  # before the relays were asked: says nothing of the time after
    subject.now += 0.001
    subject.fire("stage", number)
    subject.fire("stage", number)
    before = subject.machine.health
    effects = subject.fire("stage", number)
    assert accused(effects, subject) == set()
    assert subject.machine.health == before + 1, "it distrusts itself instead"


@pytest.mark.parametrize(
    ("company", "hearers", "accuses"),
    [((2, 3, 4), (2,), False), ((2, 3, 4), (2, 3), True), ((2, 3), (), False), ((2,), (2,), True), ((), (1,), False)],
)
def test_one_voice_is_not_enough_where_two_were_there_lately(
    company: tuple[int, ...], hearers: tuple[int, ...], accuses: bool
) -> None:
    subject = Subject(6)
    subject.know(1, 2, 3, 4, 5)
    number, _ = subject.start_probe(1)
    subject.now += LAN.reach_window_s + 1
    probe = subject.machine._probing._probes[number]
    probe.started = probe.due = subject.now
    subject.hear(*company)
    subject.now += 0.001
    subject.give(TimerFired(("membership", "stage", number)))
    subject.fire("stage", number)
    for hearer in hearers:
        subject.packet(hearer, Nack(number))
    assert accused(subject.fire("stage", number), subject) == ({1} if accuses else set())


def test_whom_only_relays_reach_is_tried_by_link_before_them() -> None:
    """While relays answer sooner, nobody would ever see that what is sent directly is lost."""
    subject = Subject(4)
    subject.know(1, 2, 3)
    number, _ = subject.start_probe(1)
    asked = sends(subject.fire("stage", number), PingRequest)
    subject.packet(subject.mesh.number(asked[0][0]), Relayed(number))
    number, _ = subject.start_probe(1)
    effects = subject.fire("stage", number)
    assert [address for _, _, address in sends(effects, Ping)] == [TUNNEL]
    assert sends(effects, PingRequest) == []
    assert sends(subject.fire("stage", number), PingRequest) != []


def test_of_two_nodes_one_may_accuse_the_other_alone() -> None:
    subject = Subject(2)
    subject.know(1)
    number, _ = subject.start_probe(1)
    for _ in range(2):
        subject.fire("stage", number)
    effects = subject.fire("stage", number)
    assert accused(effects, subject) == {1}


def test_a_late_timer_concludes_nothing_and_reads_on_first() -> None:
    subject = Subject(4)
    subject.know(1, 2, 3)
    number, _ = subject.start_probe(1)
    subject.fire("stage", number)
    subject.fire("stage", number)
    subject.hear(2, 3)
    subject.now += LAN.probe_timeout_s + LATE_S  # this process was kept from running
    effects = subject.give(TimerFired(("membership", "stage", number)))
    assert accused(effects, subject) == set()
    again = timers(effects)["membership", "stage", number]
    assert again == pytest.approx(subject.now + LATE_S)
    assert subject.machine.health == 1
    effects = subject.fire("stage", number)
    assert accused(effects, subject) == set()
    assert timers(effects) == {}
    # What comes after all is the answer to a probe that is no more.
    assert events(subject.packet(1, Ack(number, subject.digest)), PeerMeasured) == []


def test_an_answer_found_by_reading_on_counts_but_is_no_measurement() -> None:
    subject = Subject(4)
    subject.know(1, 2, 3)
    number, _ = subject.start_probe(1)
    subject.now += 1.0
    subject.give(TimerFired(("membership", "stage", number)))
    health = subject.machine.health
    effects = subject.packet(1, Ack(number, subject.digest))
    assert events(effects, PeerMeasured) == []
    assert subject.machine.health == health - 1


def test_every_peer_is_probed_within_two_rounds() -> None:
    subject = Subject(9)
    peers = list(range(1, 9))
    subject.know(*peers)
    last: dict[int, int] = {}
    for tick in range(1, 100):
        for to, ping, _ in sends(subject.fire("probe"), Ping):
            target = subject.mesh.number(to)
            assert tick - last.get(target, tick) <= 2 * len(peers) - 1
            last[target] = tick
            subject.packet(target, Ack(ping.probe, subject.digest))
    assert set(last) == set(peers)


def test_a_newcomer_probes_more_often_for_its_first_seconds() -> None:
    subject = Subject(20)
    subject.know(*range(1, 20))
    for interval_s in (LAN.probe_interval_young_s, LAN.probe_interval_s):
        due_at = timers(subject.fire("probe"))["membership", "probe"]
        assert due_at == pytest.approx(subject.now + interval_s)
        subject.now += LAN.young_s


def test_bad_health_stretches_the_timers_and_answers_heal_it() -> None:
    subject = Subject(3)
    subject.know(1, 2)
    for _ in range(20):
        subject.machine._s.suffer()
    assert subject.machine.health == LAN.health_max
    number, effects = subject.start_probe(1)
    stretched = LAN.direct_timeout_s * (1 + subject.machine.health / 2)
    assert timers(effects)["membership", "stage", number] == pytest.approx(subject.now + stretched)
    before = subject.machine.health
    subject.packet(1, Ack(number, subject.digest))
    assert subject.machine.health == before - 1


# ---- relaying for others ------------------------------------------------------------------------------------------


def test_a_relay_pings_and_reports_what_came_of_it() -> None:
    subject = Subject(4)
    subject.know(1, 2, 3)
    source = Address("192.0.2.9", 777)
    effects = subject.packet(1, PingRequest(55, subject.mesh.short(2)), source=source)
    number = subject.probe_of(2, effects)
    assert timers(effects)["membership", "relay", number] == pytest.approx(subject.now + LAN.relay_wait_s)
    effects = subject.packet(2, Ack(number, subject.digest))
    assert sends(effects, Relayed) == [(subject.mesh.id(1), Relayed(55), source)]
    assert ("membership", "relay", number) in cancelled(effects)
    assert sends(subject.packet(2, Ack(number, subject.digest)), Relayed) == [], "once is enough"

    effects = subject.packet(1, PingRequest(56, subject.mesh.short(3)), source=source)
    number = subject.probe_of(3, effects)
    assert sends(subject.fire("relay", number), Nack) == [(subject.mesh.id(1), Nack(56), source)]


def test_a_third_node_cannot_answer_for_the_target_of_a_relay() -> None:
    subject = Subject(4)
    subject.know(1, 2, 3)
    number = subject.probe_of(2, subject.packet(1, PingRequest(55, subject.mesh.short(2))))
    assert sends(subject.packet(3, Ack(number, subject.digest)), Relayed) == []
    assert sends(subject.packet(2, Ack(number, subject.digest)), Relayed) != []


def test_a_request_about_this_very_node_is_answered_at_once() -> None:
    subject = Subject(3)
    subject.know(1, 2)
    effects = subject.packet(1, PingRequest(55, subject.mesh.short(0)))
    assert sends(effects, Relayed) == [(subject.mesh.id(1), Relayed(55), address_of(1))]
    assert sends(effects, Ping) == []


def test_requests_about_strangers_and_too_many_go_unanswered() -> None:
    subject = Subject(3)
    subject.know(1, 2)
    assert subject.packet(1, PingRequest(55, b"\xff" * 8)) == []
    for number in range(RELAYS_MAX + 50):
        effects = subject.packet(1, PingRequest(number, subject.mesh.short(2)))
        assert (sends(effects, Ping) != []) is (number < RELAYS_MAX)
    assert len(subject.machine._probing._relays) == RELAYS_MAX


def test_a_ping_is_answered_to_where_it_came_from_whoever_sent_it() -> None:
    subject = Subject(3)
    subject.know(1)
    source = Address("192.0.2.1", 40_000)
    effects = subject.packet(1, Ping(9, subject.digest), source=source)
    assert sends(effects, Ack) == [(subject.mesh.id(1), Ack(9, subject.digest), source)]
    effects = subject.packet(2, Ping(9, subject.digest))
    assert [to for to, _, _ in sends(effects, Ack)] == [subject.mesh.id(2)], "also one that is not known to be up"


def test_an_answer_is_never_larger_than_the_question() -> None:
    """A forged source must not make this node a reflector: one question a packet, no gossip but for gossip."""
    subject = Subject(12, params=replace(STEADY, verifiers=0))
    subject.know(*range(1, 10))
    subject.told(subject.mesh.alive(11))  # news, which would travel with an answer
    ping = Ping(9, subject.digest)
    assert sends(subject.packet(1, ping), Gossip) == []
    assert len(sends(subject.packet(1, *[ping] * 10), Ack)) == 1
    request = PingRequest(7, subject.mesh.short(2))
    assert len(sends(subject.packet(1, request, request), Ping)) == 1
    brought = subject.mesh.alive(1).blob
    answered = sends(subject.packet(1, ping, Gossip([brought])), Gossip)
    assert [sum(map(len, gossip.items)) <= len(brought) for _, gossip, _ in answered] in ([], [True])


def test_a_source_is_no_route_before_it_was_proven() -> None:
    """Whoever captures a datagram could else turn this node's traffic on a bystander."""
    subject = Subject(3)
    subject.know(1, 2)
    peer, elsewhere = subject.mesh.id(1), Address("192.0.2.1", 40_000)
    subject.packet(1, source=elsewhere)
    assert subject.machine.route(peer) == address_of(1)
    # The next probe tries both; an answer from there is the proof.
    number, effects = subject.start_probe(1)
    assert {address for to, _, address in sends(effects, Ping) if to == peer} == {None, elsewhere}
    subject.packet(1, Ack(number, subject.digest), source=elsewhere)
    assert subject.machine.route(peer) == elsewhere
    # An address that it states, signed, needs no such proof.
    subject.packet(1, source=address_of(1))
    assert subject.machine.route(peer) == address_of(1)


def test_a_source_that_turns_out_to_be_the_stated_address_is_not_pinged_twice() -> None:
    """Of those who arrive together, many hear from one another before they know one another."""
    subject = Subject(3)
    subject.hear(1)
    subject.know(1, 2)
    _, effects = subject.start_probe(1)
    assert [address for to, _, address in sends(effects, Ping) if to == subject.mesh.id(1)] == [None]


# ---- peers without UDP, peers with several addresses ----------------------------------------------------------------


def test_other_addresses_of_the_silent_one_are_tried_with_the_relays() -> None:
    subject = Subject(3)
    several = tuple(Address(f"10.9.{n}.1", 4893) for n in range(3))
    subject.told(subject.mesh.alive(1, addresses=several))
    subject.know(2)
    number, _ = subject.start_probe(1)
    tried = [address for _, ping, address in sends(subject.fire("stage", number), Ping) if ping.probe == number]
    assert tried == list(several[1:])


def test_an_answer_over_the_link_makes_a_tunnel_and_one_by_udp_ends_it() -> None:
    subject = Subject(3)
    subject.know(1, 2)
    peer = subject.mesh.id(1)
    number, _ = subject.start_probe(1)
    subject.fire("stage", number)
    subject.fire("stage", number)
    effects = subject.packet(1, Ack(number, subject.digest), source=TUNNEL)
    assert events(effects, PeerMeasured)[0].tunnelled
    assert subject.machine.route(peer) == TUNNEL
    # The next probe goes over the link at once; now and then UDP is tried beside it.
    number, effects = subject.start_probe(1)
    assert {address for to, _, address in sends(effects, Ping) if to == peer} == {None}
    effects = subject.packet(1, Ack(number, subject.digest), source=TUNNEL)
    assert events(effects, PeerMeasured)[0].tunnelled
    subject.now += UDP_RETRY_S
    number, effects = subject.start_probe(1)
    assert {address for to, _, address in sends(effects, Ping) if to == peer} == {None, address_of(1)}
    effects = subject.packet(1, Ack(number, subject.digest))
    assert events(effects, DatagramsPass) == [DatagramsPass(peer)]
    assert subject.machine.route(peer) == address_of(1)


def test_udp_is_tried_at_once_when_the_peers_datagrams_arrive_again() -> None:
    subject = Subject(3)
    subject.know(1, 2)
    peer = subject.mesh.id(1)
    number, _ = subject.start_probe(1)
    subject.fire("stage", number)
    subject.fire("stage", number)
    subject.packet(1, Ack(number, subject.digest), source=TUNNEL)
    assert subject.machine.route(peer) == TUNNEL
    # Not at every datagram: where only one direction is blocked, they go on to arrive.
    assert sends(subject.packet(1, Nack(7)), Ping) == []
    subject.now += UDP_RETRY_MIN_S + 0.001  # the sum of the times is not exact
    sent = sends(subject.packet(1, Nack(7)), Ping)
    tried = [ping for to, ping, address in sent if (to, address) == (peer, address_of(1))]
    assert tried
    subject.now += UDP_RETRY_MIN_S / 2
    assert sends(subject.packet(1, Nack(7)), Ping) == []
    effects = subject.packet(1, Ack(tried[0].probe, subject.digest))
    assert events(effects, DatagramsPass) == [DatagramsPass(peer)]
    assert subject.machine.route(peer) == address_of(1)


def test_a_peer_without_udp_is_not_accused() -> None:
    subject = Subject(3)
    subject.know(1, 2)
    for _ in range(5):
        number, effects = subject.start_probe(1)
        if subject.machine.route(subject.mesh.id(1)) != TUNNEL:
            subject.fire("stage", number)
            effects = subject.fire("stage", number)
            assert (TUNNEL, number) in [(address, ping.probe) for _, ping, address in sends(effects, Ping)]
        effects = subject.packet(1, Ack(number, subject.digest), source=TUNNEL)
        assert accused(effects, subject) == set()
    assert subject.machine.suspects() == []


# ---- stalls ---------------------------------------------------------------------------------------------------------


def test_after_a_stall_no_probe_under_way_means_anything() -> None:
    subject = Subject(4, params=replace(STEADY, stall_s=1.5))
    subject.know(1, 2, 3)
    number, _ = subject.start_probe(1)
    relayed = subject.probe_of(2, subject.packet(1, PingRequest(9, subject.mesh.short(2))))
    subject.now += 3600.0
    effects = subject.give(TimerFired(("membership", "stage", number)))
    assert [stalled.gap_s for stalled in events(effects, Stalled)] == [pytest.approx(3600.0)]
    assert {("membership", "stage", number), ("membership", "relay", relayed)} <= cancelled(effects)
    assert accused(effects, subject) == set()
    assert events(subject.run(2.0, answering=(1, 2, 3)), PeerDown) == []


@pytest.mark.parametrize("interval_s", [0.2, 1.0, 2.0, 5.0])
@pytest.mark.parametrize("profile", ["lan", "wan", "local"])
def test_a_quiet_mesh_does_not_take_its_own_pace_for_a_stall(profile: str, interval_s: float) -> None:
    """Also with a probe interval that somebody set himself: of two nodes, one must still notice that the other died."""
    params = replace(parameters(profile), probe_interval_s=interval_s)  # type: ignore[arg-type]  # a name from the list
    subject = Subject(2, params=params)
    subject.told(subject.mesh.alive(1))
    effects = subject.run(60.0, answering=(1,))
    assert events(effects, Stalled) == []
    effects = subject.run(60.0)
    assert events(effects, Stalled) == []
    assert subject.down() == {1}


def test_the_accused_is_told_by_the_one_who_looks_for_itself() -> None:
    subject = Subject(6, params=replace(STEADY, verifiers=1000))
    subject.know(1, 2, 3, 4, 5)
    accusation = subject.mesh.accusation(2, 1)
    effects = subject.told(accusation, via=2)
    assert [(to, gossip.items) for to, gossip, _ in sends(effects, Gossip) if to == subject.mesh.id(1)] == [
        (subject.mesh.id(1), [accusation.blob])
    ]
    subject.probe_of(1, effects)
    assert isinstance(accusation.body, Accusation)
