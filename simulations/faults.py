"""Faults and schedules of them, drawn from a seed: what is done to a world, when, and how it is undone.

A schedule is plain data, so that a failing one can be printed, replayed and shortened.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Final

from simulations.computer import DOWN, Computer
from simulations.network import Block
from simulations.world import World


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault: at virtual time `at`, for `lasts_s` seconds, on computers by index; `amount` depends on the kind."""

    at: float
    kind: str
    targets: tuple[int, ...]
    lasts_s: float
    amount: float = 0.0

    def __str__(self) -> str:
        where = ",".join(map(str, self.targets))
        return f"{self.kind} #{where} for {self.lasts_s:.2f} s (amount {self.amount:.3g})"


@dataclass(frozen=True, slots=True)
class Shape:
    """How one kind of fault is drawn."""

    kind: str
    weight: float
    lasts_s: tuple[float, float]
    share: tuple[float, float] = (0.0, 0.0)  # of the computers; (0, 0): exactly one
    amount: tuple[float, float] = (0.0, 0.0)


SHAPES: Final[tuple[Shape, ...]] = (
    Shape("crash", 4.0, (0.5, 30.0)),
    Shape("power", 2.0, (2.0, 30.0)),
    Shape("crash-many", 1.0, (1.0, 20.0), share=(0.2, 0.6)),
    Shape("pause", 3.0, (0.2, 40.0)),
    Shape("suspend", 1.0, (5.0, 60.0), amount=(0.0, 1.0)),
    Shape("cut", 3.0, (0.5, 40.0)),
    Shape("cut-in", 1.5, (0.5, 30.0)),
    Shape("cut-out", 1.5, (0.5, 30.0)),
    Shape("flap", 1.5, (10.0, 40.0), amount=(0.3, 4.0)),
    Shape("split", 2.5, (2.0, 45.0), share=(0.1, 0.5)),
    Shape("split-one-way", 1.5, (2.0, 30.0), share=(0.1, 0.5)),
    Shape("wall-jump", 1.5, (5.0, 40.0), amount=(-7200.0, 7200.0)),
    Shape("wall-far", 0.5, (10.0, 30.0), amount=(3e8, 5e8)),
    Shape("drift", 1.0, (10.0, 60.0), amount=(0.98, 1.02)),
    Shape("disk-full", 1.0, (1.0, 20.0)),
    Shape("disk-slow", 1.0, (5.0, 30.0), amount=(10.0, 300.0)),
    Shape("slow", 1.0, (5.0, 30.0), amount=(0.001, 0.02)),
    Shape("lossy", 1.5, (5.0, 40.0), amount=(0.05, 0.5)),
    Shape("storm", 1.0, (5.0, 30.0), amount=(0.02, 0.25)),
)


def draw(rng: Random, nodes: int, begin: float, end: float, per_minute: float, kinds: str | None = None) -> list[Fault]:
    """A schedule in which every fault begins after `begin` and is undone by `end`; `kinds` names those to draw."""
    wanted = None if kinds is None else set(kinds.split(","))
    shapes = [shape for shape in SHAPES if wanted is None or shape.kind in wanted]
    plan: list[Fault] = []
    at = begin
    weights = [shape.weight for shape in shapes]
    while True:
        at += rng.expovariate(per_minute / 60.0)
        if at >= end:
            return plan
        shape = rng.choices(shapes, weights)[0]
        low, high = shape.share
        count = 1 if high == 0.0 else max(1, min(nodes - 1, round(nodes * rng.uniform(low, high))))
        targets = tuple(sorted(rng.sample(range(nodes), count)))
        lasts_s = min(rng.uniform(*shape.lasts_s), end - at)
        plan.append(Fault(round(at, 3), shape.kind, targets, round(lasts_s, 3), rng.uniform(*shape.amount)))


class Faults:
    """Does faults to one world and undoes them. `touched` has the index of everyone who ever suffered one."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.touched: set[int] = set()
        self.weather = False  # loss or reordering for everybody: nobody is untouched then
        self._actions: dict[str, Callable[[list[Computer], Fault], None]] = {
            "crash": self._crash,
            "power": self._crash,
            "crash-many": self._crash,
            "pause": self._pause,
            "suspend": self._suspend,
            "cut": self._cut,
            "cut-in": self._cut,
            "cut-out": self._cut,
            "flap": self._flap,
            "split": self._split,
            "split-one-way": self._split,
            "wall-jump": self._wall,
            "wall-far": self._wall,
            "drift": self._drift,
            "disk-full": self._disk,
            "disk-slow": self._disk,
            "slow": self._slow,
            "lossy": self._lossy,
            "storm": self._storm,
        }

    def schedule(self, plan: Sequence[Fault]) -> None:
        """Let every fault of the plan happen at its time."""
        for fault in plan:
            self._world.at(fault.at, self.do, fault)

    def do(self, fault: Fault) -> None:
        """Let one fault begin now; it undoes itself."""
        computers = [self._world.computers[index] for index in fault.targets]
        self._world.tell_fault(str(fault))
        self.touched.update(fault.targets)
        self._actions[fault.kind](computers, fault)

    def _crash(self, computers: list[Computer], fault: Fault) -> None:
        power = fault.kind == "power"
        for computer in computers:
            if computer.state != DOWN:
                computer.crash(power=power)
                self._world.after(fault.lasts_s, _revive, computer, power)

    def _pause(self, computers: list[Computer], fault: Fault) -> None:
        for computer in computers:
            if computer.state != DOWN and not computer.paused:
                computer.pause()
                self._world.after(fault.lasts_s, _thaw, computer, computer.run)

    def _suspend(self, computers: list[Computer], fault: Fault) -> None:
        for computer in computers:
            if computer.state != DOWN and not computer.paused:
                computer.suspend()
                # Some systems' monotonic clocks stand still meanwhile (Linux's CLOCK_BOOTTIME goes on).
                stood_still_s = fault.lasts_s if fault.amount < 0.5 else 0.0
                self._world.after(fault.lasts_s, computer.wake, stood_still_s, computer.run)

    def _cut(self, computers: list[Computer], fault: Fault) -> None:
        for computer in computers:
            inward, outward = int(fault.kind != "cut-out"), int(fault.kind != "cut-in")
            _bend(computer, inward, outward)
            self._world.after(fault.lasts_s, _bend, computer, -inward, -outward)

    def _flap(self, computers: list[Computer], fault: Fault) -> None:
        end = self._world.now + fault.lasts_s
        for computer in computers:
            self._swing(computer, fault.amount, end, False)

    def _swing(self, computer: Computer, period_s: float, end: float, is_cut: bool) -> None:
        network, now = self._world.network, self._world.now
        if is_cut:
            network.plug(computer)
        elif now < end:
            network.cut(computer)
        else:
            return
        self._world.at(min(now + period_s, end), self._swing, computer, period_s, end, not is_cut)

    def _split(self, computers: list[Computer], fault: Fault) -> None:
        one = set(fault.targets)
        other = {computer.index for computer in self._world.computers} - one
        self.touched.update(other)
        network = self._world.network
        blocks = network.split(one, other) if fault.kind == "split" else [network.block(one, other)]
        self._world.after(fault.lasts_s, _heal, self._world, blocks)

    def _wall(self, computers: list[Computer], fault: Fault) -> None:
        for computer in computers:
            computer.jump_wall(fault.amount)
            self._world.after(fault.lasts_s, computer.jump_wall, -fault.amount)

    def _drift(self, computers: list[Computer], fault: Fault) -> None:
        for computer in computers:
            computer.set_drift(fault.amount)
            self._world.after(fault.lasts_s, computer.set_drift, 1.0)

    def _disk(self, computers: list[Computer], fault: Fault) -> None:
        for computer in computers:
            if fault.kind == "disk-full":
                computer.disk.full = True
            else:
                computer.disk.slowness = fault.amount
            self._world.after(fault.lasts_s, _mend_disk, computer)

    def _slow(self, computers: list[Computer], fault: Fault) -> None:
        for computer in computers:
            computer.service_s = fault.amount
            self._world.after(fault.lasts_s, _hurry, computer)

    def _lossy(self, computers: list[Computer], fault: Fault) -> None:
        for computer in computers:
            computer.loss = fault.amount
            self._world.after(fault.lasts_s, _clear, computer)

    def _storm(self, computers: list[Computer], fault: Fault) -> None:
        network = self._world.network
        self.weather = True
        before = network.params
        worse = fault.amount
        network.params = replace(before, loss=worse, duplicate=worse, reorder=worse)
        self._world.after(fault.lasts_s, self._calm)

    def _calm(self) -> None:
        network = self._world.network
        network.params = replace(network.params, loss=0.0, duplicate=0.0, reorder=0.0)


def _revive(computer: Computer, power: bool) -> None:
    if computer.state == DOWN:
        computer.restart(reboot=power)


def _thaw(computer: Computer, run: int) -> None:
    if computer.run == run:
        computer.resume()


def _bend(computer: Computer, inward: int, outward: int) -> None:
    computer.cut_in += inward
    computer.cut_out += outward


def _heal(world: World, blocks: list[Block]) -> None:
    world.network.heal(blocks)


def _mend_disk(computer: Computer) -> None:
    computer.disk.full = False
    computer.disk.slowness = 1.0


def _hurry(computer: Computer) -> None:
    computer.service_s = 0.0


def _clear(computer: Computer) -> None:
    computer.loss = 0.0
