"""Case 17: a newcomer with somebody else's name inherits nothing and displaces nobody."""

import hashlib
from pathlib import Path

import pytest

from protocol.ids import node_id_from_bytes
from protocol.trust.statements import Admission
from tests.support.onboarding import MeshOfOne, open_mesh


async def take_the_name(mesh: MeshOfOne) -> int:
    """An admin called "boss" joins, then a member by the same name. How many there are of that name."""
    await mesh.join((await mesh.invite(role="admin")).url, name="boss")
    await mesh.join((await mesh.invite()).url, name="boss")
    roster = mesh.admin.roster
    return [roster.name(member) for member in roster.members()].count("boss")


async def test_both_are_members_each_with_its_own_role(data_dir: Path) -> None:
    async with open_mesh(data_dir) as mesh:
        assert await take_the_name(mesh) == 2
        first, second = mesh.admin.admitted
        assert mesh.admin.roster.role(first) == "admin"
        assert mesh.admin.roster.role(second) == "member"


async def test_with_names_as_identities_the_newcomer_displaces_the_admin(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = property(lambda self: node_id_from_bytes(hashlib.sha256(self.name.encode()).digest()[:20]))
    monkeypatch.setattr(Admission, "node_id", named)
    async with open_mesh(data_dir) as mesh:
        assert await take_the_name(mesh) == 1
