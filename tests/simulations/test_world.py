"""The world itself: order, clocks, pauses, crashes, disks, and equal runs from equal seeds."""

import os
import subprocess
import sys
from pathlib import Path

from protocol.effects import DatagramReceived, Persist, SetTimer, TimerFired
from protocol.ids import Address
from simulations.computer import DOWN, SOCKET_DATAGRAMS_MAX, Computer
from simulations.disk import DiskParams
from simulations.network import NetworkParams
from simulations.world import World
from tests.simulations.echo import EchoMachine, EchoProgram

ROOT = Path(__file__).resolve().parent.parent.parent


def echo_world(count: int = 2, **options: object) -> tuple[World, list[Computer]]:
    world = World(1, program=EchoProgram(), **options)  # type: ignore[arg-type]  # the tests pass what World takes
    computers = world.spawn(count, within_s=0.0)
    world.run(0.001)
    return world, computers


def machine_of(computer: Computer) -> EchoMachine:
    assert isinstance(computer.machine, EchoMachine)
    return computer.machine


def events(computer: Computer, kind: type) -> list[tuple[float, object]]:
    return [(at, event) for at, event in machine_of(computer).log if isinstance(event, kind)]


def test_things_happen_in_the_order_of_their_times_and_equal_times_keep_their_order() -> None:
    world = World(1, program=EchoProgram())
    seen: list[str] = []
    world.at(2.0, seen.append, "c")
    world.at(1.0, seen.append, "a")
    world.at(1.0, seen.append, "b")
    world.run(1.5)
    assert (seen, world.now) == (["a", "b"], 1.5)
    world.run(1.0)
    assert seen == ["a", "b", "c"]


def test_pings_are_answered_and_bytes_are_counted() -> None:
    world, (one, other) = echo_world()
    world.run(10.0)
    assert machine_of(one).answers >= 9
    assert one.sent_bytes == 6 * one.sent_packets
    assert one.sent_packets == other.received_packets


def test_run_until_says_how_long_it_took() -> None:
    world, (one, _) = echo_world()
    took = world.run_until(lambda: machine_of(one).answers >= 3, 10.0)
    assert took is not None
    assert 2.0 < took < 4.0
    assert world.run_until(lambda: False, 1.0) is None


def test_a_frozen_process_sees_nothing_and_then_everything_that_its_kernel_kept() -> None:
    world, (_, other) = echo_world()
    world.run(5.0)
    other.pause()
    handled = len(machine_of(other).log)
    world.run(20.0)
    assert len(machine_of(other).log) == handled
    other.resume()
    world.run(0.1)
    waiting = [event for _, event in machine_of(other).log[handled:]]
    assert sum(isinstance(event, DatagramReceived) for event in waiting) >= 19
    # One timer key is one timer: it fires once, however long it was due.
    assert waiting.count(TimerFired(("echo", "ping"))) == 1


def test_a_frozen_socket_holds_only_so_many_datagrams() -> None:
    world, (one, other) = echo_world()
    other.pause()
    for _ in range(3 * SOCKET_DATAGRAMS_MAX):
        world.network.send(one, other.address, b"ping 1")
    world.run(1.0)
    handled = len(events(other, DatagramReceived))
    other.resume()
    world.run(1.0)
    assert SOCKET_DATAGRAMS_MAX <= len(events(other, DatagramReceived)) - handled <= SOCKET_DATAGRAMS_MAX + 2


def test_a_cancelled_timer_never_fires_not_even_when_it_was_due_in_a_pause() -> None:
    world, (one, other) = echo_world()
    world.run(10.0)
    assert TimerFired(("echo", "late")) not in [event for _, event in machine_of(one).log]
    other.pause()
    world.run(3.0)
    assert TimerFired(("echo", "late")) in [event for _, event in machine_of(one).log]


def test_a_timer_that_moves_later_while_its_process_is_frozen_is_not_lost() -> None:
    world, (one, _) = echo_world()
    one.pause()
    world.run(5.0)
    one.resume()
    world.run(20.0)
    pings = [at for at, event in events(one, TimerFired) if event == TimerFired(("echo", "ping"))]
    assert len(pings) >= 19


def test_drift_makes_timers_of_a_fast_clock_come_early() -> None:
    world, (one, other) = echo_world()
    one.set_drift(1.1)
    world.run(100.0)
    fast, true = (len(events(computer, TimerFired)) for computer in (one, other))
    assert 108 <= fast <= 111
    assert 99 <= true <= 101


def test_wall_clocks_jump_and_monotonic_ones_do_not() -> None:
    _, (one, _) = echo_world()
    now, wall = one.now(), one.wall()
    one.jump_wall(-3600.0)
    assert one.now() == now
    assert one.wall() == wall - 3600.0
    assert abs(one.wall_error() + 3600.0) < 0.001


def test_a_closed_lid_stops_the_monotonic_clock_and_the_network() -> None:
    world, (one, _) = echo_world()
    world.run(3.0)
    before, wall = one.now(), one.wall()
    one.suspend()
    world.run(100.0)
    received = one.received_packets
    one.wake(100.0, one.run)
    assert one.now() - before < 0.001
    assert one.wall() - wall > 99.0
    assert one.received_packets == received
    world.run(5.0)
    assert len([event for at, event in events(one, TimerFired) if at > before]) >= 4


def test_a_crash_loses_what_no_commit_had_finished_and_a_restart_finds_the_rest() -> None:
    world, (one, _) = echo_world(disk=DiskParams(commit_s=1.0, commit_jitter_s=0.0, stall_chance=0.0))
    world.run(2.0)
    assert one.disk.tables["echo"][b"boot"] == b"\x00\x00\x00\x01"
    one.crash()
    assert one.state == DOWN
    one.start()
    assert machine_of(one).boot == 2
    world.run(0.5)
    one.crash()
    assert one.disk.tables["echo"][b"boot"] in (b"\x00\x00\x00\x01", b"\x00\x00\x00\x02")


def test_effects_wait_for_the_persist_before_them_except_datagrams_sent_ahead() -> None:
    world, (one, other) = echo_world(disk=DiskParams(commit_s=1.0, commit_jitter_s=0.0, stall_chance=0.0))
    world.run(3.0)
    told: list[object] = []
    world._on_published.append(lambda computer, event: told.append(event))
    from protocol.effects import Publish, SendDatagram

    received = other.received_packets
    one._perform([Persist("echo", b"k", b"v"), SendDatagram(other.address, b"held", False), Publish("after")])
    one._perform([SendDatagram(other.address, b"first", True), SetTimer(("echo", "x"), one.now() + 0.1)])
    world.run(0.05)
    assert other.received_packets == received + 1
    assert told == []
    world.run(1.1)
    assert told[:1] == ["after"]
    assert one.disk.tables["echo"][b"k"] == b"v"


def test_a_full_disk_holds_everything_back_until_there_is_room() -> None:
    world, (one, _) = echo_world()
    world.run(1.0)
    one.disk.full = True
    one._perform([Persist("echo", b"k", b"v")])
    world.run(5.0)
    assert b"k" not in one.disk.tables["echo"]
    one.disk.full = False
    world.run(2.0)
    assert one.disk.tables["echo"][b"k"] == b"v"


def test_cuts_work_one_way_both_ways_and_are_undone() -> None:
    world, (one, other) = echo_world()
    block = world.network.block({0}, {1})
    assert not world.network.open(one, other)
    assert world.network.open(other, one)
    world.network.unblock(block)
    assert world.network.open(one, other)
    world.network.cut(other)
    received = other.received_packets
    world.run(5.0)
    assert other.received_packets == received
    world.network.plug(other)
    world.run(5.0)
    assert other.received_packets > received


def test_loss_and_duplicates_come_at_the_rates_asked_for() -> None:
    world, (one, other) = echo_world(network=NetworkParams(loss=0.25, duplicate=0.5))
    world.network.params = NetworkParams(loss=0.25, duplicate=0.5)
    before = other.received_packets
    for _ in range(4000):
        world.network.send(one, other.address, b"pong")
    world.run(1.0)
    assert 4000 * 0.75 * 1.5 * 0.95 < other.received_packets - before < 4000 * 0.75 * 1.5 * 1.05


def test_an_address_is_answered_by_who_has_it_now() -> None:
    world, (_, other) = echo_world()
    old = other.address
    other.address = Address("10.1.1.1", 4893)
    world.network.attach(other)
    assert world.network.owner(old) is None
    assert world.network.owner(other.address) is other


def trace_in_another_process(hash_seed: str, scenario: str) -> str:
    code = (
        "from simulations.catalogue import scenarios\n"
        "from simulations.scenarios.scenario import Options\n"
        f"samples = scenarios()['{scenario}'].measure(Options(nodes=5, seed=7, duration_s=40.0))\n"
        "print(samples.trace, samples.events, samples.values)\n"
    )
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    return done.stdout + done.stderr


def test_equal_seeds_give_equal_runs_in_processes_with_other_hash_seeds() -> None:
    for scenario in ("churn", "election"):
        one, other = (trace_in_another_process(seed, scenario) for seed in ("1", "2"))
        assert one == other
        assert one.strip()


def test_other_seeds_give_other_runs() -> None:
    def trace(seed: int) -> int:
        world = World(seed, program=EchoProgram())
        world.spawn(3)
        world.run(5.0)
        return world.trace

    assert trace(1) == trace(1)
    assert trace(1) != trace(2)
