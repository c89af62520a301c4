"""Talking to the agent: errors in its own words, pages, events, and no secret to anybody else."""

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from meshnode.cli.client import AgentClient
from meshnode.cli.frames import ServerEvent
from meshnode.kernel.errors import ErrorCode, MeshError
from tests.cli.fake_agent import Answer, FakeAgent, refusal

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells whose a socket is")


Connect = Callable[..., AgentClient]


@pytest.fixture
def connect(agent: FakeAgent, tmp_path: Path) -> Iterator[Connect]:
    """Makes clients of the fake agent and closes them."""
    made: list[AgentClient] = []

    def client(port: int | None = None, **more: Any) -> AgentClient:
        made.append(AgentClient(port or agent.port, token_path=tmp_path / "api-token", **more))
        return made[-1]

    yield client
    for one in made:
        one.close()


def test_an_answer_is_decoded(agent: FakeAgent, connect: Connect) -> None:
    agent.on("GET /api/status", Answer({"name": "den"}))
    client = connect()
    assert client.get("/api/status") == {"name": "den"}
    assert client.get("/api/status") == {"name": "den"}
    assert "authorization" not in agent.heard[0].headers


def test_nobody_listens(connect: Connect) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound but not listening: refused
        client = connect(taken.getsockname()[1])
        with pytest.raises(
            MeshError, match=r"no agent is running on 127\.0\.0\.1:[0-9]+: start one with `meshnode up`"
        ) as caught:
            client.get("/api/status")
    assert caught.value.code is ErrorCode.AGENT_NOT_RUNNING


def test_something_else_listens(agent: FakeAgent, connect: Connect) -> None:
    agent.on("GET /api/status", Answer(b"<html>", is_agent=False))
    with pytest.raises(MeshError, match="is no meshnode agent"):
        connect().get("/api/status")


def test_something_that_speaks_no_http_listens(connect: Connect) -> None:
    def serve(listening: socket.socket) -> None:
        connection, _ = listening.accept()
        with connection:
            connection.recv(100)
            connection.sendall(b"220 mail.example ESMTP\r\n")

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=serve, args=(listening,))
        thread.start()
        with pytest.raises(MeshError, match="ended the connection") as caught:
            connect(listening.getsockname()[1]).get("/")
        thread.join()
    assert caught.value.code is ErrorCode.UNAVAILABLE


def test_an_agent_that_ends_meanwhile_is_not_running(connect: Connect) -> None:
    listening = socket.create_server(("127.0.0.1", 0))
    client = connect(listening.getsockname()[1])

    def serve() -> None:
        connection, _ = listening.accept()
        connection.recv(1)
        listening.close()
        connection.close()

    thread = threading.Thread(target=serve)
    thread.start()
    with pytest.raises(MeshError, match=r"no agent is running on .*: start one with") as caught:
        client.get("/")
    thread.join()
    assert caught.value.code is ErrorCode.AGENT_NOT_RUNNING


def test_a_machine_without_loopback_runs_no_agent() -> None:
    # In a network namespace of its own, whose loopback interface is down.
    asked = [sys.executable, "-m", "meshnode", "status", "--api-port", "9"]
    done = subprocess.run(["unshare", "-n", *asked], capture_output=True, text=True, check=False, timeout=30)
    if "unshare" in done.stderr:
        pytest.skip("needs root, for a network namespace")
    assert "no agent is running on 127.0.0.1:9 (Network is unreachable): start one with" in done.stderr


def test_an_agent_that_hangs_is_given_up(connect: Connect) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        client = connect(listening.getsockname()[1])
        with pytest.raises(MeshError, match=r"did not answer within 0\.05 s") as caught:
            client.get("/api/status", timeout_s=0.05)
    assert caught.value.code is ErrorCode.TIMEOUT


def test_the_agents_own_words_come_through(agent: FakeAgent, connect: Connect) -> None:
    agent.on("DELETE /api/nodes/x", refusal(403, "not_admin", "Only an admin may.", who="den"))
    with pytest.raises(MeshError) as caught:
        connect().delete("/api/nodes/x")
    assert (caught.value.code, caught.value.message) == (ErrorCode.NOT_ADMIN, "Only an admin may.")
    assert caught.value.detail == {"who": "den"}


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (refusal(403, "invented_later", "no"), ErrorCode.FORBIDDEN),
        (Answer(b"<html>", 503), ErrorCode.UNAVAILABLE),
        (Answer(["what"], 418), ErrorCode.INTERNAL),
    ],
)
def test_an_error_in_another_form_gets_the_nearest_code(
    agent: FakeAgent, connect: Connect, answer: Answer, code: ErrorCode
) -> None:
    agent.on("GET /x", answer)
    with pytest.raises(MeshError) as caught:
        connect().get("/x")
    assert caught.value.code is code


def test_a_list_is_read_to_its_end(agent: FakeAgent, connect: Connect) -> None:
    agent.on(
        "GET /api/nodes?limit=500", Answer([1, 2], headers={"Link": '</api/nodes?limit=500&cursor=b>; rel="next"'})
    )
    agent.on("GET /api/nodes?limit=500&cursor=b", Answer([3]))
    assert connect().pages("/api/nodes") == [1, 2, 3]


def test_a_next_page_elsewhere_is_not_followed(agent: FakeAgent, connect: Connect) -> None:
    agent.on("GET /api/nodes?limit=500", Answer([1], headers={"Link": '<http://192.0.2.1/steal>; rel="next"'}))
    assert connect().pages("/api/nodes") == [1]


def test_the_token_is_sent_only_when_asked_for(agent: FakeAgent, connect: Connect, tmp_path: Path) -> None:
    (tmp_path / "api-token").write_text("mnt_secret\n")
    agent.on("GET /open", Answer("yes"))
    agent.on("GET /closed", Answer("yes", token="mnt_secret"))
    client = connect()
    assert client.get("/open") == client.get("/closed") == "yes"
    sent = [one.headers.get("authorization") for one in agent.heard if one.path != "/healthz"]
    assert sent == [None, None, "Bearer mnt_secret"]


def test_a_refusal_ends_the_connection_and_the_request_is_sent_on_a_new_one(
    agent: FakeAgent, connect: Connect, tmp_path: Path
) -> None:
    """What a 401 leaves unread, the agent does not keep the connection for."""
    (tmp_path / "api-token").write_text("mnt_secret\n")
    agent.on("POST /closed", Answer("yes", token="mnt_secret"))
    for _ in range(5):
        assert connect().post("/closed", {"a": "b" * 1000}, secret=True) == "yes"


@linux_only
def test_the_agent_says_where_its_token_is(agent: FakeAgent, connect: Connect, tmp_path: Path) -> None:
    """Only --api-port was given, and the agent's data folder is not the usual one."""
    elsewhere = tmp_path / "elsewhere" / "api-token"
    elsewhere.parent.mkdir()
    elsewhere.write_text("mnt_there\n")
    refused = refusal(401, "unauthorized", "This request needs the token.", token_file=str(elsewhere))
    agent.on("GET /closed", refused, Answer("yes", token="mnt_there"))
    assert connect().get("/closed") == "yes"


@linux_only
@pytest.mark.parametrize("uid", [None, 65_533])
def test_nobody_gets_another_file_for_a_token(
    agent: FakeAgent, connect: Connect, tmp_path: Path, uid: int | None
) -> None:
    """Whoever listens on the port could name any file of ours."""
    private = tmp_path / "id_ed25519"
    private.write_text("private\n")
    agent.on("GET /closed", refusal(401, "unauthorized", "The token.", token_file=str(private)))
    with pytest.raises(MeshError, match="The token"):
        connect().get("/closed")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "api-token").write_text("mnt_private\n")
    named = str(tmp_path / "theirs" / "api-token")
    agent.on("GET /closed", refusal(401, "unauthorized", "The token.", token_file=named))
    with pytest.raises(MeshError, match="no secret is sent there"):
        connect(peer_uid=lambda connected: uid).get("/closed")
    assert all("authorization" not in one.headers for one in agent.heard)


def test_without_a_token_the_refusal_is_told(agent: FakeAgent, connect: Connect) -> None:
    agent.on("GET /closed", Answer("yes", token="mnt_secret"))
    with pytest.raises(MeshError, match="needs the token") as caught:
        connect().get("/closed")
    assert caught.value.code is ErrorCode.UNAUTHORIZED


@linux_only
@pytest.mark.parametrize("uid", [65_533, None])
def test_another_users_process_gets_no_secret(
    agent: FakeAgent, connect: Connect, tmp_path: Path, uid: int | None
) -> None:
    (tmp_path / "api-token").write_text("mnt_secret\n")
    agent.on("GET /closed", Answer("yes", token="mnt_secret"))
    client = connect(peer_uid=lambda connected: uid)
    with pytest.raises(MeshError, match="no secret is sent there"):
        client.get("/closed")
    with pytest.raises(MeshError, match="no secret is sent there"):
        client.post("/api/cluster/join-remote", {"url": "http://secret"}, secret=True)
    assert agent.asked("POST") == []
    assert all("authorization" not in one.headers for one in agent.heard)


@linux_only
def test_the_kernel_knows_our_own_agent(agent: FakeAgent, connect: Connect) -> None:
    agent.on("POST /join", Answer({"ok": True}))
    seen: list[int | None] = []

    def peer_uid(connected: Any) -> int | None:
        from meshnode.api.peer import peer_of

        seen.append(peer_of(connected).uid)
        return seen[-1]

    client = connect(peer_uid=peer_uid)
    assert client.post("/join", {"url": "u"}, secret=True) == {"ok": True}
    assert seen == [os.geteuid()]


def test_events(agent: FakeAgent, connect: Connect) -> None:
    chunks = (
        b"event: connected\ndata: {}\n\n: keep-",
        b'alive\n\nevent: x\nid: 1\ndata: {"a":',
        b"1}\n\ndata: text\n\n",
    )
    agent.on("GET /api/events", Answer(chunks=chunks))
    assert list(connect().events("/api/events")) == [
        ServerEvent("connected", {}),
        ServerEvent(""),
        ServerEvent("x", {"a": 1}, "1"),
        ServerEvent("message", "text"),
    ]


def test_events_that_are_refused(agent: FakeAgent, connect: Connect) -> None:
    agent.on("GET /api/events", refusal(503, "overloaded", "Too many readers."))
    with pytest.raises(MeshError, match="Too many readers"):
        list(connect().events("/api/events"))
