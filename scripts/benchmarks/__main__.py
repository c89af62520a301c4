"""The command line of the benchmarks: scripts/bench NAME [--json] [...]."""

import argparse
import contextlib
import inspect
import os
import signal
import sys
from collections.abc import Callable, Mapping
from typing import Any, Final

import msgspec

from scripts.benchmarks import (
    api_load,
    detection,
    engines,
    events,
    figures,
    footprint,
    inference,
    junk,
    links,
    placement,
    queue,
    starting,
    stores,
    task_kills,
    tasks,
)
from scripts.benchmarks.agents import BenchmarkError

Benchmark = Callable[..., figures.Outcome]

BENCHMARKS: Final[Mapping[str, Benchmark]] = {
    "footprint": footprint.footprint,
    "start": starting.start,
    "status-cli": starting.status_cli,
    "api": api_load.api,
    "events": events.events,
    "ping": links.ping,
    "bulk": links.bulk,
    "records": stores.records,
    "database": stores.database,
    "engine": engines.engine,
    "engine-memory": engines.engine_memory,
    "inference": inference.inference,
    "junk": junk.junk,
    "detection": detection.detection,
    "mesh64": detection.mesh64,
    "tasks": tasks.tasks,
    "placement": placement.placement,
    "queue": queue.queue,
    "task-kills": task_kills.task_kills,
}
ALL: Final = "all"


def options_of(benchmark: Benchmark) -> dict[str, Any]:
    """What can be set on the command line, with its default: the keyword arguments of the benchmark."""
    return {name: parameter.default for name, parameter in inspect.signature(benchmark).parameters.items()}


def parser() -> argparse.ArgumentParser:
    """One command for each benchmark."""
    made = argparse.ArgumentParser(prog="scripts/bench", description="Measures what the design puts numbers on.")
    made.add_argument("--json", action="store_true", help="print JSON, for programs")
    commands = made.add_subparsers(dest="name", required=True, metavar="NAME")
    for name, benchmark in BENCHMARKS.items():
        about = (inspect.getdoc(benchmark) or "").partition("\n")[0]
        command = commands.add_parser(name, help=about, description=inspect.getdoc(benchmark))
        command.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print JSON, for programs")
        for option, default in options_of(benchmark).items():
            flag = "--" + option.replace("_", "-")
            command.add_argument(flag, dest=option, type=type(default), default=default, help="default: %(default)s")
    everything = commands.add_parser(ALL, help="all of them, one after the other")
    everything.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print JSON, for programs")
    return made


def _hold_priority() -> None:
    """Where the kernel shares processors out by session, `nice` counts only inside one: say it for this one too."""
    with contextlib.suppress(OSError), open("/proc/self/autogroup", "w") as file:
        file.write(str(os.getpriority(os.PRIO_PROCESS, 0)))


def main(arguments: list[str]) -> int:
    """Run what was asked for. 0: measured, whatever the figures; 1: something could not be measured."""
    chosen = parser().parse_args(arguments)
    # So that agents and folders are cleaned up then too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    _hold_priority()
    names = list(BENCHMARKS) if chosen.name == ALL else [chosen.name]
    reports: list[figures.Report] = []
    failed = False
    for name in names:
        options = (
            {} if chosen.name == ALL else {option: getattr(chosen, option) for option in options_of(BENCHMARKS[name])}
        )
        try:
            report = figures.measured(name, lambda name=name, options=options: BENCHMARKS[name](**options))  # type: ignore[misc]  # a default argument binds the loop's values
        except BenchmarkError as error:
            failed = True
            print("\n".join([f"{name}: {error}", *getattr(error, "__notes__", [])]), file=sys.stderr)
            continue
        reports.append(report)
        if not chosen.json:
            print(figures.text(report), flush=True)
    if chosen.json:
        whole: object = reports if chosen.name == ALL else reports[0] if reports else None
        print(msgspec.json.format(msgspec.json.encode(whole), indent=2).decode())
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
