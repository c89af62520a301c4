"""What survives an agent that is killed, and a disk whose fsync fails."""

import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import apsw
import pytest

from meshnode.kernel.database import DATABASE_NAME

_WRITERS = textwrap.dedent(
    """
    import os, sys
    from pathlib import Path
    import trio
    from meshnode.kernel.database import KeyValue, kernel_migrations, open_database
    from meshnode.kernel.errors import MeshError
    from protocol.effects import Persist

    async def write(state, writer):
        refused = 0
        for number in range(1_500):
            key = f"{writer}:{number}".encode()
            try:
                await state.persist([Persist("test", key, b"x" * 300), Persist("pair", key, b"y")])
            except MeshError as error:
                os.write(1, f"!{error.code} {error.retryable}\\n".encode())
                refused += 1
                if refused == 20:
                    return
            else:
                os.write(1, key + b"\\n")

    async def main():
        async with open_database(Path(sys.argv[1]), kernel_migrations(), wall=1.0) as database:
            async with trio.open_nursery() as nursery:
                for writer in range(16):
                    nursery.start_soon(write, KeyValue(database), writer)

    trio.run(main)
    """
)


def _run(path: Path, lines: int, **environment: str) -> tuple[list[str], subprocess.Popen[bytes]]:
    """Start the writers, read so many acknowledgements, then kill -9 and read what was still in the pipe."""
    process = subprocess.Popen(
        [sys.executable, "-c", _WRITERS, str(path)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
    )
    assert process.stdout is not None
    with process, process.stdout as pipe:
        acknowledged = [line for _, line in zip(range(lines), pipe, strict=False)]
        if len(acknowledged) == lines:
            process.send_signal(signal.SIGKILL)
        acknowledged += pipe.readlines()
    # A line cut by the kill was never completely acknowledged.
    return [line.decode().strip() for line in acknowledged if line.endswith(b"\n")], process


def _stored(path: Path) -> tuple[set[str], set[str]]:
    connection = apsw.Connection(str(path))
    assert connection.execute("PRAGMA integrity_check").get == "ok"
    rows = connection.execute("SELECT machine, CAST(key AS TEXT) FROM kernel_protocol_state").fetchall()
    connection.close()
    return {str(row[1]) for row in rows if row[0] == "test"}, {str(row[1]) for row in rows if row[0] == "pair"}


@pytest.mark.parametrize("lines", [1, 40, 700, 6_000])
def test_every_acknowledged_write_survives_kill_9(tmp_path: Path, lines: int) -> None:
    path = tmp_path / DATABASE_NAME
    acknowledged, process = _run(path, lines)
    assert process.returncode == -signal.SIGKILL
    assert len(acknowledged) >= lines
    stored, pairs = _stored(path)
    assert set(acknowledged) <= stored
    assert stored == pairs, "a transaction was stored in part"


_FAILING_FSYNC = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
static int calls = 0;
/* One failure, then success again: just what the kernel does after it has dropped the dirty pages. */
static int fail(const char *name, int fd) {
    if (++calls == 60) { errno = EIO; return -1; }
    return ((int (*)(int)) dlsym(RTLD_NEXT, name))(fd);
}
int fsync(int fd) { return fail("fsync", fd); }
int fdatasync(int fd) { return fail("fdatasync", fd); }
"""


@pytest.mark.skipif(sys.platform != "linux" or shutil.which("cc") is None, reason="needs Linux and a C compiler (cc)")
def test_a_failed_fsync_stops_the_store_and_acknowledges_nothing_after(tmp_path: Path) -> None:
    source, library = tmp_path / "fsync.c", tmp_path / "fsync.so"
    source.write_text(_FAILING_FSYNC)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"], check=True)
    path = tmp_path / DATABASE_NAME
    lines, process = _run(path, 1_000_000, LD_PRELOAD=str(library))
    assert process.returncode == 0
    first = next(number for number, line in enumerate(lines) if line.startswith("!"))
    assert first > 0, "nothing was acknowledged before the failure"
    # The 16 writers wake in any order, so a commit from just before the failure may be told just after it ...
    acknowledged = [line for line in lines if not line.startswith("!")]
    assert set(lines[first + 2 * 16 :]) == {"!storage_failed False"}
    # ... but whatever was acknowledged, early or late, is there.
    assert set(acknowledged) <= _stored(path)[0]
