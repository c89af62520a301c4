"""Changes of trust: who may admit, evict, promote and leave, what each is refused, and what it does everywhere."""

import contextlib
from pathlib import Path

import pytest

from meshnode.cluster.model import MeshPolicy, NodeEvicted
from meshnode.cluster.service.wishes import AdmitRequest, Done, EvictRequest, LostVoter, RootOffer
from meshnode.kernel.bus import Event
from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.kernel.identity import (
    NodeIdentity,
    certificate_public_key,
    found_root,
    load_root,
    make_csr,
    open_sealed_root,
    seal_root,
)
from protocol.effects import LinkLost
from protocol.election.events import ForgetLostDone
from protocol.trust.statements import open_statement
from tests.cluster.parts import ROOT, House
from tests.support.hub import evicted, keys_of, suite_of

NEW = 40
LOST = "votes are lost for good and count no longer"


def identity_of(index: int) -> NodeIdentity:
    seed, public, node = keys_of(index)
    return NodeIdentity(node, public, Path("unused"), seed)


def request(index: int, *, role: str = "member", name: str = "newcomer") -> AdmitRequest:
    return AdmitRequest(make_csr(identity_of(index)), name, role, b"\x01" * 10)  # type: ignore[arg-type]  # any word


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path)


async def refused(code: ErrorCode, call: object) -> MeshError:
    with pytest.raises(MeshError) as caught:
        await call  # type: ignore[misc]  # a coroutine of the test
    assert caught.value.code is code, caught.value
    assert len(caught.value.message) > 20
    return caught.value


async def test_an_admin_admits_and_all_learn_it(house: House) -> None:
    new = identity_of(NEW)
    admitted = await house[0].trust.admit(
        csr=make_csr(new), public_key=new.public_key, name="newcomer", role="member", by=house.id(0),
        invitation=b"\x01" * 10,
    )  # fmt: skip
    assert certificate_public_key(admitted.leaf) == new.public_key
    assert admitted.sealed_root == b""
    statement = open_statement(admitted.admission, ROOT.public_key, suite_of(0))
    assert statement is not None
    assert statement.node_id == new.node_id
    house.hubs.run(5.0)
    for index in range(3):
        assert house.hubs.hub(index).roster.role(new.node_id) == "member"


async def test_a_member_asks_an_admin_to_admit(house: House) -> None:
    new = identity_of(NEW)
    await house[2].trust.admit(
        csr=make_csr(new), public_key=new.public_key, name="x", role="member", by=house.id(2), invitation=b"\x01" * 10
    )
    admission = house.hubs.hub(0).roster.admission(new.node_id)
    assert admission is not None
    assert admission.by == house.id(2), "whoever asked is named, whatever it says of itself"
    house.unreachable.add(house.id(0))
    other = identity_of(NEW + 1)
    error = await refused(
        ErrorCode.UNAVAILABLE,
        house[2].trust.admit(csr=make_csr(other), public_key=other.public_key, name="x", role="member",
                             by=house.id(2), invitation=b"\x01" * 10),
    )  # fmt: skip
    assert error.retryable
    assert "n0" in error.message


@pytest.mark.parametrize("role", ["member", "admin"])
async def test_a_member_cannot_change_the_standing_of_somebody_who_is_in(house: House, role: str) -> None:
    """A certificate request can be seen and sent again: it must not rename, demote or promote whom it is of."""
    before = [house.hubs.hub(0).roster.statement(house.id(index)) for index in range(3)]
    for target in range(3):
        asked = house[0].trust.admit_for(house.id(2), request(target, role=role, name="renamed"))
        if role == "admin":
            await refused(ErrorCode.FORBIDDEN, asked)
            continue
        answer = await asked
        assert answer.admission == before[target]
        # An admin that comes again gets its key again, sealed so that only it can read it.
        if answer.sealed_root:
            assert target == 0
            with pytest.raises(MeshError):
                open_sealed_root(identity_of(2), answer.sealed_root, ROOT.mesh_id)
    assert [house.hubs.hub(0).roster.statement(house.id(index)) for index in range(3)] == before


async def test_what_a_peer_may_not_ask_an_admin_for(house: House) -> None:
    await refused(ErrorCode.FORBIDDEN, house[0].trust.admit_for(house.id(1), request(NEW, role="admin")))
    await refused(ErrorCode.NOT_ADMIN, house[1].trust.admit_for(house.id(2), request(NEW)))
    garbage = AdmitRequest(b"\x30\x03garbage", "x", "member", b"\x01" * 10)
    await refused(ErrorCode.BAD_REQUEST, house[0].trust.admit_for(house.id(1), garbage))


async def test_the_evicted_are_not_admitted_again(house: House) -> None:
    await house[0].trust.evict(house.id(2), reason="lost")
    await refused(ErrorCode.JOIN_REFUSED, house[0].trust.admit_for(house.id(1), request(2)))


async def test_evicting(house: House) -> None:
    await refused(ErrorCode.BAD_REQUEST, house[0].trust.evict(house.id(0)))
    await refused(ErrorCode.NOT_ADMIN, house[1].trust.evict(house.id(2)))
    await house[0].trust.evict(house.id(2))
    tombstone = house.hubs.hub(0).roster.statement(house.id(2))
    await house[0].trust.evict(house.id(2))
    assert house.hubs.hub(0).roster.statement(house.id(2)) == tombstone, "twice is once"
    house.hubs.run(5.0)
    assert house.id(2) not in house.hubs.hub(1).roster
    assert house.id(2) in house.hubs.closed[house.id(1)]


async def test_only_an_admin_says_that_a_vote_is_lost(house: House) -> None:
    await refused(ErrorCode.FORBIDDEN, house[0].trust.forget_for(house.id(1), LostVoter(house.id(2))))


async def test_a_coordinator_with_its_majority_drops_a_lost_vote_by_itself(house: House) -> None:
    """It needs nobody's word, and whoever gives it all the same is not told of a failure."""
    hubs = [house.hubs.hub(index) for index in range(3)]
    leader = next(hub for hub in hubs if hub.election.is_quorate(house.hubs.now, house.hubs.wall))
    lost = house.id(next(index for index in (1, 2) if hubs[index] is not leader))
    vote = bytes(leader.roster.short(lost))
    assert vote in leader.election.electorate.voters
    await house[0].trust.evict(lost, lost=True)
    await house[0].trust.evict(lost, lost=True)
    house.hubs.run(10.0)
    assert vote not in leader.election.electorate.voters
    await house[0].trust.evict(lost, lost=True)
    told = [fields for _, event, fields in house.members[leader.me].log.records if event == "the electorate changed"]
    assert told[-1] == {"added": None, "removed": lost, "voters": 2}


async def test_votes_that_count_no_longer_are_logged(house: House) -> None:
    house[0].trust.observe(ForgetLostDone((house.id(1), house.id(2)), 1))
    assert ("warning", LOST, {"lost": (house.id(1), house.id(2)), "voters": 1}) in house[0].log.records


async def test_a_withdrawn_machine_is_no_member_and_may_be_admitted_again(house: House) -> None:
    new = identity_of(NEW)
    first = await house[0].trust.admit_for(house.id(1), request(NEW))
    await house[0].trust.withdraw(new.node_id)
    house.hubs.run(5.0)
    assert [new.node_id in house.hubs.hub(index).roster for index in range(3)] == [False] * 3
    await house[0].trust.withdraw(new.node_id)
    await refused(ErrorCode.NOT_ADMIN, house[1].trust.withdraw(house.id(2)))
    # In the same millisecond: it must still count for more than the withdrawal.
    again = await house[0].trust.admit_for(house.id(1), request(NEW, name="again"))
    assert again.admission != first.admission
    house.hubs.run(5.0)
    assert [house[index].nodes.name_of(new.node_id) for index in range(3)] == ["again"] * 3


async def test_a_member_whose_admission_was_withdrawn_says_so_and_not_that_it_was_evicted(house: House) -> None:
    await house[0].trust.withdraw(house.id(2))
    sealed = house.hubs.hub(0).roster.statement(house.id(2))
    assert sealed is not None
    await house[2].trust.bury_for(house.id(2), sealed)
    assert house[2].nodes.is_shut_out
    assert house[2].nodes.name_of(house.id(2)) == "n2"
    (warning,) = house[2].nodes.warnings()
    assert "admission was withdrawn" in warning


async def test_the_settings_of_the_mesh_hold_on_every_member(house: House) -> None:
    """Where an admin signs and where a member invites, whoever changed them; a member changes nothing."""
    house[1].trust.may_invite("member")
    await refused(ErrorCode.NOT_ADMIN, house[1].trust.set_policy({"members_may_invite": False}))
    await refused(ErrorCode.BAD_REQUEST, house[0].trust.set_policy({"members_may_evict": True, "gossip": 1}))
    assert not house[0].trust.policy.members_may_evict, "all or nothing"
    await house[0].trust.promote(house.id(1))
    house.hubs.run(3.0)
    await house[1].trust.set_policy({"members_may_invite": False, "gossip_key_rotation_s": 3600.0})
    house.hubs.run(5.0)
    for index in range(3):
        assert house[index].trust.policy == MeshPolicy(
            members_may_invite=False,
            members_may_evict=False,
            members_may_delete_models=False,
            gossip_key_rotation_s=3600.0,
        )
        assert house.hubs.hub(index).keyring._rotate_every_s == 3600.0
    await refused(ErrorCode.FORBIDDEN, house[0].trust.admit_for(house.id(2), request(NEW)))
    with pytest.raises(MeshError, match="config mesh members_may_invite") as caught:
        house[2].trust.may_invite("member")
    assert caught.value.code is ErrorCode.FORBIDDEN
    house[0].trust.may_invite("admin")


async def test_members_evict_where_the_mesh_lets_them(house: House) -> None:
    await refused(ErrorCode.NOT_ADMIN, house[1].trust.evict(house.id(2)))
    await refused(ErrorCode.FORBIDDEN, house[0].trust.evict_for(house.id(1), EvictRequest(house.id(2))))
    await house[0].trust.set_policy({"members_may_evict": True})
    house.hubs.run(5.0)
    await refused(ErrorCode.FORBIDDEN, house[1].trust.evict(house.id(0)))
    await house[1].trust.evict(house.id(2), reason="lost")
    tombstone = house.hubs.hub(0).roster.evicted(house.id(2))
    assert tombstone is not None
    assert (tombstone.by, tombstone.reason) == (house.id(1), "lost")


async def test_an_evicted_node_shown_its_tombstone_knows_at_once(house: House) -> None:
    """What a refused link brings: only the root's word about this very node counts."""
    await house[0].trust.evict(house.id(2), reason="stolen")
    stone = house.hubs.hub(0).roster.statement(house.id(2))
    assert stone is not None
    for said in (b"", evicted(1), stone[:-1] + bytes([stone[-1] ^ 1]), b"\xff" * 200):
        house.hubs.give(2, LinkLost(house.id(0), "refused", "evicted", said))
        assert not house[2].nodes.is_shut_out
    with house[2].bus.subscribe((NodeEvicted,)) as told:
        house.hubs.give(2, LinkLost(house.id(0), "refused", "evicted", stone))
        (event,) = await told.batch()
    assert isinstance(event, Event)
    assert event.payload == NodeEvicted(house.id(2), "n2", house.id(0), event.payload.at, "stolen")
    assert house[2].nodes.is_shut_out
    assert [node.status for node in house[2].nodes.nodes()[0] if not node.this_node] == ["offline", "offline"]
    (warning,) = house[2].nodes.warnings()
    assert "evicted from its mesh by n0 at 20" in warning
    assert "(stolen)" in warning
    assert "leave --force" in warning


async def test_promoting(house: House) -> None:
    order = [node.id for node in house[0].nodes.nodes()[0]]
    joined = house[0].nodes.node(house.id(1)).joined_at
    await refused(ErrorCode.NOT_ADMIN, house[1].trust.promote(house.id(2)))
    await refused(ErrorCode.UNKNOWN_NODE, house[0].trust.promote(keys_of(NEW)[2]))
    await house[0].trust.promote(house.id(1))
    assert house[1].trust.is_admin
    assert load_root(house[1].folder) == ROOT
    house.hubs.run(5.0)
    assert [house.hubs.hub(n).roster.role(house.id(1)) for n in range(3)] == ["admin"] * 3
    assert house[0].nodes.node(house.id(1)).joined_at == joined
    assert [node.id for node in house[0].nodes.nodes()[0]] == order, "it is no newer member than before"
    submitted = len(house[0].driver.submitted)
    await house[0].trust.promote(house.id(1))
    assert len(house[0].driver.submitted) == submitted, "an admin already"
    # The new admin is one: it evicts.
    await house[1].trust.evict(house.id(2))


async def test_promoting_one_that_does_not_answer_changes_nothing(house: House) -> None:
    house.unreachable.add(house.id(1))
    await refused(ErrorCode.UNREACHABLE, house[0].trust.promote(house.id(1)))
    assert house.hubs.hub(0).roster.role(house.id(1)) == "member"


async def test_the_root_key_is_taken_from_admins_only_and_must_be_the_meshs(house: House) -> None:
    offer = RootOffer(seal_root(ROOT, house[2].identity.public_key))
    await refused(ErrorCode.FORBIDDEN, house[2].trust.take_root(house.id(1), offer))
    for bad in (
        seal_root(ROOT, house[1].identity.public_key),
        seal_root(found_root(), house[2].identity.public_key),
        b"",
    ):
        with pytest.raises(MeshError):
            await house[2].trust.take_root(house.id(0), RootOffer(bad))
    assert not house[2].trust.is_admin
    assert load_root(house[2].folder) is None


async def test_leaving_as_a_member(house: House) -> None:
    await house[2].trust.leave(force=False)
    roster = house.hubs.hub(0).roster
    tombstone = roster.evicted(house.id(2))
    assert tombstone is not None
    assert tombstone.by == house.id(2)
    await house[2].trust.leave(force=False)


async def test_leaving_when_no_admin_answers(house: House) -> None:
    house.unreachable.add(house.id(0))
    await refused(ErrorCode.UNAVAILABLE, house[2].trust.leave(force=False))
    await house[2].trust.leave(force=True)
    assert house.id(2) in house.hubs.hub(0).roster


async def test_the_last_admin_leaves_only_when_forced(house: House) -> None:
    error = await refused(ErrorCode.CONFLICT, house[0].trust.leave(force=False))
    assert "promote" in error.message
    await house[0].trust.leave(force=True)
    house.hubs.run(5.0)
    assert [house.id(0) in house.hubs.hub(index).roster for index in (1, 2)] == [False, False]


async def test_an_admin_that_can_tell_nobody_stays(house: House) -> None:
    await house[0].trust.promote(house.id(1))
    house.unreachable |= {house.id(1), house.id(2)}
    await refused(ErrorCode.UNAVAILABLE, house[0].trust.leave(force=False))
    house.unreachable.clear()
    await house[0].trust.leave(force=False)
    assert any(house.id(0) not in house.hubs.hub(index).roster for index in (1, 2))


async def test_a_member_cannot_bury_another(house: House) -> None:
    """It may hand over only its own tombstone, and only one that the root signed."""
    for statement in (evicted(0), b"", b"\xff" * 200):
        with contextlib.suppress(MeshError):
            await house[1].trust.bury_for(house.id(2), statement)
    house.hubs.run(3.0)
    assert all(house.id(0) in house.hubs.hub(index).roster for index in range(3))


async def test_a_mesh_of_one_is_left_without_a_word(tmp_path: Path) -> None:
    await House(tmp_path, 1)[0].trust.leave(force=False)
    assert Done() == Done()
