"""What the service keeps of the protocol's events: marks and warnings come, and go when their cause is gone."""

from pathlib import Path

from protocol.membership.events import DatagramsPass, ForgeryCut, PeerMeasured
from protocol.records.events import ClockAgrees, ClockContradicted, PeerMuted, RecordHeld
from protocol.trust.events import RosterChanged
from protocol.wire.messages import Heartbeat
from tests.cluster.parts import House, keys_of


def test_the_warning_of_the_clock_goes_when_it_agrees_again(tmp_path: Path) -> None:
    nodes = House(tmp_path, 1)[0].nodes
    assert nodes.summary().warnings == ()
    nodes.observe(ClockContradicted(2, 400.0))
    (said,) = nodes.summary().warnings
    assert "400 s behind" in said
    nodes.observe(ClockAgrees())
    assert nodes.summary().warnings == ()


def test_what_is_used_counts_only_where_the_whole_is_known(tmp_path: Path) -> None:
    """A node whose records are held back states its load and not its size: 34 of 24 GiB would be said to be used."""
    house = House(tmp_path, 2)
    beat = Heartbeat(b"\0" * 8, 1, 1, 40, 425, 150, 2000, 30, 500, 61, 990, 0, -1, 3, 100, 7, b"\0" * 8, 1)
    house[0].driver.node.heartbeats.latest[house.id(1)] = (beat, 0.0)
    assert house[0].nodes.node(house.id(1)).ram_used > 0
    summary = house[0].nodes.summary()
    assert (summary.used_ram, summary.total_ram) == (0, 0)
    assert (summary.used_storage, summary.total_storage) == (0, 0)


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


def test_the_clock_of_one_who_left_is_nobodys_trouble(tmp_path: Path) -> None:
    house = House(tmp_path, 2)
    nodes, stranger = house[0].nodes, keys_of(9)[2]
    nodes.observe(RecordHeld("nodes", b"key", stranger, 400.0))
    assert nodes.summary().warnings == ()
    nodes.observe(RecordHeld("nodes", b"key", house.id(1), 400.0))
    (said,) = nodes.summary().warnings
    assert nodes.name_of(house.id(1)) in said


def test_who_lies_is_named_with_what_to_do_until_it_is_out(tmp_path: Path) -> None:
    house = House(tmp_path, 2)
    nodes, liar = house[0].nodes, house.id(1)
    for event, words in ((PeerMuted(liar, 60.0), "ignored for 60 s"), (ForgeryCut(liar), "forged statements")):
        nodes.observe(event)
        (said,) = nodes.summary().warnings
        assert said.startswith(nodes.name_of(liar))
        assert words in said
        assert f"meshnode evict {liar}" in said
    nodes.observe(RosterChanged(removed=(liar,)))
    assert nodes.summary().warnings == ()
