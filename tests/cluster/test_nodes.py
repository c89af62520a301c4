"""What the service keeps of the protocol's events: marks and warnings come, and go when their cause is gone."""

from pathlib import Path

from protocol.membership.events import DatagramsPass, PeerMeasured
from protocol.records.events import ClockAgrees, ClockContradicted
from tests.cluster.parts import House


def test_the_warning_of_the_clock_goes_when_it_agrees_again(tmp_path: Path) -> None:
    nodes = House(tmp_path, 1)[0].nodes
    assert nodes.summary().warnings == ()
    nodes.observe(ClockContradicted(2, 400.0))
    (said,) = nodes.summary().warnings
    assert "400 s behind" in said
    nodes.observe(ClockAgrees())
    assert nodes.summary().warnings == ()


def test_the_mark_of_blocked_datagrams_goes_at_the_first_proof(tmp_path: Path) -> None:
    house = House(tmp_path, 2)
    nodes, peer = house[0].nodes, house.id(1)
    nodes.observe(PeerMeasured(peer, 0.001, True))
    assert nodes.node(peer).udp_blocked
    bus = house[0].bus
    before = bus.last_id
    nodes.observe(DatagramsPass(peer))
    assert nodes.node(peer).udp_blocked is None
    assert bus.last_id == before + 1, "observers are told"
    nodes.observe(DatagramsPass(peer))
    assert bus.last_id == before + 1
