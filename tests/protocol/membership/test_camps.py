"""Two camps of a small mesh that hold different views: each sees the other often enough to look, and does."""

from collections import Counter
from collections.abc import Sequence

from protocol.effects import Effect, SendLink
from protocol.membership.healing import COMPARED_RECENTLY_S, DIFFERS_MAX_S
from protocol.membership.parameters import LAN
from protocol.wire.messages import Ping, ViewOffer
from tests.protocol.membership.parts import Subject

OTHER = bytes(range(8))


def test_a_peer_that_agrees_does_not_hide_one_that_does_not() -> None:
    subject = Subject(4)
    subject.know(1, 2, 3)
    subject.now += LAN.young_s + 1
    offered = 0
    for round_number in range(8):
        for sender, digest in ((1, OTHER), (2, subject.digest)):
            effects = subject.packet(sender, Ping(round_number, digest))
            offered += sum(isinstance(effect, SendLink) and isinstance(effect.message, ViewOffer) for effect in effects)
            subject.now += LAN.probe_interval_s
    assert offered


def offered_to(subject: Subject, effects: Sequence[Effect]) -> list[int]:
    return [
        subject.mesh.number(effect.to)
        for effect in effects
        if isinstance(effect, SendLink) and isinstance(effect.message, ViewOffer)
    ]


def test_a_member_that_always_changes_keeps_no_view_from_being_repaired() -> None:
    subject = Subject(4)
    subject.know(1, 2, 3)
    subject.now += LAN.young_s + 1
    offers, half_seconds = list[int](), int(4 * DIFFERS_MAX_S / 0.5)
    for number in range(half_seconds):
        if number % 4 == 0:
            subject.told(subject.mesh.alive(1, incarnation=number + 1))
        offers += offered_to(subject, subject.packet(2, Ping(number, OTHER)))
        subject.now += 0.5
    assert 2 <= len(offers) <= 4, "repaired, though not as often as in peace"
    assert set(offers) == {2}


def test_a_member_that_always_differs_does_not_take_every_turn() -> None:
    subject = Subject(5)
    subject.know(1, 2, 3, 4)
    subject.now += LAN.young_s + 1
    offers = Counter[int]()
    for number in range(int(COMPARED_RECENTLY_S / 0.025)):
        liar, honest = subject.packet(1, Ping(number, OTHER)), list[Effect]()
        if number % 20 == 19:
            honest = subject.packet(2 + number // 20 % 3, Ping(number, OTHER))
        offers.update(offered_to(subject, [*liar, *honest]))
        subject.now += 0.025
    assert min(offers[2], offers[3], offers[4]) >= 1, offers
    assert offers.total() <= COMPARED_RECENTLY_S / LAN.sync_pause_s


def test_a_member_that_is_first_to_open_a_link_does_not_blind_one_that_returns() -> None:
    subject = Subject(5)
    offers = Counter[int]()
    for number in range(160):
        offers.update(offered_to(subject, subject.packet(1, Ping(number, OTHER))))
        if number % 20 == 19:
            offers.update(offered_to(subject, subject.packet(2 + number // 20 % 3, Ping(number, OTHER))))
        subject.now += 0.025
    assert min(offers[2], offers[3], offers[4]) >= 1, offers
