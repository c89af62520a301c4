"""The walls' command line, and what is said where they do not stand. What they hold: tests/attacks."""

import os
import subprocess
from pathlib import Path

import pytest

from meshnode.kernel.offload import InlineOffload
from meshnode.tasks.execution import isolation
from meshnode.tasks.execution.isolation import PRIVATE, Trial, Walls, bubblewrap, no_network, options, visible, why_not
from meshnode.tasks.execution.users import USERS_MAX, first_user, free_user, gives_users, user_for_trials
from tests.tasks.execution.world import needs_walls


def pairs(listed: list[str], option: str) -> list[tuple[str, str]]:
    return [(listed[at + 1], listed[at + 2]) for at, one in enumerate(listed) if one == option]


def test_only_scratch_is_writable() -> None:
    listed = options(Walls(Path("/s"), folders=("/srv/data",)))
    assert pairs(listed, "--bind") == [(f"/s/{name}", place) for name, place in PRIVATE.items()]
    assert ("/srv/data", "/srv/data") in pairs(listed, "--ro-bind-try")
    assert "--share-net" not in listed


def test_the_network_comes_only_where_it_is_given() -> None:
    assert "--unshare-net" in options(Walls(Path("/s")))
    listed = options(Walls(Path("/s"), network=True))
    assert "--unshare-net" not in listed
    assert ("/etc/resolv.conf", "/etc/resolv.conf") in pairs(listed, "--ro-bind-try")


def test_a_folder_that_holds_private_places_comes_before_them() -> None:
    listed = options(Walls(Path("/s"), folders=("/home", "/home/task/x", "/tmp/data")))
    assert listed.index("/home") < listed.index("/s/home") < listed.index("/home/task/x")
    assert listed.index("/s/tmp") < listed.index("/tmp/data")


def test_hidden_folders_lie_above_shown_ones(data_dir: Path) -> None:
    (data_dir / "link").symlink_to(data_dir / "agent")
    (data_dir / "agent").mkdir()
    listed = options(Walls(Path("/s"), folders=(str(data_dir),), hidden=(str(data_dir / "link"), "/root/elsewhere")))
    assert "/root/elsewhere" not in listed
    at = listed.index(os.path.realpath(data_dir / "agent"))
    assert listed[at - 1] == "--tmpfs"
    assert at > listed.index(str(data_dir))


@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("sh", 0),
        ("/bin/sh", 0),
        ("/bin/./sh", 0),
        ("/usr/../bin/sh", 0),
        ("", 127),
        ("no-such", 127),
        ("./sh", 127),
        ("../../root/x", 127),
        ("/usr/../root/x", 127),
        ("/usrx/sh", 127),
        ("/usr", 126),
        ("/usr/share/doc", 126),
        ("/etc/passwd", 127),
    ],
)
def test_what_can_be_executed_is_known_before(command: str, code: int) -> None:
    assert visible(command, ())[1] == code


def test_who_may_have_the_network() -> None:
    assert no_network(trusts_user=True, own_users=True) == ""
    assert no_network(trusts_user=False, own_users=False) == ""
    assert "api.require_token" in no_network(trusts_user=True, own_users=False)


# ---- why not --------------------------------------------------------------------------------------------------------


@needs_walls
def test_where_they_stand_nothing_is_said() -> None:
    assert why_not(None) == ""
    if gives_users():
        assert why_not(user_for_trials(Path("/x"))) == ""


def test_where_it_is_missing_the_words_say_how_to_get_it(monkeypatch: pytest.MonkeyPatch, data_dir: Path) -> None:
    monkeypatch.setattr(isolation, "SEARCH_PATH", str(data_dir))
    assert bubblewrap() is None
    assert "apt install bubblewrap" in why_not(None)


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("bwrap: Unknown option --json-status-fd", "0.4 or newer"),
        ("bwrap: No permissions to create new namespace", "container"),
        ("bwrap: prctl(PR_SET_SECCOMP) EINVAL, program too large?", "SECCOMP"),
        ("", "exit code 1"),
    ],
)
def test_where_it_fails_the_words_say_what_it_said(
    monkeypatch: pytest.MonkeyPatch, data_dir: Path, said: str, words: str
) -> None:
    program = data_dir / "bwrap"
    program.write_text(f"#!/bin/sh\necho '{said}' >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setattr(isolation, "SEARCH_PATH", str(data_dir))
    lack = why_not(None)
    assert said in lack
    assert words in lack


async def test_a_trial_is_made_now_and_then(monkeypatch: pytest.MonkeyPatch, data_dir: Path) -> None:
    made = []

    def tried(uid: int | None, folders: tuple[str, ...]) -> str:
        made.append((uid, folders))
        return "broken" if len(made) == 1 else ""

    now = [100.0]
    monkeypatch.setattr(isolation, "why_not", tried)
    monkeypatch.setattr("meshnode.tasks.execution.isolation.time.monotonic", lambda: now[0])
    trial = Trial(folder=data_dir, offload=InlineOffload(), folders=("/srv",))
    assert [await trial.lack() for _ in range(3)] == ["broken"] * 3
    now[0] += isolation.BAD_S
    assert [await trial.lack() for _ in range(3)] == [""] * 3
    now[0] += isolation.GOOD_S
    assert await trial.lack() == ""
    assert made == [(user_for_trials(data_dir), ("/srv",))] * 3


# ---- users ----------------------------------------------------------------------------------------------------------


def test_users_are_apart_and_end(data_dir: Path) -> None:
    first = first_user(data_dir)
    assert first is not None
    taken: set[int] = set()
    while (uid := free_user(data_dir, taken)) is not None:
        assert first < uid < first + USERS_MAX
        assert uid not in taken
        taken.add(uid)
    assert len(taken) == USERS_MAX - 1


@pytest.mark.parametrize(
    ("table", "first"),
    [("0 100000 65536\n", 64_488), ("0 1000 1\n", None), ("0 0 1\n1 100000 65535\n", 64_488), ("0 0 4294967295\n", 0)],
)
def test_in_a_container_only_some_users_exist(data_dir: Path, table: str, first: int | None) -> None:
    (data_dir / "map").write_text(table)
    found = first_user(data_dir, data_dir / "map")
    assert found == first if first != 0 else (found or 0) >= 1_900_000_000


@needs_walls
def test_the_oldest_options_are_the_only_ones() -> None:
    known = subprocess.run([bubblewrap() or "", "--help"], capture_output=True, text=True, check=True).stdout
    later = {"--clearenv", "--perms", "--size", "--disable-userns", "--argv0", "--overlay", "--bind-fd", "--chmod"}
    used = {one for one in options(Walls(Path("/s"), gpu=True, network=True)) if one.startswith("--")}
    assert not used & later
    assert all(one in known for one in used)
