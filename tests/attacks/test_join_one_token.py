"""Case 10: fifty machines with one token at the same moment. Exactly one becomes a member."""

from collections import Counter
from pathlib import Path

import pytest
import trio

from meshnode.cluster.service.onboarding.invitations import Invitations
from meshnode.kernel.errors import MeshError
from protocol.ids import NodeId
from protocol.trust.view import Role
from tests.support.onboarding import MeshOfOne, open_mesh

JOINERS = 50


async def join_all_at_once(mesh: MeshOfOne) -> Counter[str]:
    """What each of the fifty got: "joined", or the code of the refusal."""
    url = (await mesh.invite()).url
    machines = [mesh.machine() for _ in range(JOINERS)]
    outcomes: Counter[str] = Counter()

    async def join(number: int) -> None:
        try:
            await mesh.join(url, identity=machines[number], name=f"machine {number}")
            outcomes["joined"] += 1
        except MeshError as error:
            outcomes[error.code.value] += 1

    async with trio.open_nursery() as nursery:
        for number in range(JOINERS):
            nursery.start_soon(join, number)
    return outcomes


async def test_exactly_one_of_fifty_becomes_a_member(data_dir: Path) -> None:
    async with open_mesh(data_dir) as mesh:
        outcomes = await join_all_at_once(mesh)
        assert outcomes == {"joined": 1, "token_used": JOINERS - 1}
        assert len(mesh.admin.admitted) == 1
        assert len(mesh.admin.roster) == 2


async def test_without_the_defence_many_do(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Look first, write later, as CVE-2026-1035 did: the same fifty, and more than one is let in."""
    second_looked = trio.Event()
    looked: list[NodeId] = []

    async def look_then_write(self: Invitations, token_id: bytes, node_id: NodeId, name: str) -> Role:
        found = self.find(token_id)
        if found is None or found.state != "open":
            raise self.refusal(token_id, node_id)
        looked.append(node_id)
        if len(looked) == 2:
            second_looked.set()
        # The moment between looking and writing, made long enough that a second always falls into it.
        await second_looked.wait()
        await self._store._database.write(
            lambda connection: (
                connection.execute(
                    "UPDATE cluster_invitations SET redeemed_by = ? WHERE token_id = ?", (node_id, token_id)
                ).get
            )
        )
        return found.role

    monkeypatch.setattr(Invitations, "redeem", look_then_write)
    async with open_mesh(data_dir) as mesh:
        outcomes = await join_all_at_once(mesh)
        assert outcomes["joined"] > 1
        assert len(mesh.admin.roster) > 2
