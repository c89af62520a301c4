"""A task that is followed while its executor goes away, while it is tried again, and when it is long over."""

from contextlib import aclosing
from pathlib import Path

import pytest
import trio

from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.tasks.model import Piece
from meshnode.tasks.service.streaming import Place, Stands, Wrote
from meshnode.tasks.service.wire import END, PIECE_BYTES_MAX, PULSE, PieceReader, packed
from tests.support.api_server import until
from tests.support.task_mesh import Member, task_mesh


async def followed(member: Member, task: str, after: Place | None = None) -> list[Wrote | Stands]:
    return [one async for one in member.tasks.streaming.follow(task, after or Place())]


def text(told: list[Wrote | Stands], stream: str = "stdout") -> bytes:
    return b"".join(one.piece.data for one in told if isinstance(one, Wrote) and one.piece.stream == stream)


async def test_each_attempt_is_told_from_its_beginning(tmp_path: Path) -> None:
    async with task_mesh(tmp_path, 2) as mesh:
        flag = tmp_path / "flag"
        script = f"echo try; if [ -e {flag} ]; then exit 0; fi; touch {flag}; exit 1"
        task = await mesh.members[1].submit(script, retries=3, node="n0")
        with trio.fail_after(20):
            told = await followed(mesh.members[1], task.id)
        attempts = {one.place.attempt for one in told if isinstance(one, Wrote)}
        assert (text(told), len(attempts)) == (b"try\ntry\n", 2)
        end = told[-1]
        assert isinstance(end, Stands)
        assert (end.task.status, end.task.attempt) == ("completed", 2)


async def test_what_is_long_over_is_told_from_any_offset_on_any_member(tmp_path: Path) -> None:
    async with task_mesh(tmp_path, 3) as mesh:
        task = await mesh.members[1].submit("printf abcdef; printf xyz >&2", node="n0")
        done = await mesh.members[2].until(task, "completed")
        [attempt] = done.attempts or ()
        for member in mesh.members:
            await member.until(task, "completed")
            told = await followed(member, task.id, Place(attempt.id, 4, 3))
            assert (text(told), text(told, "stderr")) == (b"ef", b"")
            again = await followed(member, task.id, Place("0" * 16, 4, 3))  # another attempt's place is none
            assert (text(again), text(again, "stderr")) == (b"abcdef", b"xyz")


async def test_output_that_is_kept_no_more_ends_the_stream_and_says_so(tmp_path: Path) -> None:
    async with task_mesh(tmp_path, 2) as mesh:
        reader, runner = mesh.members[1], mesh.members[0]
        task = await reader.submit("echo hi", node="n0")
        done = await reader.until(task, "completed")
        await runner.tasks.executions.remove((done.attempts or ())[0].id)
        for member in (reader, runner):
            await member.until(task, "completed")
            with trio.fail_after(20):
                told = await followed(member, task.id)
            end = told[-1]
            assert isinstance(end, Stands)
            assert text(told) == b""
            assert "nothing of the attempt" in end.unread


async def test_a_reader_outlasts_an_executor_that_is_out_of_reach_for_a_while(tmp_path: Path) -> None:
    async with task_mesh(tmp_path, 2) as mesh:
        reader, runner = mesh.members[1], mesh.members[0]
        task = await reader.submit("echo one; sleep 1; echo two", node="n0")
        told: list[Wrote | Stands] = []
        cuts = 0
        with trio.fail_after(30):
            async for one in reader.tasks.streaming.follow(task.id, Place()):
                told.append(one)
                if isinstance(one, Wrote) and not cuts:
                    cuts += 1
                    reader.link.links.cut(runner.id, "the test cuts it")
        assert text(told) == b"one\ntwo\n"
        assert isinstance(told[-1], Stands)


async def test_what_never_began_misses_no_output_and_is_told_at_once(tmp_path: Path) -> None:
    async with task_mesh(tmp_path, 2) as mesh:
        for member in mesh.members:
            task = await member.submit(["no-such-command"], node="n0")
            with trio.fail_after(1.5):
                told = await followed(member, task.id)
            end = told[-1]
            assert isinstance(end, Stands)
            assert (end.task.status, end.task.exit_code, end.unread) == ("failed", 127, "")


async def test_a_task_that_is_deleted_ends_its_streams(tmp_path: Path) -> None:
    async with task_mesh(tmp_path, 1) as mesh:
        member = mesh.members[0]
        task = await member.submit("true", node="n0")
        await member.until(task, "completed")
        await member.tasks.desk.purge(task.id)
        with pytest.raises(MeshError) as refused:
            await followed(member, task.id)
        assert refused.value.code is ErrorCode.NOT_FOUND


def test_pieces_come_out_whole_however_they_are_cut() -> None:
    pieces = [Piece("stdout", 0, b"abc"), Piece("stderr", 7, b"\0" * 300, cut=7), Piece("stdout", 3, b"")]
    raw = PULSE.join(part for piece in pieces for part in packed(piece)) + END
    for size in (1, 7, 50, len(raw)):
        reader = PieceReader()
        found = [piece for start in range(0, len(raw), size) for piece in reader.feed(raw[start : start + size])]
        assert (found, reader.ended) == (pieces, True)


def test_a_long_piece_travels_as_several() -> None:
    data = bytes(range(256)) * 10_000
    reader = PieceReader()
    found = [piece for part in packed(Piece("stderr", 5, data, cut=3)) for piece in reader.feed(part)]
    assert [piece.cut for piece in found] == [3, 0, 0]
    assert [piece.offset for piece in found] == [5, 5 + PIECE_BYTES_MAX, 5 + 2 * PIECE_BYTES_MAX]
    assert b"".join(piece.data for piece in found) == data


async def test_much_output_at_once_arrives_whole(tmp_path: Path) -> None:
    async with task_mesh(tmp_path, 2) as mesh:
        reader = mesh.members[1]
        task = await reader.submit("head -c 6000000 /dev/zero; echo; echo no >&2; echo yes", node="n0")
        with trio.fail_after(20):
            told = await followed(reader, task.id)
        assert text(told) == bytes(6_000_000) + b"\nyes\n"
        assert text(told, "stderr") == b"no\n"


@pytest.mark.parametrize("raw", [b"\x09" + bytes(20), b"\x01" + bytes(16) + b"\xff\xff\xff\xff"])
def test_what_is_no_piece_is_refused(raw: bytes) -> None:
    with pytest.raises(ValueError, match="kind"):
        PieceReader().feed(raw)


async def test_a_reader_that_goes_away_is_no_failure(tmp_path: Path) -> None:
    async with task_mesh(tmp_path, 2) as mesh:
        reader, runner = mesh.members[1], mesh.members[0]
        task = await reader.submit("while :; do echo and so on; sleep 0.01; done", node="n0")
        async with aclosing(reader.tasks.streaming.follow(task.id, Place())) as told:
            async for one in told:
                if isinstance(one, Wrote):
                    break
        await until(lambda: "a peer's stream ended" in runner.log.at("debug"))
        assert not runner.log.at("exception")
