"""Two camps of a small mesh that hold different views: each sees the other often enough to look, and does."""

from protocol.effects import SendLink
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
