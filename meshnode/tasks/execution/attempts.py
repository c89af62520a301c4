"""Folders of attempts, as the agent makes, reads and removes them. Blocking: the service calls these in threads."""

import contextlib
import os
import resource
import shutil
import signal
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final, cast

from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.tasks.execution import cgroups, processes
from meshnode.tasks.execution import job as jobs
from meshnode.tasks.execution.isolation import (
    HOME,
    SEARCH_PATH,
    Walls,
    bubblewrap,
    furnish,
    no_command,
    no_network,
    options,
    visible,
)
from meshnode.tasks.execution.job import Job
from meshnode.tasks.execution.output import Chunk, Merged, Stream, StreamReader, end
from meshnode.tasks.execution.places import Place
from meshnode.tasks.execution.removing import remove_tree
from meshnode.tasks.execution.terms import Terms
from meshnode.tasks.model import FoundAttempt, Outcome, Piece
from protocol.placement.tasks import OUTPUT_BYTES_MAX, AttemptId, Ending, Order

FILES_MAX: Final = 4096
PROCESSES_MAX: Final = 1024
GONE_TRIES: Final = 3
STRAYS_TRIES: Final = 100
STRAYS_PAUSE_S: Final = 0.01
BELL: Final = "bell"
BATCH_BYTES: Final = 1 << 20
_VARIABLE: Final = "MESHNODE_ATTEMPT"


def make(folder: Path, order: Order, stdin: bytes | Path, terms: Terms, place: Place) -> Outcome | None:
    """Everything that the supervisor of an attempt needs. None: it is there; else why it will never start. A file that
    is its input is moved there.

    Raises MeshError CONFLICT if the attempt was begun before.
    """
    if folder.exists():
        raise MeshError(ErrorCode.CONFLICT, f"The attempt {folder.name} was begun before.")
    argv = order.argv or ("/bin/sh", "-c", order.shell)
    program = bubblewrap() if terms.isolated else ""
    refusal = _refusal(order, argv, terms, place.uid, program)
    if refusal is not None or program is None:
        return refusal
    if terms.isolated:
        found, code = visible(argv[0], terms.folders)
    else:
        found = shutil.which(argv[0], path=terms.environment.get("PATH", SEARCH_PATH)) or ""
        code = 0 if found else 127
        found = found or no_command(argv[0], "on this node, or it is not executable")
    if code:
        return Outcome("refused", code, found)
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError as error:
        raise MeshError(ErrorCode.CONFLICT, f"The attempt {folder.name} was begun before.") from error
    except OSError as error:
        return Outcome("refused", words=f"its folder could not be made: {error.strerror or error}")
    try:
        _fill(folder, order, (found, *argv[1:]), stdin, terms, place, program)
    except OSError as error:
        remove(folder)
        return Outcome("refused", words=f"its folder could not be made: {error.strerror or error}")
    return None


def _refusal(order: Order, argv: tuple[str, ...], terms: Terms, uid: int | None, program: str | None) -> Outcome | None:
    """What is wrong with an order, here and now. It came from another node: nothing of it was looked at so far."""
    if program is None:
        return Outcome("refused", words="bubblewrap is gone from this node: see `meshnode doctor`")
    if any("\0" in text for text in (*argv, *(text for pair in order.env for text in pair))):
        return Outcome("refused", words="there is a NUL character in its arguments or variables, which none can have")
    if any(not name or "=" in name for name, _ in order.env):
        return Outcome("refused", words="a name of a variable must not be empty, nor hold `=`")
    if order.needs.network and terms.isolated:
        if not terms.network:
            return Outcome("refused", words="this node's owner lets no task use the network (`tasks.network`)")
        lack = no_network(trusts_user=terms.trusts_user, own_users=uid is not None)
        if lack:
            return Outcome("refused", words=lack)
    return None


def _fill(
    folder: Path, order: Order, argv: tuple[str, ...], stdin: bytes | Path, terms: Terms, place: Place, program: str
) -> None:
    """Raises OSError."""
    scratch = place.scratch(folder)
    memory_bytes = order.needs.ram_bytes or terms.memory_bytes
    environment = {
        "PATH": SEARCH_PATH,
        "HOME": HOME if program else str(scratch / "home"),
        "LANG": "C.UTF-8",
        "MESHNODE_TASK": order.task,
        **({} if program else terms.environment),
        **dict(order.env),
        _VARIABLE: folder.name,  # last: processes are found by it
    }
    walls = Walls(
        scratch,
        network=order.needs.network,
        gpu=order.needs.gpus > 0 or order.needs.vram_bytes > 0,
        folders=terms.folders,
        hidden=(*terms.hidden, str(folder.parent)),
        environment=environment,
    )
    half = order.output_bytes_max // 2 or OUTPUT_BYTES_MAX
    job = Job(
        argv=argv,
        work=str(scratch / "work"),
        scratch=str(scratch),
        program=program,
        options=tuple(options(walls)) if program else (),
        environment=environment,
        uid=place.uid,
        limits=_limits(memory_bytes, place.uid),
        memory_bytes=memory_bytes,
        nice=terms.nice,
        # Names of sockets that are no paths belong to the network: those of this user's desktop would take it in.
        unix=not walls.network or place.uid is not None,
        stdin=str(folder / jobs.STDIN) if stdin else "",
        timeout_s=order.timeout_s,
        grace_s=terms.grace_s,
        head_bytes=min(terms.head_bytes, half),
        tail_bytes=min(terms.tail_bytes, half),
        bell=BELL,
    )
    # First of all: whoever cleans up finds by it what was made.
    jobs.write_job(folder, job)
    place.make(scratch)
    furnish(scratch, place.uid)
    if isinstance(stdin, Path):
        stdin.rename(folder / jobs.STDIN)
        # Of an attempt without a folder it is known ever after that it was still fetching its input.
        jobs.sync_folder(folder.parent)
    elif stdin:
        (folder / jobs.STDIN).write_bytes(stdin)
    if place.cgroup is not None:
        group = cgroups.make(place.cgroup, folder.name, memory_bytes=memory_bytes, processes=PROCESSES_MAX)
        jobs.write_job(folder, replace(job, cgroup=group))


def _limits(memory_bytes: int, uid: int | None) -> dict[str, int]:
    """For each process alone. Not RLIMIT_AS: many programs reserve far more addresses than they ever use."""
    others = 0 if uid is not None else _processes_of(os.getuid())
    limits = {"RLIMIT_CORE": 0, "RLIMIT_NOFILE": FILES_MAX, "RLIMIT_NPROC": PROCESSES_MAX + others}
    if memory_bytes:
        limits["RLIMIT_DATA"] = memory_bytes
    return {name: value for name, value in limits.items() if hasattr(resource, name)}


def _processes_of(uid: int) -> int:
    """The limit counts all of a user's threads, not only those of the task."""
    count = 0
    with contextlib.suppress(OSError):
        for entry in os.scandir("/proc"):
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and entry.stat().st_uid == uid:
                    count += len(os.listdir(f"/proc/{entry.name}/task"))
    return count


def found(folder: Path) -> list[FoundAttempt]:
    """All attempts under a folder, and what became of them. One without a supervisor will not get one any more."""
    result = []
    for entry in os.scandir(folder):
        if entry.is_dir(follow_symlinks=False) and is_attempt(entry.name):
            path, attempt = Path(entry.path), AttemptId(entry.name)
            if not (path / jobs.SUPERVISOR).exists() and revoke(path):
                result.append(FoundAttempt(attempt, "gone"))
                continue
            over = outcome(path)
            if over is None:
                result.append(FoundAttempt(attempt, "running", _ran_s(path)))
            elif over.ending == "lost":
                result.append(FoundAttempt(attempt, "gone"))
            else:
                status = jobs.read_status(path)
                ran_s = (status.ended_ms - status.started_ms) / 1000 if status is not None else 0.0
                result.append(FoundAttempt(attempt, "ended", max(0.0, ran_s), over))
    return result


def _ran_s(folder: Path) -> float:
    try:
        return max(0.0, time.time() - (folder / jobs.SUPERVISOR).stat().st_mtime)
    except OSError:
        return 0.0


def revoke(folder: Path) -> bool:
    """See to it that no supervisor begins on it any more. False: one has, or had."""
    try:
        return jobs.claim(folder, 0)
    except OSError:
        # The disk takes nothing: then no supervisor can begin either.
        return not (folder / jobs.SUPERVISOR).exists()


def outcome(folder: Path) -> Outcome | None:
    """How an attempt ended; None while its supervisor is at work."""
    for _ in range(GONE_TRIES):
        # The other order would find neither a status that comes just then nor the supervisor that wrote it.
        alive = jobs.supervisor(folder) is not None
        try:
            status = jobs.read_status(folder)
        except (OSError, ValueError, TypeError) as error:
            return Outcome("lost", words=f"how it ended cannot be read: {error}")
        if status is not None:
            return Outcome(
                cast(Ending, status.ending),
                status.code,
                status.words,
                status.cpu_ms,
                status.memory_bytes,
                status.stdout_bytes,
                status.stderr_bytes,
            )
        if alive:
            return None
    return Outcome("lost", words=_why_lost(folder))


def _why_lost(folder: Path) -> str:
    try:
        said = (folder / jobs.ERRORS).read_text(errors="replace").strip()
    except OSError:
        said = ""
    return f"its supervisor is gone{': ' + said[-300:] if said else ', and left no word of how it ended'}"


def stop(folder: Path) -> None:
    """Ask the supervisor to end it."""
    known = jobs.supervisor(folder)
    if known is not None:
        processes.send_to(*known, signal.SIGTERM)


def read(folder: Path, stream: Stream, offset: int, bytes_max: int) -> Piece:
    """What is kept from `offset` on, or from the next byte kept; a negative one counts from the end."""
    if offset < 0:
        offset = max(0, end(folder, stream) + offset)
    reader = StreamReader(folder, stream, offset)
    parts: list[Chunk] = []
    length = 0
    try:
        while length < bytes_max and (chunk := reader.next()) is not None:
            if parts and chunk.cut:
                break
            parts.append(chunk)
            length += len(chunk.data)
    finally:
        reader.close()
    if not parts:
        return Piece(stream, offset, b"")
    return Piece(stream, parts[0].offset, b"".join(part.data for part in parts)[:bytes_max], parts[0].cut)


def batch(reading: Merged) -> list[Piece]:
    """What comes next of both streams, little more than BATCH_BYTES; nothing if nothing is there yet. Neighbours of one
    stream are one piece.
    """
    runs: list[tuple[Stream, Chunk, list[bytes]]] = []
    length = 0
    while length < BATCH_BYTES and (found := reading.next()) is not None:
        stream, chunk = found
        length += len(chunk.data)
        if runs and runs[-1][0] == stream and not chunk.cut:
            runs[-1][2].append(chunk.data)
        else:
            runs.append((stream, chunk, [chunk.data]))
    return [Piece(stream, first.offset, b"".join(parts), first.cut) for stream, first, parts in runs]


def uids(folder: Path, attempts: Sequence[AttemptId]) -> dict[AttemptId, int]:
    """Whose user each attempt runs as, of those that have one."""
    known = {}
    for attempt in attempts:
        job = _job(folder / attempt)
        if job is not None and job.uid is not None:
            known[attempt] = job.uid
    return known


def end_strays(folder: Path) -> None:
    """Kill what one without a supervisor may have left running. Waits for its end, but not for ever."""
    job = _job(folder)
    if job is None:
        return
    cgroups.kill(job.cgroup)
    for _ in range(STRAYS_TRIES):
        if job.uid is not None:
            strays = processes.of_user(job.uid)
        else:
            strays = processes.with_variable(f"{_VARIABLE}={folder.name}".encode())
        for pid in strays:
            processes.send_to(pid, processes.began(pid), signal.SIGKILL)
        if not strays:
            break
        time.sleep(STRAYS_PAUSE_S)
    cgroups.remove(job.cgroup)


def clear(folder: Path) -> None:
    """Delete what one that has ended worked with. What is not there is no error."""
    job = _job(folder)
    if job is not None and job.scratch:
        remove_tree(Path(job.scratch))
    with contextlib.suppress(OSError):
        (folder / jobs.STDIN).unlink(missing_ok=True)


def remove(folder: Path) -> None:
    """Delete all of an attempt. What is not there is no error."""
    clear(folder)
    shutil.rmtree(folder, ignore_errors=True)


def is_attempt(name: str) -> bool:
    """Whether this can be an attempt's id: nothing else becomes a path."""
    return len(name) == 16 and all(char in "0123456789abcdef" for char in name)


def _job(folder: Path) -> Job | None:
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        return jobs.read_job(folder)
    return None
