"""Looks for each re-injected bug with the ordinary scenarios and checkers, seed after seed, until one of them objects.

A bug counts as found when an invariant breaks or a goal is missed. An exception ends the hunt instead: then the code
has moved on, and the patch no longer is the bug that it says.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass

from simulations.bugs.bug import Bug
from simulations.bugs.listing import bugs
from simulations.catalogue import scenarios
from simulations.checkers.checker import Violation
from simulations.scenarios.scenario import Options, Scenario

FIRST_SEED = 1


@dataclass(frozen=True, slots=True)
class Found:
    """How a hunt ended. `by` is None when nothing objected in time."""

    name: str
    sentence: str
    scenario: str
    by: str | None
    seed: int
    elapsed_s: float

    def line(self) -> str:
        """For a terminal."""
        if self.by is None:
            return f"MISSED {self.name}: {self.sentence} ({self.seed} seeds of {self.scenario}, {self.elapsed_s:.0f} s)"
        return f"found  {self.name} in {self.elapsed_s:.1f} s by {self.scenario}, seed {self.seed}: {self.by[:140]}"

    def as_dict(self) -> dict[str, object]:
        """For a program."""
        return asdict(self)


def objection(scenario: Scenario, options: Options) -> str | None:
    """What is wrong with this run, in words; None if nothing is."""
    try:
        samples = scenario.measure(options)
    except Violation as violation:
        return str(violation)
    missed = [figure for figure in scenario.judge(samples, options) if figure.met is False]
    return f"{missed[0].name} is {missed[0].value}, the goal {missed[0].goal}" if missed else None


def hunt(bug: Bug, within_s: float) -> Found:
    """Look for one bug in this process. What a seed objects to without the bug as well does not count."""
    scenario = scenarios()[bug.scenario]
    nodes = scenario.nodes if bug.nodes is None else bug.nodes
    began = time.perf_counter()
    seed = FIRST_SEED
    while True:
        options = Options(nodes=nodes, seed=seed, duration_s=bug.duration_s, pattern=bug.pattern)
        with bug.injected():
            by = objection(scenario, options)
        if by is not None and objection(scenario, options) is not None:
            by = None
        elapsed_s = time.perf_counter() - began
        if by is not None or elapsed_s > within_s:
            return Found(bug.name, bug.sentence, bug.scenario, by, seed, elapsed_s)
        seed += 1


def hunt_named(name: str, within_s: float) -> Found:
    """Look for the bug of this name: patches are functions and do not cross to another process, names do."""
    return hunt(next(bug for bug in bugs() if bug.name == name), within_s)


def hunt_all(chosen: Sequence[Bug], within_s: float, jobs: int, told: Callable[[Found], None]) -> list[Found]:
    """Look for all of them, `jobs` at a time; the results in the order of the list."""
    results: dict[str, Found] = {}
    with ProcessPoolExecutor(max_workers=jobs) as pool:
        for future in as_completed([pool.submit(hunt_named, bug.name, within_s) for bug in chosen]):
            found = future.result()
            results[found.name] = found
            told(found)
    return [results[bug.name] for bug in chosen]
