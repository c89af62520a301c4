"""A disk that is full while somebody is invited or lets itself in: nothing is half done, and afterwards it works."""

import errno
from pathlib import Path

import pytest

from meshnode.kernel.errors import ErrorCode, MeshError
from tests.support.failing_disk import FailingDisk
from tests.support.onboarding import open_mesh


async def test_an_invitation_that_cannot_be_kept_is_not_made(data_dir: Path) -> None:
    async with open_mesh(data_dir) as mesh:
        with FailingDisk(errno.ENOSPC), pytest.raises(MeshError) as caught:
            await mesh.invite()
        assert caught.value.code is ErrorCode.DISK_FULL
        assert mesh.onboarding.invitations() == []
        assert mesh.onboarding.port is None
        assert (await mesh.join((await mesh.invite()).url)).role == "member"


async def test_an_invitation_that_cannot_be_used_up_lets_nobody_in(data_dir: Path) -> None:
    async with open_mesh(data_dir) as mesh:
        url, joiner = (await mesh.invite()).url, mesh.machine()
        with FailingDisk(errno.ENOSPC), pytest.raises(MeshError) as caught:
            await mesh.join(url, identity=joiner)
        assert "full" in caught.value.message
        assert mesh.admin.admitted == []
        assert [one.state for one in mesh.onboarding.invitations()] == ["open"]
        assert (await mesh.join(url, identity=joiner)).node_id == joiner.node_id


async def test_an_admission_that_cannot_be_kept_is_repeated_with_the_same_url(data_dir: Path) -> None:
    async with open_mesh(data_dir) as mesh:
        url, joiner = (await mesh.invite()).url, mesh.machine()
        mesh.admin.refuse = MeshError(ErrorCode.DISK_FULL, "The disk is full. Free some space.", retryable=True)
        with pytest.raises(MeshError, match="disk is full"):
            await mesh.join(url, identity=joiner)
        assert mesh.admin.admitted == []
        mesh.admin.refuse = None
        assert (await mesh.join(url, identity=joiner)).node_id == joiner.node_id
        with pytest.raises(MeshError) as caught:
            await mesh.join(url)
        assert caught.value.code is ErrorCode.TOKEN_USED, "for another machine it was used up by the first try"


async def test_a_revocation_that_cannot_be_kept_is_said(data_dir: Path) -> None:
    async with open_mesh(data_dir) as mesh:
        token = (await mesh.invite()).invitation.token
        with FailingDisk(errno.ENOSPC), pytest.raises(MeshError) as caught:
            await mesh.onboarding.revoke(token)
        assert caught.value.code is ErrorCode.DISK_FULL
        assert [one.state for one in mesh.onboarding.invitations()] == ["open"]
        assert (await mesh.onboarding.revoke(token)).state == "revoked"
