"""Prints outcomes: a table for people, JSON for programs, and for a failing seed the line that replays it."""

import json
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from simulations.runner import Outcome
from simulations.scenarios.scenario import Figure, Options

FAILURES_SHOWN_MAX = 10


def commit() -> str:
    """The git commit of this tree, with `+` when it was changed since; `unknown` outside a repository."""
    root = Path(__file__).resolve().parent.parent
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+"],
            cwd=root, capture_output=True, text=True, check=True, timeout=10,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return described.stdout.strip() or "unknown"


def replay(name: str, options: Options, seed: int) -> str:
    """The command that runs this seed again."""
    words = ["scripts/sim", name, "--nodes", str(options.nodes), "--seed", str(seed)]
    if options.duration_s is not None:
        words += ["--duration", f"{options.duration_s:g}"]
    if options.pattern is not None:
        words += ["--pattern", options.pattern]
    return " ".join(words)


def as_json(name: str, options: Options, outcome: Outcome, figures: Sequence[Figure]) -> str:
    """One JSON object."""
    body: Mapping[str, object] = {
        "scenario": name,
        "nodes": options.nodes,
        "pattern": options.pattern,
        "seed": options.seed,
        "seeds": outcome.seeds,
        "commit": commit(),
        "figures": {
            figure.name: {
                "value": figure.value,
                "unit": figure.unit,
                "goal": figure.goal,
                "goal_is": None if figure.goal is None else "at least" if figure.at_least else "at most",
                "met": figure.met,
            }
            for figure in figures
        },
        "met": met(outcome, figures),
        "failures": [
            {"seed": failure.seed, "violation": failure.words, "replay": replay(name, options, failure.seed)}
            for failure in outcome.failures
        ],
        "virtual_s": round(outcome.samples.virtual_s, 3),
        "events": outcome.samples.events,
        "elapsed_s": round(outcome.elapsed_s, 3),
        "trace": outcome.samples.trace,
    }
    return json.dumps(body, indent=2)


def as_table(name: str, options: Options, outcome: Outcome, figures: Sequence[Figure]) -> str:
    """Lines for a terminal."""
    pattern = f", pattern {options.pattern}" if options.pattern else ""
    size = f"{options.nodes} nodes" if options.nodes else "sizes drawn from the seeds"
    lines = [f"{name}: {size}, {outcome.seeds} seed(s) from {options.seed}{pattern}, commit {commit()}"]
    width = max((len(figure.name) for figure in figures), default=0)
    for figure in figures:
        value = "-" if figure.value is None else f"{figure.value:,.3f}".rstrip("0").rstrip(".")
        goal = ""
        if figure.goal is not None:
            sign = ">=" if figure.at_least else "<="
            goal = f"{sign} {figure.goal:g} {figure.unit}".rstrip() + ("   met" if figure.met else "   NOT MET")
        lines.append(f"  {figure.name:<{width}}  {value:>12} {figure.unit:<4} {goal}".rstrip())
    samples = outcome.samples
    speed = samples.virtual_s / max(outcome.elapsed_s, 1e-9)
    lines.append(
        f"  {samples.virtual_s:,.0f} virtual seconds, {samples.events:,} events in {outcome.elapsed_s:.1f} s"
        f" ({speed:,.0f} virtual seconds a second), trace {outcome.samples.trace:08x}"
    )
    lines += failure_lines(name, options, outcome)
    return "\n".join(lines)


def failure_lines(name: str, options: Options, outcome: Outcome) -> list[str]:
    """What broke, where, and how to see it again."""
    lines = []
    for failure in outcome.failures[:FAILURES_SHOWN_MAX]:
        lines.append(f"  FAILED: seed {failure.seed} at commit {commit()}: {failure.words}")
        lines.append(f"    replay: {replay(name, options, failure.seed)}")
    if len(outcome.failures) > FAILURES_SHOWN_MAX:
        lines.append(f"  ... and {len(outcome.failures) - FAILURES_SHOWN_MAX} more seeds failed")
    return lines


def met(outcome: Outcome, figures: Sequence[Figure]) -> bool:
    """Whether every goal is met and no seed failed."""
    return not outcome.failures and all(figure.met is not False for figure in figures)
