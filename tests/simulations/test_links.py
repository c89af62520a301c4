"""Simulated control links: set-up, order, and every way in which they break."""

from protocol.effects import FrameReceived, LinkLost, LinkOpened
from protocol.ids import NodeId
from simulations.computer import Computer
from simulations.world import World
from tests.simulations.test_world import echo_world, events, machine_of


def lost(computer: Computer) -> list[str]:
    return [event.reason for _, event in events(computer, LinkLost) if isinstance(event, LinkLost)]


def linked() -> tuple[World, Computer, Computer]:
    world, (one, other) = echo_world()
    world.links.send(one, other.node_id, b"hello")
    world.run(1.0)
    assert [event for _, event in events(one, LinkOpened)] == [LinkOpened(other.node_id, machine_of(other).boot)]
    return world, one, other


def test_frames_arrive_in_order_and_both_ends_hear_of_the_link() -> None:
    world, one, other = linked()
    for number in range(50):
        world.links.send(one, other.node_id, b"%d" % number)
    world.run(1.0)
    frames = [event.data for _, event in events(other, FrameReceived) if isinstance(event, FrameReceived)]
    assert frames == [b"hello", *(b"%d" % number for number in range(50))]
    answers = [event.data for _, event in events(one, FrameReceived) if isinstance(event, FrameReceived)]
    assert answers == [b"re:" + frame for frame in frames]
    assert one.link_sent_bytes > 1500


def test_nobody_there_means_refused_and_a_cut_path_means_timeout() -> None:
    world, (one, other) = echo_world()
    other.crash()
    world.links.send(one, other.node_id, b"x")
    world.run(1.0)
    assert lost(one) == ["connection refused"]
    other.start()
    world.network.cut(other)
    world.links.send(one, other.node_id, b"x")
    world.run(5.0)
    assert len(lost(one)) == 1
    world.run(15.0)
    assert lost(one)[1:] == ["connecting timed out"]


def test_a_stranger_is_refused_and_an_unknown_id_has_no_address() -> None:
    world, (one, other) = echo_world()
    other.program.outlaws.add(one.node_id)  # type: ignore[attr-defined]  # the echo program has it
    world.links.send(one, other.node_id, b"x")
    world.links.send(one, NodeId("a" * 32), b"x")
    world.run(1.0)
    assert sorted(lost(one)) == ["no known address answers", "refused: not a member"]


def test_a_killed_process_resets_its_links_and_a_pulled_plug_is_only_silence() -> None:
    world, one, other = linked()
    other.crash()
    world.run(0.5)
    assert lost(one) == ["reset by peer"]
    world, one, other = linked()
    other.crash(power=True)
    world.run(5.0)
    assert lost(one) == []
    world.run(10.0)
    assert lost(one) == ["no answer to keep-alives"]


def test_a_short_cut_only_delays_frames_and_a_long_one_breaks_the_link() -> None:
    world, one, other = linked()
    world.network.cut(other)
    world.links.send(one, other.node_id, b"late")
    world.run(3.0)
    world.network.plug(other)
    world.run(4.0)
    assert [event.data for _, event in events(other, FrameReceived) if isinstance(event, FrameReceived)][-1] == b"late"
    assert lost(one) == []
    world.network.cut(other)
    world.links.send(one, other.node_id, b"never")
    world.run(20.0)
    assert lost(one) == lost(other) == ["no acknowledgement"]


def test_a_frozen_peer_keeps_its_link_and_reads_later() -> None:
    world, one, other = linked()
    other.pause()
    world.links.send(one, other.node_id, b"wait")
    world.run(30.0)
    other.resume()
    world.run(1.0)
    assert [event.data for _, event in events(other, FrameReceived) if isinstance(event, FrameReceived)][-1] == b"wait"
    assert lost(one) == []


def test_who_closes_is_told_nothing_and_the_peer_why() -> None:
    world, one, other = linked()
    world.links.close(one, other.node_id, "evicted")
    world.run(1.0)
    assert lost(one) == []
    assert lost(other) == ["closed by peer: evicted"]
    assert len(world.links) == 0


def test_idle_links_go_away() -> None:
    world, one, other = linked()
    world.run(300.0)
    assert lost(one) == lost(other) == ["idle"]
    assert len(world.links) == 0
