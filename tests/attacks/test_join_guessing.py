"""Case 12: guessing a token's secret. 128 bits; five wrong proofs burn the token; a source that fails is slowed down.

To see the defence rather than the size of the number, the secret is taken from only 40, which the guesser knows; the
right one comes last.
"""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from meshnode.cluster.service.onboarding import invitations as invitations_module
from meshnode.cluster.service.onboarding.listener import ListenerLimits
from meshnode.cluster.service.onboarding.rates import Rate
from meshnode.cluster.store import invitations as store_module
from protocol.trust.join_url import SECRET_BYTES, parse_join_url
from tests.support.join_attacker import guess
from tests.support.onboarding import MeshOfOne, open_mesh

CANDIDATES = [bytes([number]) * SECRET_BYTES for number in range(40)]
UNLIMITED = ListenerLimits(refusal_rate=Rate(burst=1e9, per_s=1e9))


def poor_entropy() -> Callable[[int], bytes]:
    drawn = iter(range(1_000_000))
    return lambda size: CANDIDATES[-1] if size == SECRET_BYTES else next(drawn).to_bytes(size, "big")


async def guess_all(mesh: MeshOfOne) -> Counter[str]:
    url, me = parse_join_url((await mesh.invite()).url), mesh.machine()
    assert url.secret == CANDIDATES[-1]
    outcomes: Counter[str] = Counter()
    for secret in CANDIDATES:
        outcomes[await guess(url, secret, me, mesh.root.public_key, mesh.identity.public_key)] += 1
    return outcomes


def test_the_secret_has_enough_bits() -> None:
    assert SECRET_BYTES * 8 >= 128


async def test_five_wrong_proofs_burn_the_token(data_dir: Path) -> None:
    async with open_mesh(data_dir, limits=UNLIMITED, entropy=poor_entropy()) as mesh:
        outcomes = await guess_all(mesh)
        assert outcomes["granted"] == 0
        (invitation,) = mesh.onboarding.invitations()
        assert (invitation.state, invitation.wrong_proofs) == ("burnt", 5)
        assert mesh.admin.admitted == []


async def test_of_many_that_guess_at_once_five_are_looked_at(data_dir: Path) -> None:
    async with open_mesh(data_dir, limits=UNLIMITED) as mesh:
        url, me = parse_join_url((await mesh.invite()).url), mesh.machine()
        outcomes: Counter[str] = Counter()

        async def one(secret: bytes) -> None:
            outcomes[await guess(url, secret, me, mesh.root.public_key, mesh.identity.public_key)] += 1

        async with trio.open_nursery() as nursery:
            for secret in CANDIDATES[:8]:
                nursery.start_soon(one, secret)
        assert outcomes == {"token_invalid": 8}
        (invitation,) = mesh.onboarding.invitations()
        assert (invitation.state, invitation.wrong_proofs) == ("burnt", 5)


async def test_a_source_that_fails_is_slowed_down(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Burning is taken away, so that only the rate stands between the guesser and the secret.
    for module in (invitations_module, store_module):
        monkeypatch.setattr(module, "WRONG_PROOFS_MAX", 10**9)
    async with open_mesh(data_dir, entropy=poor_entropy()) as mesh:
        outcomes = await guess_all(mesh)
        assert outcomes["granted"] == 0
        assert outcomes["rate_limited"] >= 15
        (invitation,) = mesh.onboarding.invitations()
        assert invitation.wrong_proofs <= 21


async def test_without_both_the_guesser_gets_in(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (invitations_module, store_module):
        monkeypatch.setattr(module, "WRONG_PROOFS_MAX", 10**9)
    async with open_mesh(data_dir, limits=UNLIMITED, entropy=poor_entropy()) as mesh:
        outcomes = await guess_all(mesh)
        assert outcomes == {"token_invalid": 39, "granted": 1}
        assert len(mesh.admin.admitted) == 1


async def test_a_burnt_token_is_of_no_use_to_its_owner_either(data_dir: Path) -> None:
    async with open_mesh(data_dir, limits=UNLIMITED) as mesh:
        url, me = parse_join_url((await mesh.invite()).url), mesh.machine()
        for _ in range(5):
            await guess(url, b"\x00" * SECRET_BYTES, me, mesh.root.public_key, mesh.identity.public_key)
        assert await guess(url, url.secret, me, mesh.root.public_key, mesh.identity.public_key) == "token_invalid"
