"""Case 41: whatever arguments and variables hold, they stay arguments and variables.

Each is tried with an agent that is root, whose tasks have users of their own, and with an ordinary user's.
"""

import os
import subprocess
from pathlib import Path

import pytest

from meshnode.tasks.execution.becoming import wall_files
from meshnode.tasks.execution.isolation import Walls, bubblewrap, furnish, options
from meshnode.tasks.execution.job import Job
from tests.tasks.execution.as_user import needs_python, run_all, script, users
from tests.tasks.execution.world import needs_walls, one_agent, order

pytestmark = [needs_walls, needs_python]
both_users = pytest.mark.parametrize("user", users())

ODD = [
    "; touch /tmp/x",
    "$(id)",
    "`id`",
    "--bind",
    "/",
    "/host",
    "-c",
    "a\nb",
    "*",
    "",
    "--",
    "'\"\\",
    "\x1b[2J",
    "ü\udcff"[:1],
]


@both_users
def test_case_41_arguments_stay_arguments(data_dir: Path, user: int | None) -> None:
    [result] = run_all(data_dir, user, [script("import sys; print(repr(sys.argv[1:]))", *ODD)])
    assert (result.ending, result.code) == ("exited", 0)
    assert result.out.decode() == repr(ODD) + "\n"


def test_case_41_through_a_shell_they_would_not() -> None:
    done = subprocess.run(["sh", "-c", f"printf %s\\\\n {ODD[2]} {ODD[1]}"], capture_output=True, check=False)
    assert ODD[1].encode() not in done.stdout
    assert b"uid=" in done.stdout


async def test_case_41_a_command_named_like_an_option_is_a_command(data_dir: Path) -> None:
    async with one_agent(data_dir) as world:
        for name in ("--bind", "--help", "-", "--"):
            outcome = await world.run(name, "/", "/host")
            assert (outcome.ending, outcome.code) == ("refused", 127)


@both_users
def test_case_41_a_string_goes_to_the_shell_behind_the_walls(data_dir: Path, user: int | None) -> None:
    [result] = run_all(data_dir, user, [order(shell="echo $((40+2)) $(cat /proc/1/comm); exit 7")])
    assert (result.ending, result.code, result.out) == ("exited", 7, b"42 bwrap\n")


NUL = {"X": "x\0--ro-bind\0/\0/host"}


@both_users
def test_case_41_a_nul_is_refused_before_anything_starts(data_dir: Path, user: int | None) -> None:
    orders = [
        order("ls", "/host", env=NUL),
        order("ls", "/host", env={"X\0--bind\0/\0/host": ""}),
        order("ls", "a\0b"),
        order("ls\0", "a"),
        order(shell="ls\0"),
        order("ls", env={"A=B": "c"}),
        order("ls", env={"": "c"}),
    ]
    for result in run_all(data_dir, user, orders):
        assert result.ending == "refused"
        assert "NUL" in result.words or "name of a variable" in result.words


def test_case_41_where_the_first_check_fails_the_second_holds() -> None:
    listed = options(Walls(Path("/scratch"), environment=NUL))
    with pytest.raises(ValueError, match="NUL"):
        wall_files(Job(argv=(), work="", options=tuple(listed)))


def test_case_41_without_both_a_variable_is_a_mount(data_dir: Path) -> None:
    furnish(data_dir, None)
    program = bubblewrap() or ""
    told = os.memfd_create("told")
    os.write(told, "\0".join(options(Walls(data_dir, environment=NUL))).encode())
    os.lseek(told, 0, os.SEEK_SET)
    done = subprocess.run(
        [program, "--args", str(told), "ls", "/host"], capture_output=True, pass_fds=[told], check=False
    )
    os.close(told)
    assert b"proc" in done.stdout or b"Read-only" in done.stderr  # it was a mount, or was taken for one
    assert b"No such file" not in done.stderr


@both_users
def test_case_41_a_megabyte_of_arguments_works_or_is_refused(data_dir: Path, user: int | None) -> None:
    many = ["x" * 100_000] * 10
    count = "import sys; print(sum(map(len, sys.argv[1:])))"
    works, refused = run_all(data_dir, user, [script(count, *many), script(count, "x" * 1_000_000)])
    assert works.out == b"1000000\n"
    assert refused.ending == "refused"
    assert "Argument list too long" in refused.words


@both_users
def test_case_41_a_newline_in_a_variable_stays_there(data_dir: Path, user: int | None) -> None:
    [result] = run_all(data_dir, user, [script("import os; print(repr(os.environ['A']))", env={"A": "b\nC=d"})])
    assert result.out == b"'b\\nC=d'\n"
