"""The machine's life: start, contact, leaving, changes of address and roster, and what a peer may send it."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.effects import LinkLost, LinkOpened, Persist
from protocol.ids import Address
from protocol.membership.contact import CONTACT_RETRY_MAX_S
from protocol.membership.events import (
    AddressesChanged,
    ContactFound,
    Depart,
    IdentityFreed,
    IdentityInUse,
    IdentityUncontested,
    PeerDown,
    PeerLeft,
    PeerUp,
    RosterShrank,
)
from protocol.membership.parameters import LAN
from protocol.membership.state import TUNNEL
from protocol.membership.twins import UNCONTESTED_S
from protocol.membership.view import addresses_of
from protocol.wire.messages import Ack, Alive, Gossip, Leaving, Ping, ViewOffer, ViewReply
from tests.protocol.membership.parts import STEADY, Subject
from tests.support.hub import BOOT, Mesh, address_of, events, evicted, links, of_kind, sends


def bodies(subject: Subject, items: list[bytes]) -> list[object]:
    opened = [subject.mesh.codec(1).open(blob) for blob in items]
    return [stated.body for stated in opened if stated is not None]


def test_start_declares_this_node_and_asks_the_remembered_ones() -> None:
    mesh = Mesh(5)
    durable = {mesh.id(n).encode(): mesh.alive(n, boot=7).blob for n in (1, 2)}
    subject = Subject(5, durable=durable, contacts={mesh.id(3): address_of(3)})
    assert subject.up() == {0}
    asked = links(subject.started, ViewOffer)
    assert {mesh.number(to) for to, _ in asked} == {1, 2, 3}
    told = links(subject.started, ViewReply)
    assert [isinstance(bodies(subject, list(reply.statements))[0], Alive) for _, reply in told] == [True] * 3
    assert {key[1] for key in subject.timers} == {"probe", "announce", "contact"}
    assert subject.machine.addresses(mesh.id(1)) == (address_of(1),)
    assert subject.machine.addresses(mesh.id(3)) == (address_of(3),)
    assert subject.machine.addresses(mesh.id(4)) == ()
    assert subject.machine.route(mesh.id(4)) is None


def test_durable_rubbish_is_no_reason_not_to_start() -> None:
    mesh = Mesh(3)
    rubbish = {b"x": b"", b"y": b"\xff" * 300, b"z": mesh.leaving(1).blob, b"me": mesh.alive(0, boot=99_999).blob}
    assert Subject(3, durable=rubbish).up() == {0}


def test_contact_goes_on_until_somebody_answers_and_ever_more_seldom() -> None:
    subject = Subject(3, contacts={Mesh(3).id(1): address_of(1)})
    pauses, last = [], subject.now
    for _ in range(20):
        effects = subject.fire("contact")
        pauses.append(subject.now - last)
        last = subject.now
        assert links(effects, ViewOffer) != []
    assert pauses[0] < 0.5
    assert pauses[-1] == pytest.approx(CONTACT_RETRY_MAX_S, rel=0.25)
    subject.know(1)
    assert links(subject.fire("contact"), ViewOffer) == []


def test_who_arrives_alone_tells_many_at_once() -> None:
    subject = Subject(30, params=replace(STEADY, leave_sends_max=16))
    known = [subject.mesh.alive(n).blob for n in range(1, 30)]
    effects = subject.linked(1, ViewReply(known, []))
    assert len(events(effects, PeerUp)) == 29
    assert len({to for to, _, _ in sends(effects, Gossip)}) == 16
    # Another reply makes no noise.
    effects = subject.linked(1, ViewReply(known, []))
    assert effects == []


def test_what_came_over_a_link_is_kept_and_not_told_on() -> None:
    subject = Subject(4)
    subject.know(1)
    effects = subject.linked(1, ViewReply([subject.mesh.alive(2).blob], []))
    assert [persist.key for persist in of_kind(effects, Persist)] == [subject.mesh.id(2).encode()]
    assert len(subject.machine._s.broadcasts) == 0
    subject.told(subject.mesh.alive(3))
    assert len(subject.machine._s.broadcasts) == 1


def test_a_link_to_one_that_is_not_up_brings_an_introduction_once() -> None:
    subject = Subject(3)
    opened = LinkOpened(subject.mesh.id(1), BOOT)
    assert links(subject.give(opened), ViewReply) != []
    assert subject.give(opened) == []
    subject.give(LinkLost(subject.mesh.id(1), "gone"))
    assert links(subject.give(opened), ViewReply) != []
    subject.know(2)
    assert subject.give(LinkOpened(subject.mesh.id(2), BOOT)) == [], "known, and in this boot"
    assert links(subject.give(LinkOpened(subject.mesh.id(2), BOOT + 1)), ViewReply) != [], "it restarted"


def test_views_are_compared_with_few_of_those_who_open_links() -> None:
    subject = Subject(9)
    told = [subject.give(LinkOpened(subject.mesh.id(number), BOOT)) for number in range(1, 8)]
    assert all(links(effects, ViewReply) != [] for effects in told)
    assert [links(effects, ViewOffer) != [] for effects in told] == [True] + [False] * 6
    later = subject.give(LinkOpened(subject.mesh.id(8), BOOT), 2 * LAN.sync_pause_s)
    assert links(later, ViewOffer) != []


def test_hints_of_discovery_are_followed_but_not_too_often() -> None:
    subject = Subject(3)
    peer, found = subject.mesh.id(1), Address("192.0.2.8", 5000)
    assert links(subject.give(ContactFound(peer, found)), ViewReply) != []
    assert subject.machine.addresses(peer) == (found,)
    assert subject.give(ContactFound(peer, found), 1.0) == []
    assert links(subject.give(ContactFound(peer, found), CONTACT_RETRY_MAX_S), ViewReply) != []
    assert subject.give(ContactFound(subject.mesh.id(0), found)) == []
    assert subject.give(ContactFound(Mesh(9).id(8), found)) == [], "no member"
    subject.know(2)
    assert subject.give(ContactFound(subject.mesh.id(2), found)) == [], "known already: its own word counts"
    assert subject.machine.addresses(subject.mesh.id(2)) == (address_of(2),)


def test_leaving_is_told_to_all_and_ends_probing() -> None:
    subject = Subject(6)
    subject.know(1, 2, 3, 4, 5)
    effects = subject.give(Depart())
    told = sends(effects, Gossip)
    assert {subject.mesh.number(to) for to, _, _ in told} == {1, 2, 3, 4, 5}
    assert all(isinstance(bodies(subject, gossip.items)[0], Leaving) for _, gossip, _ in told)
    subject.fire("probe")
    assert ("membership", "probe") not in subject.timers


def test_who_says_goodbye_is_left_not_dead() -> None:
    subject = Subject(4)
    subject.know(1, 2, 3)
    subject.told(subject.mesh.accusation(2, 1))
    goodbye = subject.mesh.leaving(1)
    effects = subject.told(goodbye)
    assert events(effects, PeerLeft) == [PeerLeft(subject.mesh.id(1))]
    assert subject.machine.suspects() == []
    assert (subject.up(), subject.down()) == ({0, 2, 3}, set())
    assert events(subject.told(goodbye), PeerLeft) == [], "once"
    # Its last Alive arrives late: it left all the same. After a restart it is back.
    assert events(subject.told(subject.mesh.alive(1)), PeerUp) == []
    assert events(subject.told(subject.mesh.alive(1, boot=BOOT + 1)), PeerUp) != []
    assert events(subject.told(goodbye), PeerLeft) == [], "that goodbye was of the former boot"


def test_new_addresses_are_told_and_the_same_ones_are_not() -> None:
    subject = Subject(3)
    subject.know(1, 2)
    assert subject.give(AddressesChanged((address_of(0),))) == []
    more = tuple(Address("10.5.0.1", port) for port in range(1, 20))
    effects = subject.give(AddressesChanged(more))
    assert ("membership", "gossip") in subject.timers
    effects = subject.fire("gossip")
    body = bodies(subject, sends(effects, Gossip)[0][1].items)[0]
    assert isinstance(body, Alive)
    assert addresses_of(body) == more[:8]
    assert body.incarnation == 1


def test_a_peer_that_moved_is_reached_at_its_new_address() -> None:
    subject = Subject(3)
    subject.know(1, 2)
    peer = subject.mesh.id(1)
    assert subject.machine.route(peer) == address_of(1)
    elsewhere = Address("10.77.0.1", 4893)
    effects = subject.told(subject.mesh.alive(1, incarnation=1, addresses=(elsewhere,)))
    assert subject.machine.route(peer) == elsewhere
    assert [up.addresses for up in events(effects, PeerUp)] == [(elsewhere,)]
    assert of_kind(effects, Persist) != []


def test_the_evicted_are_forgotten_as_if_they_had_never_been() -> None:
    subject = Subject(4)
    subject.know(1, 2, 3)
    peer = subject.mesh.id(1)
    subject.told(subject.mesh.accusation(2, 1))
    subject.mesh.roster.apply(evicted(1))
    effects = subject.give(RosterShrank((peer,)))
    assert events(effects, PeerLeft) == [PeerLeft(peer)]
    assert subject.up() == {0, 2, 3}
    assert peer not in subject.machine.view.known
    assert subject.machine.suspects() == []
    assert subject.machine.route(peer) is None
    assert subject.give(RosterShrank((peer,))) == []


def test_somebody_with_this_nodes_key_is_reported() -> None:
    subject = Subject(3)
    told = events(subject.told(subject.mesh.alive(0, boot=BOOT + 5)), IdentityInUse)
    assert told == [IdentityInUse(BOOT + 5, (address_of(0),))]
    assert subject.told(subject.mesh.alive(0, boot=BOOT - 5)) == []


def test_the_key_is_free_when_nobody_has_the_twin_two_rounds_in_a_row() -> None:
    subject = Subject(3)
    subject.know(1, 2)
    newer, mine = subject.mesh.alive(0, boot=BOOT + 5).blob, bytes(subject.mesh.roster.short(subject.mesh.id(0)))
    subject.told(subject.mesh.alive(0, boot=BOOT + 5))
    subject.fire("twin")
    asked = links(subject.fire("twin"), ViewOffer)
    assert {subject.mesh.number(to) for to, _ in asked} == {1, 2}
    # One has nobody under this key, the other still has the twin: it lives.
    for _ in range(4):
        subject.linked(1, ViewReply([], [mine]))
        subject.linked(2, ViewReply([newer], [mine]))
        assert events(subject.fire("twin"), IdentityFreed) == []
    # Nobody answers: that says nothing.
    for _ in range(4):
        assert events(subject.fire("twin"), IdentityFreed) == []
    subject.linked(1, ViewReply([], [mine]))
    assert events(subject.fire("twin"), IdentityFreed) == []
    subject.linked(2, ViewReply([], [mine]))
    assert events(subject.fire("twin"), IdentityFreed) == [IdentityFreed(BOOT + 5)]
    assert ("membership", "twin") not in subject.timers


def test_this_node_does_not_answer_for_its_twin() -> None:
    """A member whose datagrams to the twin stay unanswered tries the link, and that leads here."""
    subject = Subject(3)
    subject.know(1, 2)
    assert sends(subject.packet(1, Ping(1, 0), source=TUNNEL), Ack) != []
    subject.told(subject.mesh.alive(0, boot=BOOT + 5))
    assert sends(subject.packet(1, Ping(2, 0), source=TUNNEL), Ack) == []


def test_a_refused_link_counts_as_a_twin_until_members_answer_this_boot() -> None:
    subject = Subject(3)
    subject.know(1, 2)
    subject.give(LinkLost(subject.mesh.id(1), "refused", "conflict"))
    assert ("membership", "twin") in subject.timers
    effects = subject.run(UNCONTESTED_S / 2)
    ping = next(message for _, message, _ in sends(effects, Ping))
    assert events(subject.packet(1, Ack(ping.probe, 0)), IdentityUncontested) == []
    subject.run(UNCONTESTED_S)
    assert events(subject.packet(1, Ack(ping.probe, 0)), IdentityUncontested) == [IdentityUncontested()]
    assert ("membership", "twin") not in subject.timers


def test_an_isolated_node_takes_the_others_for_gone_and_tells_nobody() -> None:
    subject = Subject(5)
    subject.know(1, 2, 3, 4)
    effects = subject.run(LAN.isolation_s + 2.0)
    down = events(effects, PeerDown)
    assert {subject.mesh.number(event.peer) for event in down} == {1, 2, 3, 4}
    assert all(event.private and event.witnesses == (subject.mesh.id(0),) for event in down)
    assert subject.machine.view.witnessed_down() == 0
    assert sends(effects, Gossip) == []
    assert links(effects, ViewOffer) != [], "it looks for them again"
    # The first word of any of them undoes its part.
    assert [up.peer for up in events(subject.packet(2), PeerUp)] == [subject.mesh.id(2)]
    assert [up.peer for up in events(subject.told(subject.mesh.alive(3)), PeerUp)] == [subject.mesh.id(3)]
    assert subject.up() == {0, 2, 3}


def test_the_dead_are_pinged_now_and_then() -> None:
    subject = Subject(2)
    subject.know(1)
    subject.run(30.0)
    assert subject.down() == {1}
    effects = subject.run(10 * LAN.announce_interval_s)
    assert 6 <= len({ping.probe for _, ping, _ in sends(effects, Ping)}) <= 14


def test_those_remembered_from_before_a_restart_are_sought_though_others_are_up() -> None:
    """Two that restarted within a partition would otherwise be content with each other when it is over."""
    mesh = Mesh(5)
    subject = Subject(5, contacts={mesh.id(index): address_of(index) for index in (1, 2, 3)})
    subject.told(mesh.alive(1))
    subject.told(mesh.alive(3))
    subject.told(mesh.leaving(3))
    effects = [effect for _ in range(40) for effect in subject.fire("announce")]
    sought = [mesh.number(to) for to, _ in links(effects, ViewOffer)]
    assert set(sought) == {2}, "not who is up, nor who said goodbye"
    assert len(sought) <= 40 * 1.2 * LAN.announce_interval_s / CONTACT_RETRY_MAX_S + 1


@given(st.binary(max_size=1300), st.lists(st.binary(max_size=40), max_size=5))
def test_no_reply_of_a_peer_raises(noise: bytes, shorts: list[bytes]) -> None:
    subject = Subject(3)
    subject.know(1)
    subject.linked(2, ViewReply([noise, subject.mesh.alive(2).blob], shorts))
    subject.linked(2, ViewOffer(subject.mesh.roster.digest, noise))
    subject.linked(2, ViewOffer(noise[:8].ljust(8), noise))
    assert subject.up() == {0, 1, 2}
