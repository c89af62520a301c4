"""Which node gets a task, what is said to those that wait, and nodes that are shunned."""

from msgspec import structs

from protocol.heartbeats.events import HeartbeatFlag, HeartbeatHeard
from protocol.membership.events import PeerDown, PeerMeasured, RosterShrank
from protocol.placement.commands import Capacity, StartAttempt
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
    assert world.words("2") == "no node has room for it now; it is the next"
    assert "about 1 are served before it" in world.words("3")
    assert "none of 4 nodes can ever run it; node comes closest: it lends 1000 B of RAM at most" in world.words("9")
    assert world.position("9").never
    stats = world.stats()
    assert (stats.queued, stats.by_priority, stats.by_submitter) == (3, (0, 3, 0, 0), ((C, 3),))


def test_what_others_use_at_the_moment_is_not_called_impossible() -> None:
    world = Coordinator(A)
    world.lent[A] = structs.replace(LENT, most=Capacity(ram_bytes=4000))
    world.report(A)
    world.submit("1", needs=Needs(ram_bytes=3000))
    world.submit("2", needs=Needs(ram_bytes=5000))
    assert (world.words("1"), world.position("1").never) == ("no node has room for it now; it is the next", False)
    assert world.words("2").endswith("it lends 3.906 KiB of RAM at most, not 4.883 KiB")
    assert world.commands() == []
    world.lent[A] = structs.replace(LENT, capacity=Capacity(4.0, 3500, 0, 0, 1000, 4), most=Capacity(ram_bytes=4000))
    world.report(A)
    assert world.start("1".rjust(16, "0"))[0] == A


def test_nobody_waits_behind_what_nobody_can_run() -> None:
    world = Coordinator(A)
    world.submit("1", needs=Needs(cpus=4.0))
    for name in "2345":
        world.submit(name, needs=Needs(gpus=1), priority=2 if name == "5" else 1)
    for name in "67":
        world.submit(name, needs=Needs(cpus=4.0))
    world.wait(1.0)
    assert [world.position(name).position for name in "67"] == [0, 1]
    world.tell(SubmitAsked(1, world.order("8"), world.wall))
    assert world.of(AnswerSubmit)[-1].answer.position == 2


def test_a_closed_node_says_why_to_those_that_wait_for_it() -> None:
    world = Coordinator(A)
    world.lent[A] = structs.replace(LENT, name="attic", closed="its owner lets tasks start only 22:00-06:30")
    world.report(A)
    world.submit("1")
    world.submit("2", needs=Needs(node=A))
    shut = "attic could run it and takes nothing now: its owner lets tasks start only 22:00-06:30"
    assert world.words("1") == f"{shut}; it is the next"
    assert world.words("2") == f"{shut}; about 1 are served before it"
    world.tell(PeerDown(A, (B, C)))
    assert world.words("2") == "it must run on attic, which is not heard now"
    assert world.stats_of(A).words == "it is not heard"


def test_a_required_node_that_was_evicted_is_not_waited_for_without_a_word() -> None:
    world = Coordinator(A, B)
    world.submit("1", needs=Needs(node=A))
    world.run("1")
    world.roster.evicted.add(A)
    world.roster._settle()
    world.tell(RosterShrank((A,)))
    assert world.position("1").never
    assert world.words("1").startswith("it must run on a, which is no member of the mesh any more")


def test_a_task_of_a_new_admin_is_taken_where_admins_are() -> None:
    world = Coordinator(A)
    world.lent[A] = structs.replace(LENT, accepts="admins")
    world.report(A)
    world.submit("1")
    assert world.position("1").never
    world.roster.role = lambda node: "admin"
    world.learn("1")
    assert world.start("1".rjust(16, "0"))[0] == A


def test_one_failure_is_no_reason_to_get_nothing() -> None:
    world = Coordinator(A)
    world.submit("1")
    node, attempt = world.run("1")
    world.end("1", node, attempt, "refused", words="bwrap: no namespaces", started_ms=0)
    assert (world.stats_of(A).breaker, world.stats_of(A).failures, world.stats_of(A).words) == ("closed", 1, "")


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
    world.submit("20", A)  # its record comes before it is taken back
    assert world.stats().queued == 5
    world.wait(11.0)
    assert ask("20", A).code == ""  # nothing came of those that were admitted
    world.submit("21")
    assert world.stats().queued == 6  # acknowledged elsewhere


def test_the_answer_to_a_submission_says_if_no_node_can_ever_run_it() -> None:
    world = Coordinator(A)
    world.tell(SubmitAsked(1, world.order("1", needs=Needs(gpus=1)), world.wall))
    answer = world.of(AnswerSubmit)[-1].answer
    assert (answer.code, answer.never) == ("", True)
    assert "it lends 0 GPUs at most, not 1" in answer.words


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
    told = world.stats_of(A)
    assert (told.breaker, told.breaker_s, told.failures) == ("open", 30.0, 3)
    shut = "it failed 3 times in a row, and is tried again in 30 s; the last failure: bwrap: no namespaces"
    assert told.words == shut
    assert world.words("a") == f"node could run it and takes nothing now: {shut}; it is the next"
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
