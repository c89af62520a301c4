"""What a benchmark reports: figures with their goals, and how busy the machine was while they were taken.

It judges a figure against its goal and prints; it measures nothing but the machine's load.
"""

import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec
import psutil

Row = tuple[str, ...]
_HEAD: Final[Row] = ("figure", "measured", "goal", "met", "reference", "note")


class Figure(msgspec.Struct, frozen=True, kw_only=True):
    """One number. Without a goal it only informs. `met` is decided when the figure is made."""

    figure: str
    measured: float
    unit: str
    goal: float | None = None
    at_least: bool = False
    met: bool | None = None
    reference: float | None = None
    reference_name: str | None = None
    note: str | None = None


def figure(
    name: str,
    measured: float,
    unit: str,
    *,
    at_most: float | None = None,
    at_least: float | None = None,
    or_of_reference: float | None = None,
    reference: float | None = None,
    reference_name: str | None = None,
    note: str | None = None,
) -> Figure:
    """A figure judged against its goal. `or_of_reference`: this share of the reference meets `at_least` too."""
    met: bool | None = None
    if at_most is not None:
        met = measured <= at_most
    elif at_least is not None:
        met = measured >= at_least
        if not met and or_of_reference is not None and reference is not None:
            met = measured >= or_of_reference * reference
    return Figure(
        figure=name,
        measured=round(measured, 4),
        unit=unit,
        goal=at_most if at_most is not None else at_least,
        at_least=at_least is not None,
        met=met,
        reference=None if reference is None else round(reference, 4),
        reference_name=reference_name,
        note=note,
    )


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """The machine in general terms, and how busy it was. `busy_percent` is the share of all cores that worked."""

    cores: int
    memory_bytes: int
    system: str
    python: str
    load_before: tuple[float, float, float]
    load_after: tuple[float, float, float]
    busy_percent: float
    seconds: float


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """One benchmark's run."""

    benchmark: str
    figures: list[Figure]
    machine: Machine
    detail: dict[str, Any] = msgspec.field(default_factory=dict)


@dataclass
class Outcome:
    """What a benchmark hands back: its figures, and details for those who look closer."""

    figures: list[Figure]
    detail: dict[str, Any] = field(default_factory=dict)


def measured(name: str, run: Callable[[], Outcome]) -> Report:
    """Run a benchmark and note how busy the machine was meanwhile."""
    before, began, cpu = os.getloadavg(), time.monotonic(), psutil.cpu_times()
    outcome = run()
    now, seconds = psutil.cpu_times(), time.monotonic() - began
    total = sum(now) - sum(cpu)
    idle = now.idle - cpu.idle + getattr(now, "iowait", 0.0) - getattr(cpu, "iowait", 0.0)
    machine = Machine(
        cores=os.cpu_count() or 1,
        memory_bytes=psutil.virtual_memory().total,
        system=f"{platform.system()} {platform.machine()}",
        python=f"{sys.version_info.major}.{sys.version_info.minor}.{sys.version_info.micro}",
        load_before=before,
        load_after=os.getloadavg(),
        busy_percent=round(100 * (1 - idle / total), 1) if total > 0 else 0.0,
        seconds=round(seconds, 1),
    )
    return Report(benchmark=name, figures=outcome.figures, machine=machine, detail=outcome.detail)


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of them lie (nearest rank); 0 of none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))] if ordered else 0.0


def text(report: Report) -> str:
    """The report as a table for people."""
    machine = report.machine
    lines = [
        f"{report.benchmark}: {machine.seconds:.0f} s on {machine.cores} cores, {machine.busy_percent:.0f}% of them "
        f"busy, load {machine.load_before[0]:.1f} before and {machine.load_after[0]:.1f} after"
    ]
    rows = [_HEAD, *(_row(one) for one in report.figures)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEAD) - 1)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        lines.append("  " + "  ".join([*cells, row[-1]]).rstrip())
    return "\n".join(lines)


def _row(one: Figure) -> Row:
    goal = "" if one.goal is None else f"{'≥' if one.at_least else '≤'} {_number(one.goal)}"
    reference = "" if one.reference is None else f"{_number(one.reference)} {one.reference_name or ''}".strip()
    met = {True: "yes", False: "NO", None: ""}[one.met]
    return (one.figure, f"{_number(one.measured)} {one.unit}", goal, met, reference, one.note or "")


def _number(value: float) -> str:
    if value == int(value) and abs(value) < 1e9:
        return f"{int(value):,}"
    return f"{value:,.1f}" if abs(value) >= 100 else f"{value:.3g}"
