"""The invitations: states, limits, and clocks that jump (case 18: nothing is revived, nothing is bricked)."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio

from meshnode.cluster.service.onboarding.invitations import Invitations
from meshnode.cluster.store.invitations import INVITATIONS_OPEN_MAX, WRONG_PROOFS_MAX, InvitationStore
from meshnode.kernel.database import Database, open_database
from meshnode.kernel.errors import ErrorCode, MeshError
from protocol.ids import NodeId
from tests.protocol.trust.parts import node
from tests.support.onboarding import MIGRATIONS, SteppedClock

ME, A, B = node("me"), node("a"), node("b")
YEAR_S = 365 * 86_400.0


@pytest.fixture
async def database(data_dir: Path) -> AsyncIterator[Database]:
    async with open_database(data_dir / "meshnode.db", MIGRATIONS, wall=0.0, inline=True) as opened:
        yield opened


@pytest.fixture
def clock() -> SteppedClock:
    return SteppedClock()


@pytest.fixture
def store(database: Database, clock: SteppedClock) -> Invitations:
    return Invitations(InvitationStore(database), clock, run="run 1")


async def create(store: Invitations, token: bytes = b"token..1", ttl_s: float = 600) -> bytes:
    await store.create(token_id=token, verifier=b"v" * 32, role="member", by=ME, ttl_s=ttl_s)
    return token


async def redeemed(store: Invitations, token: bytes, by: NodeId = A) -> str:
    try:
        return await store.redeem(token, by, "name")
    except MeshError as error:
        return error.code.value


async def test_a_new_one_is_open_and_listed(store: Invitations, clock: SteppedClock) -> None:
    token = await create(store)
    (found,) = store.list_all()
    assert (found.token_id, found.state, found.role, found.created_by) == (token, "open", "member", ME)
    assert (found.expires_at, found.remaining_s) == (clock.wall_s + 600, 600)
    assert "v" * 32 not in repr(found)
    clock.pass_time(200)
    assert store.listening_s() == 400


async def test_it_is_redeemed_once_and_again_by_the_same_machine(store: Invitations) -> None:
    token = await create(store)
    assert await redeemed(store, token, A) == "member"
    assert await redeemed(store, token, B) == ErrorCode.TOKEN_USED
    assert await redeemed(store, token, A) == "member"
    found = store.find(token)
    assert found is not None
    assert (found.state, found.redeemed_by, found.redeemed_name) == ("redeemed", A, "name")


async def test_five_wrong_proofs_burn_it(store: Invitations) -> None:
    token = await create(store)
    for count in range(1, WRONG_PROOFS_MAX + 1):
        assert await redeemed(store, token, A) == "member"
        assert await store.count_wrong_proof(token) == count
    assert await redeemed(store, token, A) == ErrorCode.TOKEN_INVALID
    assert "wrong secret" in store.refusal(token).message


async def test_wrong_proofs_of_an_earlier_run_count(
    database: Database, store: Invitations, clock: SteppedClock
) -> None:
    token = await create(store)
    for _ in range(WRONG_PROOFS_MAX - 1):
        await store.count_wrong_proof(token)
    again = Invitations(InvitationStore(database), clock, run="run 2")
    again.refuse_burnt(token)
    await again.count_wrong_proof(token)
    for one in (again, Invitations(InvitationStore(database), clock, run="run 3")):
        with pytest.raises(MeshError) as burnt:
            one.refuse_burnt(token)
        assert burnt.value.code is ErrorCode.TOKEN_INVALID


async def test_a_revoked_one_counts_no_more(store: Invitations) -> None:
    token = await create(store)
    assert await store.revoke(token)
    assert not await store.revoke(token)
    assert await redeemed(store, token) == ErrorCode.TOKEN_INVALID
    assert store.listening_s() is None


async def test_what_is_used_cannot_be_revoked(store: Invitations) -> None:
    token = await create(store)
    await redeemed(store, token)
    assert not await store.revoke(token)


async def test_an_unknown_one_is_invalid(store: Invitations) -> None:
    assert await redeemed(store, b"no token") == ErrorCode.TOKEN_INVALID
    assert await store.count_wrong_proof(b"no token") == 0
    assert store.find(b"no token") is None


async def test_it_expires_to_the_second(store: Invitations, clock: SteppedClock) -> None:
    token = await create(store)
    clock.pass_time(599.9)
    assert await redeemed(store, token) == "member"
    clock.pass_time(0.1)
    assert await redeemed(store, token) == ErrorCode.TOKEN_EXPIRED
    assert store.listening_s() is None


@pytest.mark.parametrize("ttl_s", [0, -1, 9.9, 8 * 86_400, 1e300, float("inf"), float("nan")])
async def test_a_time_out_of_bounds_is_refused(store: Invitations, ttl_s: float) -> None:
    with pytest.raises(MeshError) as caught:
        await create(store, ttl_s=ttl_s)
    assert caught.value.code is ErrorCode.BAD_REQUEST


async def test_there_are_only_so_many(store: Invitations, clock: SteppedClock) -> None:
    for number in range(INVITATIONS_OPEN_MAX):
        await create(store, number.to_bytes(8, "big"))
    with pytest.raises(MeshError) as caught:
        await create(store, b"one more")
    assert caught.value.code is ErrorCode.CONFLICT
    clock.pass_time(601)
    await create(store, b"one more")


async def test_old_ones_are_forgotten(store: Invitations, clock: SteppedClock) -> None:
    await create(store)
    clock.pass_time(8 * 86_400)
    await create(store, b"token..2")
    assert [found.token_id for found in store.list_all()] == [b"token..2"]


# ---- clocks (cases 11 and 18) --------------------------------------------------------------------------------------


async def test_a_clock_set_back_revives_nothing(store: Invitations, clock: SteppedClock) -> None:
    token = await create(store)
    clock.pass_time(601)
    clock.wall_s -= 3_600
    assert await redeemed(store, token) == ErrorCode.TOKEN_EXPIRED
    found = store.find(token)
    assert found is not None
    assert found.state == "expired"


async def test_a_clock_set_back_shortens_nothing_that_is_valid(store: Invitations, clock: SteppedClock) -> None:
    token = await create(store)
    clock.wall_s -= 600
    clock.pass_time(300)
    assert store.listening_s() == 300
    assert await redeemed(store, token) == "member"


async def test_hours_of_suspension_count(store: Invitations, clock: SteppedClock) -> None:
    token = await create(store)
    clock.wall_s += 7_200  # The monotonic clock stood still.
    assert await redeemed(store, token) == ErrorCode.TOKEN_EXPIRED


async def test_a_clock_in_2040_bricks_nothing(store: Invitations, clock: SteppedClock) -> None:
    clock.wall_s += 14 * YEAR_S
    await create(store, b"in 2040.")
    clock.wall_s -= 14 * YEAR_S
    token = await create(store)
    assert await redeemed(store, token) == "member"


async def after_restart(
    database: Database, clock: SteppedClock, *, away_s: float, back_s: float, token: bytes = b"token..1"
) -> str:
    clock.wall_s += away_s
    first = Invitations(InvitationStore(database), clock, run="run 1")
    await create(first, b"touching")
    clock.wall_s -= back_s
    clock.monotonic_s = 3.0
    return await redeemed(Invitations(InvitationStore(database), clock, run="run 2"), token)


@pytest.mark.parametrize(
    ("away_s", "back_s", "outcome"),
    [
        (60, 0, "member"),
        (60, 3, "member"),  # ordinary time keeping
        (700, 0, ErrorCode.TOKEN_EXPIRED),
        (700, 650, ErrorCode.TOKEN_EXPIRED),  # set back, but it was seen later
        (60, 3_600, ErrorCode.TOKEN_EXPIRED),  # set back to before it was made
    ],
)
async def test_over_a_restart(
    database: Database, store: Invitations, clock: SteppedClock, away_s: float, back_s: float, outcome: str
) -> None:
    await create(store)
    assert await after_restart(database, clock, away_s=away_s, back_s=back_s) == outcome


async def test_what_is_listed_agrees_with_what_is_redeemed(
    database: Database, store: Invitations, clock: SteppedClock
) -> None:
    """The same rule stands in two statements; this holds them together."""
    steps = [0.0, 300.0, -300.0, 400.0, -3_600.0, 4_000.0, -14 * YEAR_S, 14 * YEAR_S, 700.0]
    for number, step in enumerate(steps):
        token = await create(store, number.to_bytes(8, "big"))
        for run in ("run 1", "run 2"):
            clock.wall_s += step
            clock.monotonic_s += 100
            there = Invitations(InvitationStore(database), clock, run=run)
            found = there.find(token)
            assert found is not None
            assert (found.remaining_s > 0) == (await redeemed(there, token) == "member")


async def test_a_change_is_announced(store: Invitations) -> None:
    event = store.changed()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(create, store)
        with trio.fail_after(5):
            await event.wait()
    assert not store.changed().is_set()
