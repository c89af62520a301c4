"""Joining through the real listener on loopback: what a joiner gets, and what it is told when it gets nothing."""

import errno
import os
from pathlib import Path

import pytest
import trio

from meshnode.cluster.service.onboarding.certificates import check_leaf
from meshnode.cluster.service.onboarding.joiner import JoinTimes, read_join_url
from meshnode.cluster.service.onboarding.listener import ListenerLimits
from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.kernel.identity import open_sealed_root
from protocol.ids import Address, root_pin
from protocol.trust.join_url import JoinUrl, build_join_url, parse_join_url
from protocol.trust.roster import Roster
from protocol.wire.frames import Versions
from tests.support.join_attacker import guess
from tests.support.onboarding import SteppedClock, open_mesh


async def refused(awaitable) -> MeshError:
    with pytest.raises(MeshError) as caught:
        await awaitable
    return caught.value


async def test_a_machine_joins_and_gets_everything(data_dir: Path) -> None:
    async with open_mesh(data_dir) as mesh:
        invite = await mesh.invite()
        me = mesh.machine()
        grant = await mesh.join(invite.url, identity=me, name=" Anna's  laptop 🖥\n")
        assert (grant.mesh_id, grant.node_id, grant.role) == (mesh.root.mesh_id, me.node_id, "member")
        assert (grant.name, grant.issuer_name) == ("Anna's laptop 🖥", "kitchen")
        assert check_leaf(grant.leaf, mesh.root.public_key) == me.public_key
        roster = Roster(
            root_public_key=grant.root_public_key, verifier=mesh.admin.verifier, statements=grant.statements
        )
        assert set(roster.members()) == {me.node_id, mesh.identity.node_id}
        admission = roster.admission(me.node_id)
        assert admission is not None
        assert admission.invitation == invite.invitation.token_id
        assert [key.key for key in grant.keys] == [b"k" * 32]
        assert grant.peers[0].addresses == (Address("127.0.0.1", 4893),)
        assert grant.sealed_root == b""


async def test_an_admin_gets_the_root_key(data_dir: Path) -> None:
    async with open_mesh(data_dir) as mesh:
        me = mesh.machine()
        grant = await mesh.join((await mesh.invite(role="admin")).url, identity=me)
        assert grant.role == "admin"
        assert open_sealed_root(me, grant.sealed_root, grant.mesh_id).seed == mesh.root.seed


async def test_a_large_roster_comes_in_pages(data_dir: Path) -> None:
    async with open_mesh(data_dir) as mesh:
        for number in range(450):
            key = (number + 1).to_bytes(32, "big")
            mesh.admin._admit(key, f"machine {number}", "member", mesh.identity.node_id, b"")
        grant = await mesh.join((await mesh.invite()).url)
        assert len(grant.statements) == 452


async def test_a_used_url_says_so_and_by_whom(data_dir: Path) -> None:
    async with open_mesh(data_dir) as mesh:
        invite = await mesh.invite()
        await mesh.join(invite.url, name="first")
        error = await refused(mesh.join(invite.url, name="second"))
        assert error.code is ErrorCode.TOKEN_USED
        assert "'first'" in error.message
        assert "meshnode invite" in error.message


async def test_whose_answer_was_lost_may_ask_again(data_dir: Path) -> None:
    async with open_mesh(data_dir) as mesh:
        invite, me = await mesh.invite(), mesh.machine()
        first = await mesh.join(invite.url, identity=me)
        again = await mesh.join(invite.url, identity=me)
        assert first.node_id == again.node_id
        assert len(mesh.admin.roster) == 2
        mesh.clock.pass_time(601)
        await mesh.invite()
        error = await refused(mesh.join(invite.url, identity=me))
        assert error.code is ErrorCode.TOKEN_EXPIRED


async def test_an_expired_url_says_so_while_the_port_is_open(data_dir: Path) -> None:
    async with open_mesh(data_dir) as mesh:
        invite = await mesh.invite()
        mesh.clock.pass_time(601)
        await mesh.invite()
        error = await refused(mesh.join(invite.url))
        assert error.code is ErrorCode.TOKEN_EXPIRED
        assert mesh.admin.admitted == []


async def test_an_expired_url_says_so_when_nobody_listens(data_dir: Path) -> None:
    clock = SteppedClock()
    async with open_mesh(data_dir, clock=clock) as mesh:
        invite = await mesh.invite()
        await mesh.onboarding.revoke(invite.invitation.token)
        await mesh.closed()
        error = await refused(mesh.join(invite.url))
        assert error.code is ErrorCode.UNREACHABLE
        assert "connection refused" in error.message
        assert "only while an invitation is valid" in error.message


async def test_a_revoked_url_says_so(data_dir: Path) -> None:
    async with open_mesh(data_dir) as mesh:
        invite = await mesh.invite()
        await mesh.invite()
        await mesh.onboarding.revoke(invite.invitation.token)
        error = await refused(mesh.join(invite.url))
        assert error.code is ErrorCode.TOKEN_INVALID
        assert "revoked" in error.message


async def test_an_unknown_token_says_so(data_dir: Path) -> None:
    async with open_mesh(data_dir) as mesh:
        url = parse_join_url((await mesh.invite()).url)
        other = JoinUrl(url.host, url.port, b"\x00" * 8, url.secret, url.pin)
        error = await refused(mesh.join(build_join_url(other)))
        assert error.code is ErrorCode.TOKEN_INVALID
        assert "not known" in error.message


async def test_a_wrong_secret_is_noticed_before_a_proof_is_sent(data_dir: Path) -> None:
    async with open_mesh(data_dir) as mesh:
        url = parse_join_url((await mesh.invite()).url)
        other = JoinUrl(url.host, url.port, url.token_id, b"\x00" * 16, url.pin)
        error = await refused(mesh.join(build_join_url(other)))
        assert error.code is ErrorCode.JOIN_REFUSED
        assert "Copy the whole URL again" in error.message
        (invitation,) = mesh.onboarding.invitations()
        assert (invitation.state, invitation.wrong_proofs) == ("open", 0)


async def test_another_mesh_at_the_address_is_named(data_dir: Path) -> None:
    async with open_mesh(data_dir) as mesh:
        url = parse_join_url((await mesh.invite()).url)
        other = JoinUrl(url.host, url.port, url.token_id, url.secret, root_pin(b"\x01" * 32))
        error = await refused(mesh.join(build_join_url(other)))
        assert error.code is ErrorCode.PIN_MISMATCH
        assert "another mesh" in error.message
        assert "Nothing was sent" in error.message


async def test_an_evicted_machine_is_told_why(data_dir: Path) -> None:
    async with open_mesh(data_dir) as mesh:
        me = mesh.machine()
        mesh.admin.evict(me.node_id)
        error = await refused(mesh.join((await mesh.invite()).url, identity=me))
        assert error.code is ErrorCode.EVICTED
        assert "new identity" in error.message


async def test_an_absent_admin_is_told_and_the_url_still_counts(data_dir: Path) -> None:
    async with open_mesh(data_dir) as mesh:
        invite, me = await mesh.invite(), mesh.machine()
        mesh.admin.refuse = MeshError(ErrorCode.UNREACHABLE, "No admin is online. Start one, then join again.")
        error = await refused(mesh.join(invite.url, identity=me))
        assert error.code is ErrorCode.JOIN_REFUSED
        assert "No admin is online" in error.message
        mesh.admin.refuse = None
        assert (await mesh.join(invite.url, identity=me)).node_id == me.node_id


async def test_every_address_that_failed_is_named_with_its_reason(data_dir: Path) -> None:
    silent = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with open_mesh(data_dir) as mesh:
        url = parse_join_url((await mesh.invite()).url)
        free = await trio.open_tcp_listeners(0, host="127.0.0.1")
        dead_port = free[0].socket.getsockname()[1]
        await free[0].aclose()
        await mesh.onboarding.revoke(mesh.onboarding.invitations()[0].token)
        await mesh.closed()
        alternates = (Address("127.0.0.1", dead_port), Address("127.0.0.1", silent[0].socket.getsockname()[1]))
        named = JoinUrl("no-such-host.invalid", url.port, url.token_id, url.secret, url.pin, alternates)
        error = await refused(mesh.join(build_join_url(named), times=JoinTimes(3, 0.5, 10, 0.05)))
        assert error.code is ErrorCode.TIMEOUT or error.code is ErrorCode.UNREACHABLE
        assert f"no-such-host.invalid:{url.port}: the name is not known here" in error.message
        assert f"127.0.0.1:{dead_port}: connection refused" in error.message
        assert f"{alternates[1]}: it said nothing in time" in error.message
        assert len(error.detail["tried"]) == 3
    await silent[0].aclose()


async def test_an_alternate_address_does_it(data_dir: Path) -> None:
    async with open_mesh(data_dir, addresses=("127.0.0.1", "127.0.0.2")) as mesh:
        url = parse_join_url((await mesh.invite()).url)
        assert url.alternates == (Address("127.0.0.2", mesh.port),)
        free = await trio.open_tcp_listeners(0, host="127.0.0.1")
        dead_port = free[0].socket.getsockname()[1]
        await free[0].aclose()
        first_dead = JoinUrl(
            "127.0.0.1", dead_port, url.token_id, url.secret, url.pin, (Address("127.0.0.1", mesh.port),)
        )
        grant = await mesh.join(build_join_url(first_dead))
        assert grant.address == Address("127.0.0.1", mesh.port)


async def test_something_else_at_the_address_is_named(data_dir: Path) -> None:
    async def shout(stream: trio.SocketStream) -> None:
        await stream.send_all(b"SSH-2.0-OpenSSH_9.2p1\r\n")

    async with open_mesh(data_dir) as mesh, trio.open_nursery() as nursery:
        listeners = await nursery.start(trio.serve_tcp, shout, 0)
        url = parse_join_url((await mesh.invite()).url)
        port = listeners[0].socket.getsockname()[1]
        other = JoinUrl("127.0.0.1", port, url.token_id, url.secret, url.pin)
        error = await refused(mesh.join(build_join_url(other)))
        assert "does not speak TLS" in error.message
        nursery.cancel_scope.cancel()


async def test_ipv6_alone_is_enough(data_dir: Path) -> None:
    try:
        probe = await trio.open_tcp_listeners(0, host="::1")
    except OSError as error:
        if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
            raise
        pytest.skip("this machine has no IPv6")
    await probe[0].aclose()
    async with open_mesh(data_dir, host="::1", addresses=("::1",)) as mesh:
        invite = await mesh.invite()
        assert f"http://[::1]:{mesh.port}/join/" in invite.url
        assert (await mesh.join(invite.url)).address == Address("::1", mesh.port)


async def test_a_taken_port_is_said_and_leaves_no_invitation(data_dir: Path) -> None:
    taken = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = taken[0].socket.getsockname()[1]
    async with open_mesh(data_dir, port=port) as mesh:
        error = await refused(mesh.invite())
        assert error.code is ErrorCode.PORT_IN_USE
        assert f"TCP port {port}" in error.message
        assert f"(process {os.getpid()})" in error.message
        assert "--onboarding-port" in error.message
        assert [one.state for one in mesh.onboarding.invitations()] == ["revoked"]
        await taken[0].aclose()
        invite = await mesh.invite()
        assert (await mesh.join(invite.url)).role == "member"


async def test_a_taken_port_is_said_before_anybody_is_invited(data_dir: Path) -> None:
    taken = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = taken[0].socket.getsockname()[1]
    async with open_mesh(data_dir, port=port, limits=ListenerLimits(recheck_s=0.05)) as mesh:
        with trio.fail_after(5):
            while not mesh.notices.texts():  # noqa: ASYNC110 -- nobody but a test waits for this
                await trio.sleep(0.01)
        (said,) = mesh.notices.texts()
        assert str(port) in said
        assert [record for record in mesh.log.records if "cannot be opened" in record]
        await taken[0].aclose()
        with trio.fail_after(5):
            while mesh.notices.texts():  # noqa: ASYNC110 -- as above
                await trio.sleep(0.01)


async def test_a_machine_without_an_address_cannot_invite(data_dir: Path) -> None:
    async with open_mesh(data_dir, addresses=()) as mesh:
        error = await refused(mesh.invite())
        assert error.code is ErrorCode.UNAVAILABLE


async def test_the_port_is_open_only_while_somebody_is_invited(data_dir: Path) -> None:
    async with open_mesh(data_dir) as mesh:
        assert mesh.onboarding.port is None
        first = await mesh.invite(ttl_s=600)
        port = mesh.port
        stream = await trio.open_tcp_stream("127.0.0.1", port)
        await stream.aclose()
        await mesh.onboarding.revoke(first.invitation.token)
        await mesh.closed()
        with pytest.raises(OSError, match="all attempts to connect"):
            await trio.open_tcp_stream("127.0.0.1", port)


async def test_both_families_share_any_free_port(data_dir: Path) -> None:
    async with open_mesh(data_dir, host="") as mesh:
        invite = await mesh.invite()
        assert (await mesh.join(invite.url)).address.port == mesh.port


@pytest.mark.parametrize(
    ("text", "part"),
    [("", "url"), ("meshnode join", "url"), ("ftp://h:1/join/nmi6disugpbgctu2#a.b", "scheme"), ("mesh:node", "scheme"),
     ("http://h:1/elsewhere#a.b", "path"), ("http://h:1/join/x", "token"),
     ("http://:99999/join/nmi6disugpbgctu2#a.b", "host"), ("http://h:1/join/nmi6disugpbgctu2", "fragment")],
)  # fmt: skip
def test_a_bad_url_is_a_bad_request(text: str, part: str) -> None:
    with pytest.raises(MeshError) as caught:
        read_join_url(text)
    assert caught.value.code is ErrorCode.BAD_REQUEST
    assert caught.value.detail == {"part": part}


@pytest.mark.parametrize(
    ("versions", "update"),
    [(Versions(2, 3), "Update meshnode on the machines of the mesh"), (Versions(0, 0), "")],
)
async def test_a_machine_of_another_protocol_is_refused_before_the_invitation_is_spent(
    data_dir: Path, versions: Versions, update: str
) -> None:
    async with open_mesh(data_dir) as mesh:
        invite = await mesh.invite()
        if update:
            error = await refused(mesh.join(invite.url, versions=versions))
            assert error.code is ErrorCode.INCOMPATIBLE_VERSION
            assert "speaks protocol version 1, the joining machine 2 to 3" in error.message
            assert update in error.message
            assert "not used up" in error.message
            assert mesh.admin.admitted == []
        # Whoever does not say, as older ones do not, is let in; so is another with the same invitation.
        grant = await mesh.join(invite.url, versions=None if update else versions)
        assert mesh.admin.admitted == [grant.node_id]


async def test_the_issuer_itself_refuses_another_protocol(data_dir: Path) -> None:
    async with open_mesh(data_dir) as mesh:
        invite, me = await mesh.invite(), mesh.machine()
        url = read_join_url(invite.url)
        keys = (mesh.root.public_key, mesh.identity.public_key)
        assert await guess(url, url.secret, me, *keys, speaks=(2, 2)) == "incompatible_version"
        assert mesh.admin.admitted == []
        assert await guess(url, url.secret, me, *keys, speaks=(1, 2)) == "granted"
