"""What a process that computes for strangers can still do: the same program is tried inside and outside."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from meshnode.llm.engine.isolation import can_be_alone

pytestmark = pytest.mark.skipif(not can_be_alone(), reason="this system gives no process a network of its own")

PROGRAM = """
import ctypes, fcntl, json, mmap, os, resource, socket, subprocess, sys, threading
from meshnode.llm.engine.isolation import isolate, shut_in

libc = ctypes.CDLL(None, use_errno=True)
inside, path, port, parent = sys.argv[1] == "inside", sys.argv[2], int(sys.argv[3]), int(sys.argv[4])

def checked(result):
    if result < 0:
        raise OSError(ctypes.get_errno(), "refused")

def forks():
    child = os.fork()
    if not child:
        os._exit(0)
    os.waitpid(child, 0)

def owns():
    with socket.socket() as sock:
        fcntl.fcntl(sock, fcntl.F_SETOWN, parent)

def reaches():
    with socket.socket() as sock:
        sock.connect(("127.0.0.1", port))

def threads():
    thread = threading.Thread(target=lambda: None)
    thread.start()
    thread.join()

def talks_to_itself():
    with socket.socket() as server, socket.socket() as client:
        server.bind(("127.0.0.1", 0))
        server.listen(1)
        client.connect(server.getsockname())
        server.accept()[0].close()

attempts = {
    "read a file": lambda: open(path).read(),
    "write a file": lambda: open(path, "w").close(),
    "list files": lambda: os.listdir("/"),
    "remove a file": lambda: os.unlink(path),
    "reach a port of the machine": reaches,
    "open a socket of the machine": lambda: socket.socket(socket.AF_UNIX).close(),
    "ask the kernel about networks": lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW).close(),
    "signal the agent": lambda: os.kill(parent, 0),
    "get hold of the agent": lambda: os.close(os.pidfd_open(parent)),
    "have signals sent to the agent": owns,
    "begin a process": forks,
    "run a program": lambda: subprocess.run(["true"], check=True),
    "make a namespace": lambda: checked(libc.unshare(0x10000000)),
    "take more memory than is lent": lambda: mmap.mmap(-1, 1 << 31, flags=mmap.MAP_PRIVATE).close(),
}
needed = {"begin a thread": threads, "talk to itself": talks_to_itself, "take memory": lambda: bytearray(1 << 27)}
if inside:
    assert isolate(nice=0, memory_bytes_max=None, network=False, shuts_in=True)
    resource.setrlimit(resource.RLIMIT_DATA, (1 << 29, 1 << 29))
    shut_in()
done = []
for name, attempt in {**needed, **attempts}.items():
    try:
        attempt()
    except OSError:
        continue
    done.append(name)
print(json.dumps([list(needed), list(attempts), done]))
"""


def tried(where: str, folder: Path) -> tuple[list[str], list[str], list[str]]:
    """What must work, what must not, and what worked."""
    path = folder / "a file"
    path.write_text("somebody's")
    with socket.create_server(("127.0.0.1", 0)) as agent:
        arguments = [where, str(path), str(agent.getsockname()[1]), str(os.getpid())]
        command = [sys.executable, "-c", PROGRAM, *arguments]
        ended = subprocess.run(command, capture_output=True, timeout=60, check=False)
    assert ended.returncode == 0, ended.stderr.decode()
    said: Any = json.loads(ended.stdout)
    needed, attempts, done = said
    return needed, attempts, done


def test_whoever_is_shut_in_computes_and_no_more(tmp_path: Path) -> None:
    needed, _, done = tried("inside", tmp_path)
    assert done == needed
    assert (tmp_path / "a file").read_text() == "somebody's"


def test_outside_all_of_it_can_be_done(tmp_path: Path) -> None:
    """Else the test above would show nothing."""
    needed, attempts, done = tried("outside", tmp_path)
    assert done == [*needed, *attempts]
