"""Going over to another mesh: whenever the machine stops in between, nothing is lost and the end is the same."""

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from meshnode.cluster.service import switch
from meshnode.cluster.service.onboarding.joiner import JoinGrant, PeerHint
from meshnode.cluster.service.switch import (
    CONTACTS,
    DATABASE_FILE,
    FILES,
    STAGING,
    finish,
    prepare_identity,
    stage_departure,
    stage_join,
)
from meshnode.cluster.store import MeshStore
from meshnode.kernel.database import KeyValue, open_database
from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.kernel.identity import (
    NODE_KEY_FILE,
    ROOT_KEY_FILE,
    found_root,
    issue_leaf,
    load_or_make_identity,
    load_root,
    root_certificate,
    seal_root,
)
from protocol.ids import Address
from protocol.trust.keys import GossipKey
from tests.support.hub import admitted, keys_of
from tests.support.onboarding import MIGRATIONS

NOWHERE = Address("127.0.0.1", 1)


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def old_mesh(folder: Path) -> None:
    for name in FILES:
        (folder / name).write_bytes(b"old " + name.encode())
    (folder / "api-token").write_bytes(b"stays")


def new_mesh(folder: Path, *names: str) -> None:
    stage = folder / STAGING
    stage.mkdir()
    for name in names:
        (stage / name).write_bytes(b"new " + name.encode())
    switch._draft_marker(folder, "former-1")
    switch._set_marker(folder)


class Stopped(Exception):  # noqa: N818 -- not an error: the plug was pulled
    """The machine stops here."""


CALLS = ("replace", "unlink", "rmtree", "mkdir")


def stopping_after(monkeypatch: pytest.MonkeyPatch, count: int) -> Callable[[], None]:
    """Let so many changes of the disk happen, then stop at the next one; returns what puts the machine back on."""
    left = count

    def guarded(real: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object, **named: object) -> object:
            nonlocal left
            if left == 0:
                raise Stopped
            left -= 1
            return real(*arguments, **named)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", guarded(os.replace))
        patch.setattr(shutil, "rmtree", guarded(shutil.rmtree))
        patch.setattr(Path, "unlink", guarded(Path.unlink))
        patch.setattr(Path, "mkdir", guarded(Path.mkdir))
        saved = {
            (os, "replace"): os.replace,
            (shutil, "rmtree"): shutil.rmtree,
            (Path, "unlink"): Path.unlink,
            (Path, "mkdir"): Path.mkdir,
        }
    for (place, name), value in saved.items():
        monkeypatch.setattr(place, name, value)
    return monkeypatch.undo


STAGED = [(), (DATABASE_FILE, NODE_KEY_FILE), (DATABASE_FILE, NODE_KEY_FILE, ROOT_KEY_FILE)]


@pytest.mark.parametrize("staged", STAGED)
def test_stopped_anywhere_it_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, staged: tuple[str, ...]
) -> None:
    whole = tmp_path / "whole"
    whole.mkdir()
    old_mesh(whole)
    new_mesh(whole, *staged)
    assert finish(whole) == whole / "former" / "former-1"
    expected = tree(whole)
    assert expected == {
        "api-token": b"stays",
        **{f"former/former-1/{name}": b"old " + name.encode() for name in FILES},
        **{name: b"new " + name.encode() for name in staged},
    }
    stops = 0
    for count in range(60):
        folder = tmp_path / f"stop{count}"
        folder.mkdir()
        old_mesh(folder)
        new_mesh(folder, *staged)
        power_on = stopping_after(monkeypatch, count)
        try:
            finish(folder)
        except Stopped:
            stops += 1
        else:
            power_on()
            break
        power_on()
        held = set(tree(folder).values())
        assert held >= {b"old " + name.encode() for name in FILES} | {b"new " + name.encode() for name in staged}
        # On again; and it may be stopped again, and again.
        power_on = stopping_after(monkeypatch, 1)
        with contextlib.suppress(Stopped):
            finish(folder)
        power_on()
        finish(folder)
        left = {path: data for path, data in tree(folder).items() if not path.startswith(STAGING)}
        assert left == expected, f"stopped after {count} changes"
        assert finish(folder) is None, "and then there is nothing to do"
    assert stops >= len(FILES) + len(staged)


@pytest.mark.parametrize("staged", STAGED)
def test_before_the_marker_nothing_has_changed(tmp_path: Path, staged: tuple[str, ...]) -> None:
    old_mesh(tmp_path)
    stage = tmp_path / STAGING
    stage.mkdir()
    for name in staged:
        (stage / name).write_bytes(b"half")
    (stage / f"{switch.MARKER}.new").write_bytes(b"{")
    before = tree(tmp_path)
    assert finish(tmp_path) is None
    assert tree(tmp_path) == before
    (stage / NODE_KEY_FILE).unlink(missing_ok=True)
    prepare_identity(tmp_path, keep=False)
    assert not (stage / DATABASE_FILE).exists(), "what was left of an earlier attempt is gone"


def test_a_first_start_without_anything_staged(tmp_path: Path) -> None:
    assert finish(tmp_path) is None


def test_a_disk_that_fails_half_way_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old_mesh(tmp_path)
    new_mesh(tmp_path, DATABASE_FILE)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(MeshError, match="nothing is lost") as caught:
            finish(tmp_path)
    assert caught.value.code is ErrorCode.STORAGE_FAILED
    assert finish(tmp_path) is not None


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_is_full_while_staging_is_said_and_the_next_try_succeeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    old_mesh(tmp_path)

    def fails(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    expected = ErrorCode.DISK_FULL if number == errno.ENOSPC else ErrorCode.STORAGE_FAILED
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fails)
        patch.setattr(shutil, "copy2", fails)
        with pytest.raises(MeshError) as caught, stage_departure(tmp_path, former="gone"):
            pass
        assert caught.value.code is expected
        with pytest.raises(MeshError) as caught:
            prepare_identity(tmp_path, keep=True)
        assert caught.value.code is expected
    assert finish(tmp_path) is None, "nothing has changed"
    with stage_departure(tmp_path, former="gone"):
        pass
    assert finish(tmp_path) is not None


def test_leaving_takes_everything_of_the_mesh_away_and_keeps_it(tmp_path: Path) -> None:
    old_mesh(tmp_path)
    load_or_make_identity(tmp_path / STAGING)  # left by a join that came to nothing
    with stage_departure(tmp_path, former="gone"):
        pass
    with pytest.raises(MeshError) as caught, stage_departure(tmp_path, former="gone"):
        pass
    assert caught.value.code is ErrorCode.CONFLICT, "one change at a time"
    mask = os.umask(0o022)
    try:
        assert finish(tmp_path) == tmp_path / "former" / "gone"
    finally:
        os.umask(mask)
    for folder in (tmp_path / "former", tmp_path / "former" / "gone"):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700, "it holds keys"
    assert tree(tmp_path) == {
        "api-token": b"stays",
        **{f"former/gone/{name}": b"old " + name.encode() for name in FILES},
    }


def test_an_identity_is_kept_or_made_anew(tmp_path: Path) -> None:
    own = load_or_make_identity(tmp_path)
    assert prepare_identity(tmp_path, keep=True).node_id == own.node_id
    fresh = prepare_identity(tmp_path, keep=False)
    assert fresh.node_id != own.node_id
    # An inviter whose answer was lost knows the key of the first try: the next one uses it again.
    assert prepare_identity(tmp_path, keep=False).node_id == fresh.node_id
    assert load_or_make_identity(tmp_path).node_id == own.node_id
    assert oct((tmp_path / STAGING).stat().st_mode & 0o777) == "0o700"


@pytest.mark.parametrize("admin", [False, True])
async def test_what_a_join_brought_is_whole_after_the_change(tmp_path: Path, admin: bool) -> None:
    root = found_root()
    old = load_or_make_identity(tmp_path)
    identity = prepare_identity(tmp_path, keep=False)
    member = keys_of(1)[2]
    grant = JoinGrant(
        node_id=identity.node_id, mesh_id=root.mesh_id, root_public_key=root.public_key, name="büro",
        root_certificate=root_certificate(root), leaf=issue_leaf(root, identity.public_key), admission=admitted(1),
        statements=(admitted(1),), keys=(GossipKey(3, b"k" * 32, b"\0" * 8, 5),),
        role="admin" if admin else "member",
        peers=(
            PeerHint(member, keys_of(1)[1], (Address("127.0.0.1", 4893),)),
            PeerHint(identity.node_id, identity.public_key, (NOWHERE,)),
            PeerHint(keys_of(2)[2], keys_of(2)[1], ()),
        ),
        issuer_name="kitchen", address=NOWHERE,
        sealed_root=seal_root(root, identity.public_key) if admin else b"",
    )  # fmt: skip
    for _ in range(2):  # staged again, it is the same
        identity_again = load_or_make_identity(tmp_path / STAGING)
        assert identity_again.node_id == identity.node_id
        (tmp_path / STAGING / DATABASE_FILE).unlink(missing_ok=True)
        await stage_join(tmp_path, identity, grant, MIGRATIONS, former="f", wall=5.0)
    finish(tmp_path)
    assert load_or_make_identity(tmp_path).node_id == identity.node_id
    assert load_or_make_identity(tmp_path / "former" / "f").node_id == old.node_id
    assert (load_root(tmp_path) is not None) is admin
    async with open_database(tmp_path / DATABASE_FILE, MIGRATIONS, wall=0.0) as database:
        mesh = MeshStore(database).load()
        assert mesh is not None
        assert (mesh.mesh_id, mesh.name, mesh.founder, mesh.joined_at) == (root.mesh_id, "büro", False, 5.0)
        assert MeshStore(database).statements() == [admitted(1)]
        assert KeyValue(database).load_all(CONTACTS) == {member.encode(): b"\x7f\x00\x00\x01\x13\x1d"}
        assert KeyValue(database).load_all("keys") != {}
