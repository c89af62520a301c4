"""Where attempts of other users work, and what happens to hostile folders there."""

import os
from pathlib import Path

import pytest

from meshnode.tasks.execution.places import Place, leave_shared, shared_folder


@pytest.fixture
def parent(data_dir: Path) -> Path:
    """Stands for /var/tmp."""
    path = data_dir / "tmp"
    path.mkdir()
    return path


def test_it_is_remembered(data_dir: Path, parent: Path) -> None:
    made = shared_folder(data_dir, parent)
    assert made.parent == parent
    assert made.stat().st_mode & 0o777 == 0o711
    assert shared_folder(data_dir, parent) == made
    assert len(list(parent.iterdir())) == 1


def test_an_empty_one_is_left_behind_by_nobody(data_dir: Path, parent: Path) -> None:
    made = shared_folder(data_dir, parent)
    (made / "x").mkdir()
    leave_shared(data_dir)
    assert made.is_dir()
    (made / "x").rmdir()
    leave_shared(data_dir)
    assert not list(parent.iterdir())
    leave_shared(data_dir)


def test_it_comes_anew_where_it_was_removed(data_dir: Path, parent: Path) -> None:
    made = shared_folder(data_dir, parent)
    made.rmdir()
    assert shared_folder(data_dir, parent).is_dir()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder to somebody else")
@pytest.mark.parametrize("hostile", ["owner", "mode", "link", "file"])
def test_a_hostile_one_of_that_name_is_not_used(data_dir: Path, parent: Path, hostile: str) -> None:
    made = shared_folder(data_dir, parent)
    made.rmdir()
    if hostile == "link":
        made.symlink_to("/etc")
    elif hostile == "file":
        made.write_text("")
    else:
        made.mkdir()
        made.chmod(0o777 if hostile == "mode" else 0o711)
        os.chown(made, 4321 if hostile == "owner" else 0, 0)
    with pytest.raises(OSError, match="somebody else"):
        Place(4321, made).make(made / "x")
    other = shared_folder(data_dir, parent)
    assert other != made
    Place(4321, other).make(other / "x")
    assert (other / "x").stat().st_uid == 4321


@pytest.mark.parametrize("text", ["", "/etc", "/", "../..", "\0"])
def test_a_remembered_name_that_cannot_be_is_forgotten(data_dir: Path, parent: Path, text: str) -> None:
    (data_dir / "place").write_text(text)
    assert shared_folder(data_dir, parent).parent == parent
