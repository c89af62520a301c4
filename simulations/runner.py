"""Runs seeds of a scenario, side by side in processes of their own, and joins what they measured.

A failing seed is a value here, not an exception: the others go on, and the report says how to replay each.
"""

import gc
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field, replace

from simulations.catalogue import scenarios
from simulations.checkers.checker import Violation
from simulations.scenarios.scenario import Options, Samples

QUEUED_PER_JOB = 3  # so many seeds wait in the pool for each process
COLLECT_BELOW_NODES = (
    200  # larger worlds are short-lived mountains of long-lived objects: collecting costs half the time
)


@dataclass(frozen=True, slots=True)
class Failure:
    """A seed that broke an invariant."""

    seed: int
    words: str


@dataclass(slots=True)
class Outcome:
    """What all seeds together gave."""

    samples: Samples = field(default_factory=Samples)
    failures: list[Failure] = field(default_factory=list)
    seeds: int = 0
    elapsed_s: float = 0.0


def measure(name: str, options: Options) -> Samples | Failure:
    """One seed of one scenario, in this process."""
    if options.nodes < COLLECT_BELOW_NODES:
        gc.collect()
        gc.freeze()
    else:
        gc.disable()
    try:
        return scenarios()[name].measure(options)
    except Violation as violation:
        return Failure(options.seed, str(violation))
    finally:
        gc.enable()


def run_seeds(
    name: str,
    options: Options,
    seeds: int,
    jobs: int,
    *,
    until_s: float | None = None,
    told: Callable[[Outcome], None] | None = None,
) -> Outcome:
    """Run `seeds` seeds from options.seed on, at most `jobs` at a time; stop beginning new ones after `until_s`."""
    outcome = Outcome()
    began = time.perf_counter()
    for result in _results(name, options, seeds, jobs, began, until_s):
        outcome.seeds += 1
        if isinstance(result, Failure):
            outcome.failures.append(result)
        else:
            outcome.samples.merge(result)
            outcome.samples.trace ^= result.trace
        outcome.elapsed_s = time.perf_counter() - began
        if told is not None:
            told(outcome)
    outcome.failures.sort(key=lambda failure: failure.seed)
    return outcome


def _results(
    name: str, options: Options, seeds: int, jobs: int, began: float, until_s: float | None
) -> Iterator[Samples | Failure]:
    todo = iter(range(options.seed, options.seed + seeds))
    if jobs == 1 or seeds == 1:
        for seed in todo:
            if until_s is not None and time.perf_counter() - began > until_s:
                return
            yield measure(name, replace(options, seed=seed))
        return
    with ProcessPoolExecutor(max_workers=jobs) as pool:
        running: set[Future[Samples | Failure]] = set()
        while True:
            while len(running) < jobs * QUEUED_PER_JOB:
                if until_s is not None and time.perf_counter() - began > until_s:
                    break
                following = next(todo, None)
                if following is None:
                    break
                running.add(pool.submit(measure, name, replace(options, seed=following)))
            if not running:
                return
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()
