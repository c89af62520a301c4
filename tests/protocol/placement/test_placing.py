"""Which node gets a task, what is said to those that wait, and nodes that are shunned."""

from msgspec import structs

from protocol.heartbeats.events import HeartbeatFlag, HeartbeatHeard
from protocol.membership.events import PeerMeasured
from protocol.placement.commands import StartAttempt
from protocol.placement.scheduling_events import (
    AnswerSubmit,
    NodeShunned,
    NodeTrusted,
    SubmitAsked,
)
from protocol.placement.tasks import Needs
from protocol.wire.messages import Heartbeat
from tests.protocol.placement.coordinator import LENT, ME, A, B, C, Coordinator

# ---- choosing --------------------------------------------------------------------------------------------------------


def test_load_latency_preference_and_input_decide() -> None:
    world = Coordinator()
    world.tell(PeerMeasured(A, 0.02, False))
    world.tell(PeerMeasured(B, 0.001, False))
    world.tell(PeerMeasured(C, 0.02, False))
    world.submit("1")
    assert world.start(world.orders["1"].task)[0] == B
    world.submit("2", needs=Needs(preferred=A))
    assert world.start(world.orders["2"].task)[0] == A
    world.submit("3", needs=Needs(node=C))
    assert world.start(world.orders["3"].task)[0] == C
    world.tell(PeerMeasured(A, 0.0, False))
    world.lent[C] = structs.replace(LENT, inputs=(b"12345678",))
    world.tell(PeerMeasured(C, 0.0, False))
    world.report(C)
    world.submit("4", ME, stdin_bytes=10**6, stdin_sha256=b"12345678" * 4)
    assert world.start(world.orders["4"].task)[0] == C


def test_throttled_nodes_come_last() -> None:
    world = Coordinator(A, B)
    beat = Heartbeat(b"s" * 8, 1, 1, 10, 0, 0, 0, 0, -1, -128, -1, HeartbeatFlag.THROTTLED, -1, 0, 0, -1, b"f" * 8, 1)
    world.tell(HeartbeatHeard(A, beat, 0.0))
    for name in ("1", "2", "3"):
        world.submit(name)
        assert world.start(world.orders[name].task)[0] == B


def test_why_it_waits_is_said() -> None:
    world = Coordinator(A)
    world.submit("1", needs=Needs(cpus=4.0))
    world.submit("2", needs=Needs(cpus=4.0))
    world.submit("3", needs=Needs(cpus=4.0))
    world.submit("9", needs=Needs(ram_bytes=10**6))
    assert world.words("2") == "it is the next"
    assert "about 1 are served before it" in world.words("3")
    assert "none of 4 nodes can ever run it; node comes closest: it lends 1000 B of RAM" in world.words("9")
    assert world.position("9").never
    stats = world.stats()
    assert (stats.queued, stats.by_priority, stats.by_submitter) == (3, (0, 3, 0, 0), ((C, 3),))


def test_a_full_queue_refuses_with_how_long_to_wait_but_keeps_what_it_knows() -> None:
    world = Coordinator(A, queue_max=10)
    for index in range(9):
        world.submit(f"{index}")
    assert world.stats().queued == 5

    def ask(task: str, submitter: str = C):
        world.tell(SubmitAsked(1, world.order(task, submitter), world.wall))
        return world.of(AnswerSubmit)[-1].answer

    answer = ask("10")
    assert (answer.code, answer.words) == (
        "overloaded",
        "5 tasks of this node wait already, half of what may wait in all.",
    )
    assert answer.retry_after_s >= 1.0
    assert ask("8").code == ""  # it is in the queue already
    for index in range(11, 16):
        assert ask(f"{index}", B).code == ""
    full = ask("20", A)
    assert (full.code, full.position, full.words) == ("overloaded", 10, "10 tasks wait already.")
    world.wait(11.0)
    assert ask("20", A).code == ""  # nothing came of those that were admitted
    world.submit("21")
    assert world.stats().queued == 6  # acknowledged elsewhere


def test_the_answer_to_a_submission_says_if_no_node_can_ever_run_it() -> None:
    world = Coordinator(A)
    world.tell(SubmitAsked(1, world.order("1", needs=Needs(gpus=1)), world.wall))
    answer = world.of(AnswerSubmit)[-1].answer
    assert (answer.code, answer.never) == ("", True)
    assert "it lends 0 GPUs, not 1" in answer.words


def test_a_large_task_gets_a_node_though_small_ones_would_fill_every_gap() -> None:
    world = Coordinator(A)
    running = []

    def fill() -> None:
        for name, order in list(world.orders.items()):
            starts = world.commands(StartAttempt, order.task)
            if name in small and starts and starts[-1][1].attempt not in {*world.runs[A], *ended}:
                running.append((name, *world.run(name)))

    small: set[str] = set()
    ended: set[str] = set()
    for index in range(400):
        small.add(f"{index}")
        world.submit(f"{index}")
    fill()
    world.submit("a", B, needs=Needs(cpus=4.0))
    for _ in range(150):
        world.wait(1.0)
        if not running:
            break
        name, node, attempt = running.pop(0)
        ended.add(attempt)
        world.end(name, node, attempt)
        world.record(node, name, world.ended)
        fill()
    assert len(world.commands(StartAttempt, world.orders["a"].task)) == 1


# ---- breakers --------------------------------------------------------------------------------------------------------


def test_a_node_that_fails_three_times_is_shunned_then_probed_then_trusted() -> None:
    world = Coordinator(A)
    for index in range(3):
        world.submit(f"{index}", retries=0)
        node, attempt = world.run(f"{index}")
        world.end(f"{index}", node, attempt, "refused", words="bwrap: no namespaces", started_ms=0)
    assert [(each.node, each.pause_s) for each in world.published(NodeShunned)] == [(A, 30.0)]
    for name in ("a", "b", "c"):
        world.submit(name)
    assert (world.stats_of(A).breaker, world.stats_of(A).words) == ("open", "bwrap: no namespaces")
    world.wait(29.0)
    assert len(world.commands()) == 3
    world.wait(1.1)
    assert len(world.commands()) == 5
    for name in ("a", "b"):
        node, attempt = world.run(name)
        world.end(name, node, attempt, code=1)  # the task's own failure
    assert world.published(NodeTrusted) == [NodeTrusted(A)]
    assert len(world.commands()) == 6


def test_what_got_no_input_is_nobodys_fault() -> None:
    world = Coordinator(A)
    for index in range(9):
        world.submit(f"{index}", retries=0)
        node, attempt = world.run(f"{index}")
        world.end(f"{index}", node, attempt, "no_input", words="nobody has it", started_ms=0)
    assert world.published(NodeShunned) == []
    assert len(world.commands()) == 9
    world.wait(1.1)
    assert len(world.commands()) > 9


def test_what_a_task_does_wrong_is_not_its_nodes_fault() -> None:
    world = Coordinator(A)
    for index in range(9):
        world.submit(f"{index}", retries=0)
        node, attempt = world.run(f"{index}")
        world.end(f"{index}", node, attempt, "refused", code=127, started_ms=0)
    assert world.published(NodeShunned) == []
