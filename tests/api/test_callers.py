"""Credentials: the token file, login codes, sessions, rate limits, and who owns a socket."""

import os
import shutil
import socket
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from meshnode.api.callers import ApiToken, BrowserSessions, load_or_create_token, login_codes_max
from meshnode.api.limits import ApiLimits
from meshnode.api.peer import Peer, owner_by_netlink, owner_by_proc, peer_of
from meshnode.api.rate import TokenBuckets, buckets_max
from meshnode.api.sockets import bind_loopback
from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.kernel.redaction import SecretSet

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="the kernel's socket table is Linux's")


def test_the_token_is_made_once_and_for_its_owner_only(data_dir: Path) -> None:
    token = load_or_create_token(data_dir)
    assert load_or_create_token(data_dir) == token
    assert token.startswith("mnt_")
    assert len(token) > 40
    assert stat.S_IMODE((data_dir / "api-token").stat().st_mode) == 0o600
    assert [path.name for path in data_dir.iterdir()] == ["api-token"]


def test_a_token_file_that_others_could_read_is_closed_again(data_dir: Path) -> None:
    token = load_or_create_token(data_dir)
    (data_dir / "api-token").chmod(0o644)
    assert load_or_create_token(data_dir) == token
    assert stat.S_IMODE((data_dir / "api-token").stat().st_mode) == 0o600


def _link(path: Path) -> None:
    (path.parent / "elsewhere").write_text("mnt_" + "x" * 43)
    path.symlink_to(path.parent / "elsewhere")


def _foreign(path: Path) -> None:
    if os.getuid() != 0:
        pytest.skip("giving a file to another user needs root")
    path.write_text("mnt_" + "x" * 43)
    os.chown(path, 65534, 65534)


@pytest.mark.parametrize(
    "spoil", [_link, _foreign, lambda p: p.mkdir(), lambda p: p.write_text("short"), lambda p: p.touch()]
)
def test_a_token_file_that_is_not_ours_is_refused(data_dir: Path, spoil: Callable[[Path], object]) -> None:
    spoil(data_dir / "api-token")
    with pytest.raises(MeshError) as caught:
        load_or_create_token(data_dir)
    assert caught.value.code is ErrorCode.STORAGE_FAILED
    assert "api-token" in caught.value.message


def test_a_token_compares() -> None:
    token = ApiToken("mnt_right", SecretSet())
    assert token.matches("mnt_right")
    assert not token.matches("mnt_wrong")
    assert not token.matches("")
    assert not token.matches("mnt_right\udcff")


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def sessions(clock: Clock) -> BrowserSessions:
    return BrowserSessions(ApiLimits(), 4892, SecretSet(), clock)


def test_a_login_code_works_once(sessions: BrowserSessions) -> None:
    code = sessions.mint_code()
    cookie = sessions.redeem(code)
    assert cookie.startswith("meshnode_session_4892=")
    assert cookie.endswith("; Path=/; HttpOnly; SameSite=Strict; Max-Age=43200")
    assert sessions.holds("other=1; " + cookie.partition(";")[0])
    with pytest.raises(MeshError) as caught:
        sessions.redeem(code)
    assert caught.value.code is ErrorCode.TOKEN_INVALID


def test_codes_and_sessions_end(sessions: BrowserSessions, clock: Clock) -> None:
    late = sessions.mint_code()
    cookie = sessions.redeem(sessions.mint_code()).partition(";")[0]
    clock.now = 60.0
    with pytest.raises(MeshError):
        sessions.redeem(late)
    assert sessions.holds(cookie)
    clock.now = 43_200.0
    assert not sessions.holds(cookie)


def test_logging_out_ends_one_session(sessions: BrowserSessions) -> None:
    one, other = (sessions.redeem(sessions.mint_code()).partition(";")[0] for _ in range(2))
    assert "Max-Age=0" in sessions.end(one)
    assert not sessions.holds(one)
    assert sessions.holds(other)


def test_codes_and_sessions_are_bounded(sessions: BrowserSessions) -> None:
    codes = [sessions.mint_code() for _ in range(login_codes_max + 1)]
    with pytest.raises(MeshError):
        sessions.redeem(codes[0])
    cookies = [sessions.redeem(sessions.mint_code()).partition(";")[0] for _ in range(ApiLimits().sessions_max + 1)]
    assert [sessions.holds(cookie) for cookie in cookies].count(False) == 1
    assert sessions.holds(cookies[-1])


@pytest.mark.parametrize(
    "cookie", ["", "meshnode_session_4892", "meshnode_session_4892=", "meshnode_session_1=x", ";;=;"]
)
def test_other_cookies_open_nothing(sessions: BrowserSessions, cookie: str) -> None:
    sessions.redeem(sessions.mint_code())
    assert not sessions.holds(cookie)


def test_token_buckets() -> None:
    buckets = TokenBuckets(rate_per_s=2.0, burst=3)
    assert [buckets.take("a", 0.0) for _ in range(4)] == [0.0, 0.0, 0.0, 0.5]
    assert buckets.take("b", 0.0) == 0.0
    assert buckets.empty("a", 0.4)
    assert not buckets.empty("a", 0.5)
    assert buckets.take("a", 0.5) == 0.0
    assert buckets.take("a", 100.0) == 0.0
    assert [buckets.take("a", 100.0) for _ in range(3)] == [0.0, 0.0, 0.5]
    for number in range(10_000):
        buckets.take(number, 100.0)
    assert len(buckets._buckets) == buckets_max


def _pair(family: socket.AddressFamily = socket.AF_INET) -> tuple[socket.socket, socket.socket]:
    host = "::1" if family == socket.AF_INET6 else "127.0.0.1"
    with socket.socket(family) as listening:
        listening.bind((host, 0))
        listening.listen()
        client = socket.create_connection(listening.getsockname()[:2])
        accepted, _ = listening.accept()
    return client, accepted


@linux_only
@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
@pytest.mark.parametrize("look_up", [owner_by_netlink, owner_by_proc])
def test_the_kernel_says_whose_socket_it_is(family: socket.AddressFamily, look_up: Callable[..., int | None]) -> None:
    try:
        client, accepted = _pair(family)
    except OSError:
        pytest.skip("this machine has no ::1")
    with client, accepted:
        ends = accepted.getpeername()[:2], accepted.getsockname()[:2]
        assert look_up(family, *ends) == os.getuid()
        assert look_up(family, ends[0], ("::1" if family == socket.AF_INET6 else "127.0.0.1", 1)) is None
        assert peer_of(accepted) == Peer(os.getuid())


@linux_only
@pytest.mark.parametrize("look_up", [owner_by_netlink, owner_by_proc])
def test_a_socket_that_its_process_has_closed_belongs_to_nobody(look_up: Callable[..., int | None]) -> None:
    """The kernel lists it with uid 0: taken at its word, any user could write blindly as root."""
    client, accepted = _pair()
    with accepted:
        client.close()
        assert look_up(socket.AF_INET, accepted.getpeername(), accepted.getsockname()) is None
        assert peer_of(accepted) == Peer(None)


@linux_only
@pytest.mark.parametrize("look_up", [owner_by_netlink, owner_by_proc])
def test_a_connection_that_is_gone_belongs_to_nobody_even_where_somebody_listens(
    look_up: Callable[..., int | None],
) -> None:
    """The kernel's look-up falls back to a listening socket, here one of this very user."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        assert look_up(socket.AF_INET, listening.getsockname(), ("127.0.0.1", 1)) is None


@linux_only
def test_the_overflow_user_is_nobody_in_particular() -> None:
    client, accepted = _pair()
    with client, accepted:
        overflow = int(Path("/proc/sys/kernel/overflowuid").read_text())
        assert peer_of(accepted, lambda *_: overflow) == Peer(None)
        assert peer_of(accepted, lambda *_: 1000) == Peer(1000)


def test_a_taken_port_is_named_with_who_has_it() -> None:
    taken = bind_loopback(0)
    try:
        with pytest.raises(MeshError) as caught:
            bind_loopback(taken.port)
    finally:
        taken.close()
    assert caught.value.code is ErrorCode.PORT_IN_USE
    assert str(taken.port) in caught.value.message
    assert f"(process {os.getpid()})" in caught.value.message
    assert "--api-port" in caught.value.message
    assert caught.value.detail["pid"] == os.getpid()


def test_a_port_taken_on_ipv6_alone_is_taken() -> None:
    """Whoever holds [::1] would be sent the token by every client that tries `localhost`."""
    with socket.socket(socket.AF_INET6) as squatter:
        squatter.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        try:
            squatter.bind(("::1", 0))
        except OSError:
            pytest.skip("this machine has no ::1")
        squatter.listen()
        with pytest.raises(MeshError) as caught:
            bind_loopback(squatter.getsockname()[1])
    assert caught.value.code is ErrorCode.PORT_IN_USE


def test_a_machine_without_ipv6_is_served_on_ipv4(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "has_ipv6", False)
    sockets = bind_loopback(0)
    try:
        assert [listening.getsockname()[0] for listening in sockets.sockets] == ["127.0.0.1"]
    finally:
        sockets.close()


@pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0 or shutil.which("unshare") is None or shutil.which("ip") is None,
    reason="needs root on Linux, unshare and ip",
)
@pytest.mark.parametrize("harm", ["ip -4 addr flush dev lo", "ip link set lo down"])
def test_a_machine_without_loopback_is_told_what_to_do(harm: str) -> None:
    """In a network namespace of its own, whose loopback interface has lost 127.0.0.1, or is down."""
    attempt = "from meshnode.api.sockets import bind_loopback; bind_loopback(0)"
    steps = f"ip link set lo up && {harm} && exec {sys.executable} -c '{attempt}'"
    ran = subprocess.run(["unshare", "--net", "sh", "-c", steps], capture_output=True, text=True, check=False)
    assert "MeshError" in ran.stderr
    assert "ip addr replace 127.0.0.1/8 dev lo" in ran.stderr


def test_only_loopback_is_bound() -> None:
    sockets = bind_loopback(0)
    try:
        assert {listening.getsockname()[0] for listening in sockets.sockets} <= {"127.0.0.1", "::1"}
    finally:
        sockets.close()
