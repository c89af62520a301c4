"""Tasks over a mesh where agents and machines die, part, stall, fill up and are evicted: nothing acknowledged is lost.

Patterns: none (all faults), a comma-separated choice of kinds of faults, `takeover` (the coordinator dies with 500
tasks queued and 20 running) or `busy` (one submitter floods the mesh with urgent tasks: the others must not starve).
"""

from collections.abc import Sequence
from random import Random

from protocol.ids import NodeId
from protocol.placement.tasks import Mode, Needs, Wish, task_collections
from simulations.checkers.checker import Violation
from simulations.checkers.tasks import Tasks as TaskChecker
from simulations.computer import DOWN, RUNNING, Computer
from simulations.faults import SHAPES, Fault, Faults, draw
from simulations.scenarios.scenario import Figure, Mesh, Options, Samples, mesh, quantile, worst
from simulations.tasks.fabric import SLOTS, Fabric
from simulations.tasks.member import Member

BEGIN_S = 8.0
FAULTS_S = 60.0
DRAINED_WITHIN_S = 300.0
QUIET_WITHIN_S = 60.0
CLOCK_JUMP_S = 280.0
"""Records of clocks that are more than 300 s ahead wait until their time has come: by design, and not tried here."""

KINDS = ",".join(shape.kind for shape in SHAPES if not shape.kind.startswith("wall"))
TAKEOVER_NODES = 6
QUEUED = 500
TAKEOVER_GOAL_S = 1.5
BUSY_NODES = 3
BUSY_S = 420.0
STARVED_S = 240.0


class Tasks:
    """--nodes 0 draws the size from the seed."""

    name = "tasks"
    about = "tasks over nodes that die, part, stall and are evicted: nothing acknowledged is lost or done twice unasked"
    nodes = 0

    def measure(self, options: Options) -> Samples:
        """One world."""
        match options.pattern:
            case "takeover":
                return _takeover(options)
            case "busy":
                return _busy(options)
        return _history(options)

    def judge(self, samples: Samples, options: Options) -> Sequence[Figure]:
        """What must never happen is the checker's business."""
        match options.pattern:
            case "takeover":
                return (
                    Figure("detection_worst", worst(samples.of("detection_s")), "s"),
                    Figure("placing_again_p50", quantile(samples.of("placing_s"), 0.5), "s"),
                    Figure("placing_again_worst", worst(samples.of("placing_s")), "s", TAKEOVER_GOAL_S),
                    Figure("placing_at_most_once_after_the_death_worst", worst(samples.of("placing_once_s")), "s"),
                    Figure("queued_at_the_death", min(samples.of("queued"), default=None), "", QUEUED, at_least=True),
                    Figure("running_at_the_death", min(samples.of("running"), default=None), "", 20.0, at_least=True),
                    Figure("lost", sum(samples.of("lost")), "", 0.0),
                    Figure("doubled", sum(samples.of("doubled")), "", 0.0),
                )
            case "busy":
                return (
                    Figure("tasks", sum(samples.of("tasks")), ""),
                    Figure("longest_wait_in_the_background", worst(samples.of("background_s")), "s", STARVED_S),
                    Figure("longest_wait_of_another_submitter", worst(samples.of("other_s")), "s", STARVED_S),
                )
        return (
            Figure("histories", float(len(samples.of("taken"))), ""),
            Figure("faults", sum(samples.of("faults")), ""),
            Figure("acknowledged", sum(samples.of("taken")), ""),
            Figure("ran_more_than_once", sum(samples.of("again")), ""),
            Figure("ended_as_lost", sum(samples.of("lost")), ""),
            Figure("drained_p50", quantile(samples.of("drained_s"), 0.5), "s"),
            Figure("drained_worst", worst(samples.of("drained_s")), "s", DRAINED_WITHIN_S),
        )


# ---- all faults ------------------------------------------------------------------------------------------------------


def _history(options: Options) -> Samples:
    rng = Random(f"tasks-history/{options.seed}")
    nodes = options.nodes or rng.choice((3, 3, 4, 5, 6))
    run = _Run(options, rng, own_rosters=True)
    world, made = run.world, run.made
    faults = Faults(world)
    world.spawn(nodes, within_s=rng.choice((0.1, 1.0)))
    end = BEGIN_S + (options.duration_s or FAULTS_S)
    plan = draw(rng, nodes, BEGIN_S, end, per_minute=rng.choice((4.0, 8.0, 16.0)), kinds=options.pattern or KINDS)
    for index in rng.sample(range(nodes), rng.choice((0, 0, 1, 2))):
        at = rng.uniform(BEGIN_S, end)
        plan.append(Fault(at, "wall-jump", (index,), end - at, rng.uniform(-CLOCK_JUMP_S, CLOCK_JUMP_S)))
    faults.schedule(plan)
    world.at(BEGIN_S / 2, run.people, rng.choice((0.4, 1.0, 3.0)), end)
    if nodes > 3 and rng.random() < 0.3:
        victim, by = rng.sample(world.computers, 2)
        world.at(rng.uniform(BEGIN_S, end - 20.0), run.evict, victim, by)
    world.run_to(end)
    world.tell_fault("peace")
    for computer in world.computers:
        run.fabric.close(computer, "")
    made.settle()
    drained = world.run_until(lambda: not run.open(), DRAINED_WITHIN_S, step_s=1.0)
    if drained is None:
        raise Violation("tasks", world.now, f"{len(run.open())} wait in peace: {'; '.join(run.open()[:4])}")
    if world.run_until(lambda: not run.unquiet(), QUIET_WITHIN_S, step_s=1.0) is None:
        raise Violation("tasks", world.now, f"all have ended, and yet {run.unquiet()}")
    samples = Samples()
    samples.add("faults", float(len(plan)))
    samples.add("taken", float(len(run.tasks.taken)))
    samples.add("again", float(sum(count > 1 for count in run.tasks.starts.values())))
    samples.add("lost", float(run.count("lost")))
    samples.add("drained_s", drained)
    return made.done(samples)


class _Run:
    """One world with tasks, and what people do in it."""

    def __init__(self, options: Options, rng: Random, *, own_rosters: bool = False) -> None:
        self.rng = rng
        self.fabric = Fabric(options.seed)
        self.tasks = TaskChecker(self.fabric)
        self.made: Mesh = mesh(
            options, checkers=(self.fabric, self.tasks), own_rosters=own_rosters, collections=task_collections()
        )
        self.world = self.made.world
        self.gone: frozenset[NodeId] = frozenset()

    def people(self, pause_s: float, end: float) -> None:
        """Somebody submits a task, or cancels or repeats one, or lends nothing for a while; and the next one soon."""
        if self.world.now >= end:
            return
        rng = self.rng
        self.world.after(rng.expovariate(1 / pause_s), self.people, pause_s, end)
        member = self.anybody()
        if member is None:
            return
        if rng.random() < 0.85:
            self._submit(member)
        elif rng.random() < 0.3:
            computer = rng.choice(self.world.computers)
            self.fabric.close(computer, rng.choice(("it runs on its battery", "not at this hour")))
            self.world.after(rng.uniform(2.0, 20.0), self.fabric.close, computer, "")
        elif self.tasks.taken:
            key = rng.choice(list(self.tasks.taken))
            wish = member.index.wishes.get(key, Wish())
            if key[0] == member.me:
                anew = rng.random() < 0.4
                member.writer.wish(key, Wish(wish.generation + 1) if anew else Wish(wish.generation, cancelled=True))

    def _submit(self, member: Member) -> None:
        rng, before = self.rng, len(self.tasks.taken)
        self.fabric.submit(
            member,
            Needs(cpus=rng.choice((0.5, 1.0, 1.0, 2.0, 4.0))),
            rng.choice((0.05, 0.5, 2.0, 8.0, 20.0)),
            int(rng.random() < 0.2),
            mode=rng.choice(("at_least_once", "at_most_once")),
            retries=rng.choice((0, 0, 1, 3)),
            priority=rng.randrange(4),
        )
        if rng.random() < 0.1:
            self._die_after_the_answer(member.computer, before, 200)

    def _die_after_the_answer(self, submitter: Computer, before: int, looks: int) -> None:
        """Its submitter dies as soon as it was told that the task is taken."""
        if len(self.tasks.taken) == before and looks:
            self.world.after(0.005, self._die_after_the_answer, submitter, before, looks - 1)
        elif looks and submitter.state != DOWN:
            self.world.tell_fault(f"{submitter} dies right after it took a task")
            submitter.crash(power=self.rng.random() < 0.5)
            self.world.after(self.rng.uniform(0.5, 20.0), submitter.start)

    def evict(self, victim: Computer, by: Computer) -> None:
        """It is never let in again."""
        if by.state == RUNNING and not by.disk.full:
            self.world.tell_fault(f"{by} evicts {victim}")
            self.made.program.evict(victim, by)
            self.made.views.evicted(victim)
            self.gone = frozenset({victim.node_id})

    def anybody(self) -> Member | None:
        """A member whose agent runs."""
        up = [one for one in self.fabric.members.values() if one.is_recovered and one.computer.state == RUNNING]
        up = [one for one in up if not one.computer.evicted]
        return self.rng.choice(sorted(up, key=lambda one: one.computer.index)) if up else None

    def open(self) -> list[str]:
        """What has not ended."""
        return self.tasks.open(self.gone)

    def unquiet(self) -> str:
        """What still runs or waits although everything has ended; empty: nothing."""
        for member in self.fabric.members.values():
            knows = member.me not in member.hub.roster
            if member.computer.evicted and not knows:
                continue
            if member.executing.attempts:
                return f"{member.computer} still runs {len(member.executing.attempts)} attempts"
            queued = member.scheduling.stats(member.computer.now()).queued
            if member.scheduling.is_coordinator and queued:
                return f"{queued} are queued at {member.computer}"
        return ""

    def count(self, state: str) -> int:
        """How many acknowledged tasks stand so, as any member sees it."""
        members = [one for one in self.fabric.members.values() if not one.computer.evicted]
        wheres = [self.tasks.standing(members[0], key) for key in self.tasks.taken] if members else []
        return sum(where is not None and where.state == state for where in wheres)


# ---- the death of a coordinator --------------------------------------------------------------------------------------


def _takeover(options: Options) -> Samples:
    rng = Random(f"tasks-takeover/{options.seed}")
    run = _Run(options, rng)
    world, fabric, made = run.world, run.fabric, run.made
    world.spawn(options.nodes or TAKEOVER_NODES)
    world.run(1.0)
    made.settle()
    world.run_until(lambda: _coordinator(run) is not None, 60.0)
    leader = _coordinator(run)
    assert leader is not None
    # What ran on it would be followed by others after a while, and so run twice: that is another figure.
    fabric.close(leader.computer, "it coordinates only")
    world.run(2.0)
    others = [one for one in fabric.members.values() if one is not leader]
    running = SLOTS * len(others)
    for number in range(QUEUED + running):
        fabric.submit(
            rng.choice(others),
            Needs(cpus=1.0),
            rng.uniform(4.0, 12.0),
            0,
            mode=("at_least_once", "at_most_once")[number % 2],
        )
        world.run(0.002)
    took = world.run_until(lambda: len(run.tasks.taken) == QUEUED + running, 30.0)
    if took is None:
        raise Violation("tasks", world.now, f"only {len(run.tasks.taken)} tasks were taken")
    # Those that ended meanwhile are made up for, so that the queue is as long as is asked.
    samples = Samples()
    stats = leader.scheduling.stats(leader.computer.now())
    for _ in range(QUEUED - stats.queued):
        fabric.submit(rng.choice(others), Needs(cpus=1.0), rng.uniform(4.0, 12.0), 0)
    world.run(1.0)
    stats = leader.scheduling.stats(leader.computer.now())
    samples.add("queued", float(stats.queued))
    samples.add("running", float(stats.running + stats.promised))
    died = world.now
    world.tell_fault(f"{leader.computer} dies")
    dead = leader.computer
    dead.crash()
    placed = len(run.tasks.placed)

    def again(mode: Mode) -> float | None:
        return next((at for at, each in run.tasks.placed[placed:] if each == mode), None)

    world.run_until(lambda: any(one.scheduling.is_coordinator for one in fabric.members.values()), 60.0, step_s=0.01)
    samples.add("detection_s", world.now - died)
    world.run_until(lambda: again("at_least_once") is not None, 60.0)
    world.run_until(lambda: again("at_most_once") is not None, 60.0)
    first, once = again("at_least_once"), again("at_most_once")
    if first is None or once is None:
        raise Violation("tasks", world.now, "nothing is placed any more")
    samples.add("placing_s", first - died - samples.of("detection_s")[0])
    samples.add("placing_once_s", once - died)
    world.run(20.0)
    dead.start()
    drained = world.run_until(lambda: not run.open(), 600.0, step_s=1.0)
    samples.add("lost", float(len(run.open())) if drained is None else float(run.count("lost")))
    samples.add("doubled", float(sum(count > 1 for count in run.tasks.starts.values())))
    return made.done(samples)


def _coordinator(run: _Run) -> Member | None:
    """Whoever coordinates and is quorate."""
    for member in run.fabric.members.values():
        computer = member.computer
        if member.scheduling.is_coordinator and member.hub.election.is_quorate(computer.now(), computer.wall()):
            return member
    return None


# ---- a flood ---------------------------------------------------------------------------------------------------------


def _busy(options: Options) -> Samples:
    rng = Random(f"tasks-busy/{options.seed}")
    run = _Run(options, rng)
    world, fabric = run.world, run.fabric
    world.spawn(options.nodes or BUSY_NODES)
    world.run(1.0)
    run.made.settle()
    world.run(BEGIN_S)
    one, other = (fabric.members[index] for index in (0, 1))
    slots = SLOTS * len(fabric.members)
    end = world.now + (options.duration_s or BUSY_S)
    marked: dict[str, list[tuple[NodeId, str]]] = {"background_s": [], "other_s": []}

    def flood() -> None:
        if world.now < end:
            world.after(0.8 * 2.0 / slots, flood)  # a quarter more than there is room for
            fabric.submit(one, Needs(cpus=1.0), 2.0, 0, priority=3)

    def quiet() -> None:
        if world.now < end - STARVED_S:
            world.after(5.0, quiet)
            marked["background_s"].append(fabric.submit(one, Needs(cpus=1.0), 2.0, 0, priority=0))
            marked["other_s"].append(fabric.submit(other, Needs(cpus=2.0), 2.0, 0, priority=1))

    flood()
    quiet()
    world.run_to(end)
    samples = Samples()
    samples.add("tasks", float(len(run.tasks.taken)))
    for name, keys in marked.items():
        samples.add(name, *(run.tasks.waited.get(key, STARVED_S * 2) for key in keys))
    return run.made.done(samples)
