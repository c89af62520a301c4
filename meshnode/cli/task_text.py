"""Tasks as text for people. Pure: answers and the time in, text out, everything of others escaped."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from meshnode.cli.screen import coloured, table
from meshnode.cli.units import ago_text, duration_text, size_text, unix_seconds
from meshnode.kernel.redaction import printable

Answer = Mapping[str, Any]

COMMAND_SHOWN_CHARS_MAX: Final = 60
_LABEL_COLUMNS: Final = 13


def tasks_text(tasks: Sequence[Answer], wall: float, width: int | None = None) -> str:
    """`meshnode tasks`: one line for each, the newest first."""
    if not tasks:
        return "No tasks. `meshnode run -- COMMAND` runs one on the machine that suits it best."
    rows = [
        (
            task["id"],
            coloured(task["status"]),
            outcome_text(task),
            printable(task.get("assigned_name") or task.get("assigned_node") or ""),
            ago_text(task.get("submitted_at"), wall),
            _took(task, wall),
            _short(task.get("name") or task["command"]),
        )
        for task in tasks
    ]
    headings = ("ID", "STATUS", "", "NODE", "SUBMITTED", "TOOK", "COMMAND")
    return table(headings, rows, width=width, expendable=("TOOK", "SUBMITTED", "NODE"))


def task_text(task: Answer, wall: float) -> str:
    """`meshnode task ID`: everything known of one, but for its output."""
    where = printable(task.get("assigned_name") or task.get("assigned_node") or "")
    facts = [
        ("task", task["id"] + (f", {printable(task['name'])}" if task.get("name") else "")),
        ("command", printable(task["command"])),
        ("status", f"{coloured(task['status'])} {outcome_text(task)}".rstrip()),
        ("error", printable(task.get("error") or "")),
        ("why", printable(task.get("reason") or "")),
        ("queue", f"position {task['queue_position']}" if task.get("queue_position") else ""),
        ("node", where),
        ("submitted", f"{ago_text(task.get('submitted_at'), wall)} on {printable(task['submitter_name'])}"),
        ("started", ago_text(task.get("started_at"), wall) if task.get("started_at") else ""),
        ("took", _took(task, wall)),
        ("mode", f"{task['mode']}, {task['priority']}" + (f", {task['retries']} retries" if task["retries"] else "")),
        ("processor", f"{duration_text(task['cpu_seconds'])}" if task.get("cpu_seconds") else ""),
        ("memory", f"{size_text(task['memory_bytes'])} at its peak" if task.get("memory_bytes") else ""),
        ("output", _output_text(task)),
        ("held by", f"{len(task['held_by'])} nodes" if task.get("held_by") else ""),
    ]
    lines = [f"{label:<{_LABEL_COLUMNS}}{value}" for label, value in facts if value]
    attempts = task.get("attempts", ())
    if len(attempts) > 1:
        rows = [_attempt_row(one, wall) for one in attempts]
        lines += ["", table(("ATTEMPT", "NODE", "ENDING", "STARTED", "WHY"), rows)]
    return "\n".join(lines)


def queue_text(told: Answer, width: int | None = None) -> str:
    """`meshnode queue`: what waits and runs, and each node that lends something, or why not now."""
    counts = f"{told['queue_depth']} waiting of {told['queue_max']} at most, {told['in_flight']} on nodes"
    dead = told.get("dead_letters", 0)
    lines = [counts + (f", {dead} failed or lost (`meshnode tasks --dead`)" if dead else "")]
    if told.get("reason"):
        lines.append(printable(told["reason"]))
    if not told.get("coordinator"):
        lines.append("Nobody coordinates now: tasks wait until one does.")
    rows = [
        (
            printable(one["node_name"]),
            f"{one['slots_promised']}/{one['slots']}",
            f"{one['cpus_promised']:g}/{one['cpus']:g}",
            f"{size_text(one['ram_promised_bytes'])}/{size_text(one['ram_bytes'])}",
            one["accepts"],
            one["breaker"].replace("_", "-"),
            printable(one.get("reason") or ""),
        )
        for one in sorted(told.get("nodes", ()), key=lambda one: (one["node_name"], one["node_id"]))
    ]
    if rows:
        lines.append("")
        lines.append(
            table(("NODE", "SLOTS", "CPUS", "RAM", "ACCEPTS", "BREAKER", "TAKES NOTHING: WHY"), rows, width=width)
        )
    return "\n".join(lines)


def _attempt_row(attempt: Answer, wall: float) -> Sequence[str]:
    return (
        str(attempt["number"]),
        printable(attempt["node_name"]),
        attempt.get("ending") or "running",
        ago_text(attempt["started_at"], wall),
        printable(attempt.get("error") or ""),
    )


def outcome_text(task: Answer) -> str:
    """How its process ended, or that it is to be cancelled."""
    if task.get("signal"):
        return f"signal {task['signal']}"
    if task.get("exit_code"):
        return f"exit {task['exit_code']}"
    return "is to be cancelled" if task.get("cancel_wanted") and task["status"] in ("pending", "running") else ""


def _took(task: Answer, wall: float) -> str:
    begun, ended = unix_seconds(task.get("started_at")), unix_seconds(task.get("finished_at"))
    if begun is None:
        return ""
    return duration_text(max(0.0, (wall if ended is None else ended) - begun))


def _output_text(task: Answer) -> str:
    sizes = [(name, task.get(f"{name}_bytes", 0)) for name in ("stdout", "stderr")]
    return ", ".join(f"{size_text(size)} of {name}" for name, size in sizes if size)


def _short(command: str) -> str:
    line = printable(command)
    return line if len(line) <= COMMAND_SHOWN_CHARS_MAX else line[: COMMAND_SHOWN_CHARS_MAX - 1] + "…"
