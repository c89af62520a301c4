"""Tasks as the API shows them, made of what the records say; pure. Also filters, pages and dead letters."""

from collections.abc import Callable
from typing import Final

from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.kernel.times import rfc3339
from meshnode.tasks.core.submitting import command_text
from meshnode.tasks.model import (
    COMMAND_LISTED_CHARS_MAX,
    STATUSES,
    AttemptLine,
    Filter,
    InputStored,
    Requirements,
    Task,
    TaskStatus,
)
from protocol.ids import NodeId
from protocol.placement.commands import Position
from protocol.placement.scheduling_events import Known
from protocol.placement.standing import Standing, ending_words, standing
from protocol.placement.tasks import PRIORITIES, Attempt, Needs, Order, TaskId, Wish

PAGE_ITEMS: Final = 500
_STATUS: Final[dict[str, TaskStatus]] = {**{status: status for status in STATUSES}, "placed": "pending"}

NameOf = Callable[[NodeId], str]


def admits(wanted: Filter, order: Order, wish: Wish, stands: Standing) -> bool:
    """Whether a task is meant."""
    where = stands.counts[0] if stands.counts else ""
    return (
        not wish.deleted
        and (not wanted.id_begins or order.task.startswith(wanted.id_begins))
        and (not wanted.status or _STATUS[stands.state] == wanted.status)
        and (not wanted.node or where == wanted.node)
        and (not wanted.submitter or order.submitter == wanted.submitter)
        and (not wanted.name or order.name == wanted.name)
        and (not wanted.group or order.group == wanted.group)
        and (not wanted.dead or stands.is_dead_letter)
    )


def stands(known: Known, is_member: Callable[[NodeId], bool]) -> Standing:
    """Where a task stands."""
    return standing(known.order, known.wish, known.attempts, is_member)


def place_at(cursor: str) -> tuple[int, TaskId]:
    """The time (ms) and the task behind which a page begins. A task that is gone is no matter: the cursor holds its
    place. Raises MeshError BAD_REQUEST.
    """
    moment, _, task = cursor.partition("-")
    if not (moment.isascii() and moment.isdigit() and len(moment) <= 16):
        raise MeshError(ErrorCode.BAD_REQUEST, "This cursor leads nowhere; list from the beginning.")
    return int(moment), task


def cursor_at(key: tuple[int, TaskId]) -> str:
    """What names the place behind this task."""
    return f"{key[0]}-{key[1]}"


def task_of(
    known: Known, stands: Standing, name_of: NameOf, *, whole: bool, position: Position | None = None, output: str = ""
) -> Task:
    """A task as it is shown: `whole` with environment and attempts, else as a line of a list."""
    order, wish = known.order, known.wish
    executor, attempt = stands.counts or (None, None)
    text = command_text(order)
    if not whole and len(text) > COMMAND_LISTED_CHARS_MAX:
        text = text[: COMMAND_LISTED_CHARS_MAX - 1] + "…"
    status = _STATUS[stands.state]
    began = attempt is not None and bool(attempt.started_ms) and status != "pending"
    ended = attempt is not None and bool(attempt.ended_ms) and stands.is_ended
    lines = tuple(
        _attempt_line(node, one, name_of)
        for node, one in sorted(known.attempts, key=lambda each: (each[1].generation, each[1].number, each[1].attempt))
    )
    return Task(
        id=order.task,
        command=text,
        status=status,
        phase=stands.state,
        submitted_at=rfc3339(order.at_ms / 1000),
        submitter=order.submitter,
        submitter_name=name_of(order.submitter),
        mode=order.mode,
        priority=PRIORITIES[order.priority] if 0 <= order.priority < len(PRIORITIES) else PRIORITIES[1],
        requirements=_requirements(order.needs),
        retries=order.retries,
        output=output,
        argv=order.argv or None if whole else None,
        env=tuple(f"{key}={value}" for key, value in order.env) or None if whole else None,
        name=order.name or None,
        group=order.group or None,
        preferred_node=order.needs.preferred or None,
        node=order.needs.node or None,
        assigned_node=executor if status != "pending" or stands.state == "placed" else None,
        assigned_name=None
        if executor is None or (status == "pending" and stands.state != "placed")
        else name_of(executor),
        timeout=order.timeout_s or None,
        generation=wish.generation,
        attempt=sum(one.generation == wish.generation for _, one in known.attempts),
        error=_error(status, stands),
        reason=_reason(status, stands, attempt, position),
        queue_position=_place(position) if stands.state == "pending" else None,
        cancel_wanted=True if wish.cancelled else None,
        **_outcome(attempt if stands.is_ended else None),  # type: ignore[arg-type]  # names fields of Task
        started_at=rfc3339(attempt.started_ms / 1000) if attempt is not None and began else None,
        finished_at=rfc3339(attempt.ended_ms / 1000) if attempt is not None and ended else None,
        input=_input(order) if whole else None,
        attempts=lines if whole else None,
    )


def _input(order: Order) -> InputStored | None:
    """Of a task whose input did not travel with it."""
    if not order.has_input_file:
        return None
    held = (order.submitter, *order.stdin_holders)
    return InputStored(input=order.stdin_sha256.hex(), bytes=order.stdin_bytes, held_by=held)


def _place(position: Position | None) -> int | None:
    """From 1; None where it is not in the queue."""
    return None if position is None or position.never or position.retry_s else position.position + 1


def _error(status: TaskStatus, stands: Standing) -> str | None:
    return stands.words or None if status in ("failed", "lost", "cancelled") else None


def _reason(status: TaskStatus, stands: Standing, attempt: Attempt | None, position: Position | None) -> str | None:
    if status == "pending":
        parts = [stands.words, position.words if position is not None else ""]
        if position is not None and position.never:
            parts.append("it waits until one can")
        return "; ".join(part for part in parts if part) or None
    if status == "running":
        return stands.words or (attempt.why if attempt is not None else "") or None
    return (attempt.why if attempt is not None else "") or None


def _outcome(attempt: Attempt | None) -> dict[str, object]:
    """The figures of an attempt that ended."""
    if attempt is None or attempt.ending is None:
        return {}
    return {
        "exit_code": attempt.code
        if attempt.ending == "exited" or (attempt.ending == "refused" and attempt.code)
        else None,
        "signal": attempt.code if attempt.ending == "signalled" else None,
        "cpu_seconds": attempt.cpu_ms / 1000,
        "memory_bytes": attempt.memory_bytes,
        "stdout_bytes": attempt.stdout_bytes,
        "stderr_bytes": attempt.stderr_bytes,
    }


def _attempt_line(node: NodeId, attempt: Attempt, name_of: NameOf) -> AttemptLine:
    return AttemptLine(
        id=attempt.attempt,
        node_id=node,
        node_name=name_of(node),
        generation=attempt.generation,
        number=attempt.number,
        started_at=rfc3339(attempt.started_ms / 1000) if attempt.started_ms else None,
        finished_at=rfc3339(attempt.ended_ms / 1000) if attempt.ended_ms else None,
        ending=attempt.ending,
        error=ending_words(attempt) if attempt.ending not in (None, "exited") else None,
        reason=attempt.why or None,
        **_outcome(attempt),  # type: ignore[arg-type]  # names fields of AttemptLine
    )


def _requirements(needs: Needs) -> Requirements:
    return Requirements(
        cpus=needs.cpus,
        ram_bytes=needs.ram_bytes,
        gpus=needs.gpus,
        vram_bytes=needs.vram_bytes,
        disk_bytes=needs.disk_bytes,
        os=needs.os,
        arch=needs.arch,
        labels=needs.labels,
        network=needs.network,
    )
