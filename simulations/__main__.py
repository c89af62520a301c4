"""The command line of the simulator: one scenario, the CI budget, or the list of re-injected bugs."""

import argparse
import cProfile
import json
import os
import pstats
import sys
from collections.abc import Callable, Sequence

from simulations.bugs.hunt import Found, hunt_all
from simulations.bugs.listing import bugs
from simulations.catalogue import scenarios
from simulations.report import as_json, as_table, met
from simulations.runner import Outcome, run_seeds
from simulations.scenarios.scenario import Figure, Options

CI_SEEDS = 2000
CI_JOBS = 2
CI_MINUTES = 10.0
CI_CLUSTER_HOURS = 500.0


def main(arguments: Sequence[str]) -> int:
    """0: all goals met; 1: a goal missed, an invariant broken or a bug not found; 2: wrong usage."""
    parsed = _parser().parse_args(arguments)
    if parsed.what == "ci":
        return _ci(parsed)
    if parsed.what == "bugs":
        return _bugs(parsed)
    scenario = scenarios()[parsed.what]
    options = _options(parsed, scenario.nodes)
    jobs = 1 if parsed.profile or parsed.tell else parsed.jobs or os.cpu_count() or 1
    profile = cProfile.Profile()
    if parsed.profile:
        profile.enable()
    until_s = None if parsed.minutes is None else parsed.minutes * 60.0
    seeds = parsed.seeds or (1 if until_s is None else 10**9)
    outcome = run_seeds(parsed.what, options, seeds, jobs, until_s=until_s, told=_progress(parsed))
    if parsed.profile:
        profile.disable()
        pstats.Stats(profile, stream=sys.stderr).sort_stats("tottime").print_stats(30)
    figures = scenario.judge(outcome.samples, options) if outcome.samples.events else ()
    print((as_json if parsed.json else as_table)(parsed.what, options, outcome, figures))
    return 0 if met(outcome, figures) else 1


def _ci(parsed: argparse.Namespace) -> int:
    """The budget of a CI run: 2,000 seeds of churn, or 500 simulated cluster-hours, in ten minutes on two cores."""
    churn = scenarios()["churn"]
    options = _options(parsed, churn.nodes)
    seeds, jobs = parsed.seeds or CI_SEEDS, parsed.jobs or CI_JOBS
    outcome = run_seeds(
        "churn", options, seeds, jobs, until_s=(parsed.minutes or CI_MINUTES) * 60.0, told=_progress(parsed)
    )
    figures = [
        *(churn.judge(outcome.samples, options) if outcome.samples.events else ()),
        Figure("seeds", float(outcome.seeds), "", float(min(seeds, CI_SEEDS)), at_least=True),
        Figure("minutes", outcome.elapsed_s / 60.0, "min"),
    ]
    if outcome.samples.virtual_s / 3600.0 >= CI_CLUSTER_HOURS:
        figures[-2] = Figure("seeds", float(outcome.seeds), "")
    print((as_json if parsed.json else as_table)("churn", options, outcome, figures))
    return 0 if met(outcome, figures) else 1


def _bugs(parsed: argparse.Namespace) -> int:
    """Re-inject every bug of the list, and see each found."""
    wanted = set(parsed.only.split(",")) if parsed.only else None
    chosen = [bug for bug in bugs() if wanted is None or bug.name in wanted]
    within_s = (parsed.minutes or CI_MINUTES) * 60.0

    def tell(found: Found) -> None:
        if not parsed.json:
            print(found.line(), flush=True)

    results = hunt_all(chosen, within_s, parsed.jobs or os.cpu_count() or 1, tell)
    if parsed.json:
        print(json.dumps([result.as_dict() for result in results], indent=2))
    else:
        missed = [result.name for result in results if result.by is None]
        print(f"{len(results) - len(missed)} of {len(results)} bugs found" + (f"; missed: {missed}" if missed else ""))
    return 0 if all(result.by is not None for result in results) else 1


def _options(parsed: argparse.Namespace, nodes: int) -> Options:
    return Options(
        nodes=nodes if parsed.nodes is None else parsed.nodes,
        seed=parsed.seed,
        duration_s=parsed.duration,
        pattern=parsed.pattern,
        tell=parsed.tell,
        progress=_is_waited_for(parsed),
    )


def _is_waited_for(parsed: argparse.Namespace) -> bool:
    return not parsed.json and sys.stderr.isatty()


def _progress(parsed: argparse.Namespace) -> Callable[[Outcome], None] | None:
    """A line now and then for who waits at a terminal; nothing for a program."""
    if not _is_waited_for(parsed):
        return None

    def tell(outcome: Outcome) -> None:
        if outcome.seeds % 20 == 0:
            words = f"\r{outcome.seeds} seeds, {len(outcome.failures)} failed, {outcome.elapsed_s:.0f} s "
            print(words, end="", file=sys.stderr, flush=True)

    return tell


def _parser() -> argparse.ArgumentParser:
    known = scenarios()
    listing = "\n".join(f"  {scenario.name:<12} {scenario.about}" for scenario in known.values())
    parser = argparse.ArgumentParser(
        prog="scripts/sim",
        description="Run the real protocol machines in a seeded world of virtual time.",
        epilog=f"scenarios:\n{listing}\n  {'ci':<12} {_ci.__doc__}\n  {'bugs':<12} {_bugs.__doc__}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", metavar="SCENARIO", choices=[*known, "ci", "bugs"], help="what to run")
    parser.add_argument("--nodes", type=int, help="size of the mesh (default: the scenario's)")
    parser.add_argument("--seed", type=int, default=1, help="the (first) seed")
    parser.add_argument("--seeds", type=int, help="how many seeds, from --seed on (default: 1; ci: 2000)")
    parser.add_argument("--jobs", type=int, help="processes (default: one per core; ci: 2)")
    parser.add_argument("--minutes", type=float, help="run seeds for so long; bugs: how long to look for each")
    parser.add_argument("--only", help="bugs: names, separated by commas")
    parser.add_argument("--duration", type=float, help="seconds of virtual time of the measured part")
    parser.add_argument("--pattern", help="a variant, as the scenario's file explains")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--tell", action="store_true", help="print what happens as it happens, to standard error")
    parser.add_argument("--profile", action="store_true", help="print where the time went (one process)")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
