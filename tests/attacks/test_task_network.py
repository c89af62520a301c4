"""Case 45: no task reaches the network unless it asked and may, and nobody calls the local API as the agent's user.

Each is tried with an agent that is root, whose tasks have users of their own, and with an ordinary user's.
"""

import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from protocol.placement.tasks import Needs
from tests.tasks.execution.as_user import is_root, needs_python, run_all, script, users
from tests.tasks.execution.world import needs_walls

pytestmark = [needs_walls, needs_python]
both_users = pytest.mark.parametrize("user", users())

CONNECT = "import socket, sys; s = socket.create_connection(('127.0.0.1', int(sys.argv[1])), 2); print(s.recv(9))"


@pytest.fixture
def port() -> Iterator[int]:
    """Something that listens on this machine."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            while True:
                try:
                    client, _ = server.accept()
                except OSError:
                    return
                with client:
                    client.sendall(b"hello")

        thread = threading.Thread(target=serve)
        thread.start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)
        thread.join()


@both_users
def test_case_45_no_network_unless_asked_and_allowed(data_dir: Path, user: int | None, port: int) -> None:
    asks = Needs(network=True)
    [quiet] = run_all(data_dir, user, [script(CONNECT, str(port))], network=True, trusts_user=False)
    assert quiet.code == 1
    assert b"refused" in quiet.err
    [unallowed] = run_all(data_dir, user, [script(CONNECT, str(port), needs=asks)], network=False, trusts_user=False)
    assert unallowed.ending == "refused"
    [allowed] = run_all(data_dir, user, [script(CONNECT, str(port), needs=asks)], network=True, trusts_user=False)
    assert allowed.out == b"b'hello'\n"


@both_users
def test_case_45_nobody_calls_the_local_api_as_the_agents_user(data_dir: Path, user: int | None, port: int) -> None:
    wanted = script(CONNECT, str(port), needs=Needs(network=True))
    [result] = run_all(data_dir, user, [wanted], network=True, trusts_user=True)
    if is_root(user):
        assert result.out == b"b'hello'\n"  # as a user whom nobody trusts
    else:
        assert result.ending == "refused"
        assert "api.require_token" in result.words


UNIX = """
import os
import socket
for end in socket.socketpair(): end.close()
with socket.socket(socket.AF_UNIX) as client:
    client.connect('\\0' + 'NAME')
    print(client.recv(9))
"""


@both_users
def test_case_45_sockets_without_a_path_are_nobodys_way_out(data_dir: Path, user: int | None) -> None:
    name = data_dir.name
    with socket.socket(socket.AF_UNIX) as desktop:
        desktop.bind(f"\0{name}")
        desktop.listen()
        asks = Needs(network=True)
        wanted = UNIX.replace("NAME", name)
        orders = [script(wanted), script(wanted, needs=asks, timeout_s=1.0)]
        quiet, networked = run_all(data_dir, user, orders, network=True, trusts_user=False)
    assert b"refused" in quiet.err
    # Root's tasks get through, as users whom a desktop does not know: this one accepts nobody.
    assert networked.ending == "timed_out" if is_root(user) else b"not supported" in networked.err


@both_users
def test_case_45_whose_user_a_network_task_is(data_dir: Path, user: int | None) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        here = server.getsockname()[1]
        code = f"import socket, time; s = socket.create_connection(('127.0.0.1', {here})); time.sleep(1)"
        seen: list[int] = []

        def look() -> None:
            client, (_, remote) = server.accept()
            for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
                words = line.split()
                if int(words[1].split(":")[1], 16) == remote:
                    seen.append(int(words[7]))
            client.close()

        thread = threading.Thread(target=look)
        thread.start()
        run_all(data_dir, user, [script(code, needs=Needs(network=True))], network=True, trusts_user=False)
        thread.join()
    [uid] = seen
    assert uid >= 1_900_000_000 or uid == 64_489 if is_root(user) else uid == (user or os.geteuid())
