"""The data folder: private, locked, and never half written."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from meshnode.kernel import datafolder
from meshnode.kernel.datafolder import LOCK_NAME, SYSTEM_DATA_DIR, default_data_dir, open_data_folder
from meshnode.kernel.errors import ErrorCode, MeshError

_HOLD = (
    "import sys\n"
    "from pathlib import Path\n"
    "from meshnode.kernel.datafolder import open_data_folder\n"
    "folder = open_data_folder(Path(sys.argv[1]))\n"
    "print('held', flush=True)\n"
    "sys.stdin.read()\n"
)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_new_folder_is_private_and_knows_its_files(tmp_path: Path) -> None:
    with open_data_folder(tmp_path / "a" / "b") as folder:
        assert folder.path == tmp_path / "a" / "b"
        assert mode(folder.path) == 0o700
        assert mode(folder.path / LOCK_NAME) == 0o600
        assert folder.database_path == folder.path / "meshnode.db"
        assert (folder.path / LOCK_NAME).read_text() == f"{os.getpid()}\n"
    assert (tmp_path / "a" / "b" / LOCK_NAME).read_text() == ""


def test_a_second_agent_is_refused_and_told_who_holds_the_folder(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _HOLD, str(tmp_path / "data")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
    with holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        for _ in range(2):
            with pytest.raises(MeshError) as caught:
                open_data_folder(tmp_path / "data")
            assert caught.value.code is ErrorCode.DATA_IN_USE
            assert caught.value.detail["pid"] == holder.pid
            assert f"process id {holder.pid}" in caught.value.message
            assert "--data-dir" in caught.value.message
        # The lock dies with its process, however that ends.
        holder.kill()
        holder.wait()
    with open_data_folder(tmp_path / "data"):
        pass


def test_two_agents_in_one_process_are_refused_too(tmp_path: Path) -> None:
    with open_data_folder(tmp_path), pytest.raises(MeshError) as caught:
        open_data_folder(tmp_path)
    assert caught.value.detail["pid"] == os.getpid()
    open_data_folder(tmp_path).release()


def test_our_folder_is_closed_to_others_and_a_strange_one_is_refused(tmp_path: Path) -> None:
    ours = tmp_path / "ours"
    open_data_folder(ours).release()
    ours.chmod(0o755)
    open_data_folder(ours).release()
    assert mode(ours) == 0o700
    strange = tmp_path / "strange"
    strange.mkdir(mode=0o755)
    (strange / "letter.txt").touch()
    with pytest.raises(MeshError, match="holds files that are not the agent's") as caught:
        open_data_folder(strange)
    assert caught.value.code is ErrorCode.FORBIDDEN
    assert mode(strange) == 0o755
    assert [entry.name for entry in strange.iterdir()] == ["letter.txt"]
    empty = tmp_path / "empty"
    empty.mkdir(mode=0o755)
    open_data_folder(empty).release()
    assert mode(empty) == 0o700


def test_another_users_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "data"
    folder.mkdir(mode=0o700)
    monkeypatch.setattr(datafolder.os, "geteuid", lambda: 4_000_000)
    with pytest.raises(MeshError, match="belongs to user") as caught:
        open_data_folder(folder)
    assert caught.value.code is ErrorCode.FORBIDDEN
    assert "this is user id 4000000" in caught.value.message
    assert list(folder.iterdir()) == []


def test_a_file_in_the_folders_place_is_said_so(tmp_path: Path) -> None:
    file = tmp_path / "data"
    file.touch()
    for path in (file, file / "below"):
        with pytest.raises(MeshError, match="cannot be made or written") as caught:
            open_data_folder(path)
        assert caught.value.code is ErrorCode.STORAGE_FAILED
        assert "--data-dir" in caught.value.message


def test_a_folder_that_cannot_be_written_is_said_so(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir(mode=0o500)
    if os.geteuid() == 0:
        # Root may write everywhere: take another user's rights for the time of the attempt.
        os.chown(folder, 65_534, -1)
        for parent in (tmp_path, *tmp_path.parents):
            if parent.stat().st_mode & 0o001 == 0:
                parent.chmod(parent.stat().st_mode | 0o001)
        os.seteuid(65_534)
    try:
        with pytest.raises(MeshError, match="cannot be made or written") as caught:
            open_data_folder(folder)
    finally:
        os.seteuid(os.getuid())
    assert caught.value.code is ErrorCode.STORAGE_FAILED
    assert list(folder.iterdir()) == []


def test_too_little_space_is_said_so(tmp_path: Path) -> None:
    with open_data_folder(tmp_path) as folder:
        folder.check_free(1)
        with pytest.raises(MeshError, match="Free some space") as caught:
            folder.check_free(2**70)
        assert caught.value.code is ErrorCode.DISK_FULL


def test_the_default_is_the_users_or_the_systems_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    if sys.platform == "linux":
        assert default_data_dir() == tmp_path / "meshnode"
        assert default_data_dir(system_service=True) == SYSTEM_DATA_DIR
        with open_data_folder() as folder:
            assert folder.path == tmp_path / "meshnode"
