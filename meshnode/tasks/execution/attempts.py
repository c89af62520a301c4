"""Folders of attempts, as the agent makes, reads and removes them. Blocking: the service calls these in threads."""

import contextlib
import errno
import os
import resource
import shutil
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final, cast

from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.tasks.execution import job as jobs
from meshnode.tasks.execution.isolation import HOME, SEARCH_PATH, Walls, bubblewrap, options, visible
from meshnode.tasks.execution.job import Job
from meshnode.tasks.execution.output import Chunk, Stream, StreamReader, files
from meshnode.tasks.execution.terms import Terms
from meshnode.tasks.model import FoundAttempt, Outcome, Piece
from protocol.placement.tasks import AttemptId, Ending, Order

FILES_MAX: Final = 4096
PROCESSES_MAX: Final = 1024
GONE_TRIES: Final = 3
BELL: Final = "bell"
_SHARED_WORK: Final = Path("/var/tmp")


def make(folder: Path, order: Order, stdin: bytes, terms: Terms, uid: int | None) -> Outcome | None:
    """Everything that the supervisor of an attempt needs. None: it is there; else why it will never start.

    Raises MeshError CONFLICT if the attempt was begun before.
    """
    argv = order.argv or ("/bin/sh", "-c", order.shell)
    program = bubblewrap() if terms.isolated else ""
    if program is None:
        return Outcome("refused", words="bubblewrap is gone from this node: see `meshnode doctor`")
    if terms.isolated:
        found, code = visible(argv[0], terms.folders)
    else:
        found = shutil.which(argv[0], path=terms.environment.get("PATH", SEARCH_PATH)) or ""
        code = 0 if found else 127
        found = found or f"there is no command {argv[0]!r} on this node"
    if code:
        return Outcome("refused", code, found)
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError as error:
        raise MeshError(ErrorCode.CONFLICT, f"The attempt {folder.name} was begun before.") from error
    try:
        _fill(folder, order, (found, *argv[1:]), stdin, terms, uid, program)
    except OSError as error:
        remove(folder)
        return Outcome("refused", words=f"its folder could not be made: {error.strerror or error}")
    return None


def _fill(
    folder: Path, order: Order, argv: tuple[str, ...], stdin: bytes, terms: Terms, uid: int | None, program: str
) -> None:
    work = work_folder(folder, uid)
    if uid is not None:
        work.parent.mkdir(mode=0o711, exist_ok=True)  # to be walked through by the task's own user
        if work.parent.lstat().st_uid != 0 or work.parent.is_symlink():
            raise OSError(errno.EPERM, f"{work.parent} is somebody else's")
        work.parent.chmod(0o711)
    work.mkdir(mode=0o700)
    if uid is not None:
        os.chown(work, uid, uid)
    if stdin:
        (folder / jobs.STDIN).write_bytes(stdin)
    environment = {
        "PATH": SEARCH_PATH,
        "HOME": HOME if program else str(work),
        "LANG": "C.UTF-8",
        "MESHNODE_TASK": order.task,
        "MESHNODE_ATTEMPT": folder.name,
        **({} if program else terms.environment),
        **dict(order.env),
    }
    walls = Walls(
        work=work,
        network=order.needs.network and terms.network,
        gpu=order.needs.gpus > 0 or order.needs.vram_bytes > 0,
        folders=terms.folders,
        environment=environment,
    )
    kept = order.output_bytes_max or terms.head_bytes + terms.tail_bytes
    jobs.write_job(
        folder,
        Job(
            argv=argv,
            work=str(work),
            program=program,
            options=tuple(options(walls)) if program else (),
            environment=environment,
            uid=uid,
            limits=_limits(order.needs.ram_bytes or terms.memory_bytes, uid),
            nice=terms.nice,
            stdin=str(folder / jobs.STDIN) if stdin else "",
            timeout_s=order.timeout_s,
            grace_s=terms.grace_s,
            head_bytes=min(terms.head_bytes, kept - kept * 3 // 4),
            tail_bytes=min(terms.tail_bytes, kept * 3 // 4),
            bell=BELL,
        ),
    )


def _limits(memory_bytes: int, uid: int | None) -> dict[str, int]:
    others = 0 if uid is not None else _processes_of(os.getuid())
    limits = {"RLIMIT_CORE": 0, "RLIMIT_NOFILE": FILES_MAX, "RLIMIT_NPROC": PROCESSES_MAX + others}
    if memory_bytes:
        limits["RLIMIT_AS"] = memory_bytes
    return {name: value for name, value in limits.items() if hasattr(resource, name)}


def _processes_of(uid: int) -> int:
    """The limit counts all of a user's processes, not only those of the task."""
    count = 0
    with contextlib.suppress(OSError):
        for entry in os.scandir("/proc"):
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and entry.stat().st_uid == uid:
                    count += len(os.listdir(f"/proc/{entry.name}/task"))
    return count


def work_folder(folder: Path, uid: int | None) -> Path:
    """Where a task works. One with a user of its own cannot walk through this node's data folder, which is closed."""
    return folder / "work" if uid is None else _SHARED_WORK / f"meshnode-{uid}" / folder.name


def found(folder: Path) -> list[FoundAttempt]:
    """All attempts under a folder, and what became of them."""
    result = []
    for entry in os.scandir(folder):
        if entry.is_dir() and is_attempt(entry.name):
            path = Path(entry.path)
            over = outcome(path)
            began_s = max(0.0, time.time() - entry.stat().st_ctime)
            if over is None:
                result.append(FoundAttempt(AttemptId(entry.name), "running", began_s))
            elif over.ending == "lost":
                result.append(FoundAttempt(AttemptId(entry.name), "gone"))
            else:
                status = jobs.read_status(path)
                ran_s = (status.ended_ms - status.started_ms) / 1000 if status is not None else 0.0
                result.append(FoundAttempt(AttemptId(entry.name), "ended", ran_s, over))
    return result


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
    with contextlib.suppress(OSError):
        return Outcome("lost", words=(folder / jobs.ERRORS).read_text().strip()[-300:] or "its supervisor is gone")
    return Outcome("lost", words="its supervisor is gone, and left no word of how it ended")


def stop(folder: Path) -> None:
    """Ask the supervisor to end it."""
    pid = jobs.supervisor(folder)
    if pid is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)


def read(folder: Path, stream: Stream, offset: int, bytes_max: int) -> Piece:
    """What is kept from `offset` on, or from the next byte kept; a negative one counts from the end."""
    if offset < 0:
        offset = max(0, _end(folder, stream) + offset)
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


def piece(stream: Stream, chunk: Chunk) -> Piece:
    """A chunk as the service knows it."""
    return Piece(stream, chunk.offset, chunk.data, chunk.cut)


def _end(folder: Path, stream: Stream) -> int:
    kept = files(folder, stream)
    if not kept:
        return 0
    reader, end = StreamReader(folder, stream, kept[-1][0]), kept[-1][0]
    while (chunk := reader.next()) is not None:
        end = chunk.offset + len(chunk.data)
    reader.close()
    return end


def uids(folder: Path, attempts: Sequence[AttemptId]) -> dict[AttemptId, int]:
    """Whose user each attempt runs as, of those that have one."""
    known = {}
    for attempt in attempts:
        with contextlib.suppress(OSError, ValueError, TypeError):
            uid = jobs.read_job(folder / attempt).uid
            if uid is not None:
                known[attempt] = uid
    return known


def clear_work(folder: Path) -> None:
    """Delete what an attempt that has ended worked with. What is not there is no error."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        shutil.rmtree(work_folder(folder, jobs.read_job(folder).uid), ignore_errors=True)
        (folder / jobs.STDIN).unlink(missing_ok=True)


def remove(folder: Path) -> None:
    """Delete all of an attempt. What is not there is no error."""
    clear_work(folder)
    shutil.rmtree(folder, ignore_errors=True)


def is_attempt(name: str) -> bool:
    """Whether this can be an attempt's id: nothing else becomes a path."""
    return len(name) == 16 and all(char in "0123456789abcdef" for char in name)
