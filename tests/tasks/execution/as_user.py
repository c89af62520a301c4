"""Runs attempts in an agent of its own, as any user: root's tasks have users of their own, others' do not."""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

from meshnode.tasks.execution.isolation import SEARCH_PATH
from meshnode.tasks.model import Outcome
from protocol.placement.tasks import Order
from tests.house.source import ROOT
from tests.tasks.execution.world import one_agent, order

ORDINARY = 4321
"""Nobody's id; only root can become it."""

PYTHON = shutil.which("python3", path=SEARCH_PATH) or ""
needs_python = pytest.mark.skipif(not PYTHON, reason="no system Python that tasks can see")


class Result(msgspec.Struct):
    """How it ended and what it said."""

    ending: str
    code: int
    words: str
    out: bytes
    err: bytes
    memory_bytes: int
    kept_bytes: int  # on the disk


class _Work(msgspec.Struct):
    folder: str
    orders: list[Order]
    terms: dict[str, Any]


def script(text: str, *args: str, **more: Any) -> Order:
    """A task in Python."""
    return order(PYTHON, "-I", "-c", text, *args, **more)


def users() -> list[Any]:
    """The agents that there can be: root's, and an ordinary user's."""
    if os.geteuid() == 0:
        return [pytest.param(None, id="root"), pytest.param(ORDINARY, id="ordinary")]
    return [pytest.param(None, id="ordinary")]


def is_root(user: int | None) -> bool:
    return user is None and os.geteuid() == 0


def run_all(
    folder: Path, user: int | None, orders: Sequence[Order], env: dict[str, str] | None = None, **terms: Any
) -> list[Result]:
    """One after the other, by an agent of this user whose data lie in `folder`."""
    if user is not None:
        os.chown(folder, user, user)
    work = msgspec.msgpack.encode(_Work(str(folder), list(orders), terms))
    done = subprocess.run(
        [_python(user), "-m", "tests.tasks.execution.as_user"],
        input=work,
        capture_output=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": os.pathsep.join(_PATHS), **(env or {})},
        timeout=100,
        check=False,
        user=user,
        group=user,
        extra_groups=None if user is None else [],
    )
    assert done.returncode == 0, done.stderr.decode()
    return msgspec.msgpack.decode(done.stdout, type=list[Result])


_PATHS = [str(ROOT), *(path for path in sys.path if path.endswith("site-packages"))]


@cache
def _python(user: int | None) -> str:
    """One that this user may run; ours may lie in root's home."""
    here = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    for python in (sys.executable, f"/usr/bin/{here}", f"/usr/local/bin/{here}"):
        try:
            subprocess.run(
                [python, "-c", "import trio, msgspec"],
                check=True,
                cwd=ROOT,
                env={"PYTHONPATH": os.pathsep.join(_PATHS)},
                capture_output=True,
                user=user,
            )
        except (OSError, subprocess.SubprocessError):
            continue
        return python
    pytest.skip(f"no {here} here that an ordinary user may run")


async def _work(work: _Work) -> list[Result]:
    results = []
    for key in ("folders", "hidden"):
        if key in work.terms:
            work.terms[key] = tuple(work.terms[key])
    async with one_agent(Path(work.folder), **work.terms) as world:
        for wanted in work.orders:
            outcome: Outcome = await world.execute(wanted)
            attempt = world.folder / world.attempts[-1]
            there = attempt.is_dir()
            results.append(
                Result(
                    outcome.ending,
                    outcome.code,
                    outcome.words,
                    await world.output() if there else b"",
                    await world.output(stream="stderr") if there else b"",
                    outcome.memory_bytes,
                    sum(path.lstat().st_size for path in attempt.glob("std*")) if there else 0,
                )
            )
    return results


if __name__ == "__main__":
    given = msgspec.msgpack.decode(sys.stdin.buffer.read(), type=_Work)
    sys.stdout.buffer.write(msgspec.msgpack.encode(trio.run(_work, given)))
