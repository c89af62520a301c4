"""What is kept of two streams, and read again while they are written."""

import os
from pathlib import Path

import pytest

from meshnode.tasks.execution import attempts
from meshnode.tasks.execution.output import (
    TAIL_FILE_BYTES_MIN,
    TAIL_FILES,
    Chunk,
    Merged,
    Stream,
    StreamReader,
    StreamWriter,
    end,
    files,
    merged,
)

HEAD = 12  # what is written beside each chunk


def writer(
    folder: Path, stream: Stream = "stdout", head_bytes: int = 1 << 20, tail_bytes: int = 1 << 20
) -> StreamWriter:
    return StreamWriter(folder, stream, head_bytes=head_bytes, tail_bytes=tail_bytes)


def chunks(folder: Path, offset: int = 0, stream: Stream = "stdout") -> list[Chunk]:
    reader = StreamReader(folder, stream, offset)
    found = []
    while (chunk := reader.next()) is not None:
        found.append(chunk)
    reader.close()
    return found


def order_of(reading: Merged) -> str:
    said = ""
    while (found := reading.next()) is not None:
        said += found[1].data.decode()
    return said


def test_what_is_written_is_read(data_dir: Path) -> None:
    out = writer(data_dir)
    out.write(0, b"ab")
    out.write(1, b"cde")
    out.finish()
    assert [(chunk.number, chunk.offset, chunk.data, chunk.cut) for chunk in chunks(data_dir)] == [
        (0, 0, b"ab", 0),
        (1, 2, b"cde", 0),
    ]
    assert out.total == end(data_dir, "stdout") == 5


@pytest.mark.parametrize("offset", range(8))
def test_reading_begins_within_a_chunk_and_waits_behind_the_end(data_dir: Path, offset: int) -> None:
    out = writer(data_dir)
    for number, part in enumerate((b"ab", b"cde", b"f")):
        out.write(number, part)
    assert b"".join(chunk.data for chunk in chunks(data_dir, offset)) == b"abcdef"[offset:]
    reader = StreamReader(data_dir, "stdout", offset)
    while reader.next() is not None:
        pass
    out.write(3, b"ghij")
    chunk = reader.next()
    assert chunk is not None
    assert chunk.data == b"abcdefghij"[max(6, offset) :]
    reader.close()


def test_head_and_tail_are_kept_and_the_gap_is_told(data_dir: Path) -> None:
    out = writer(data_dir, head_bytes=1000, tail_bytes=4 * TAIL_FILE_BYTES_MIN)
    data = os.urandom(200_000)
    for begin in range(0, len(data), 500):
        out.write(begin // 500, data[begin : begin + 500])
    found = chunks(data_dir)
    assert found[0].offset == 0
    assert [chunk.cut for chunk in found if chunk.cut] == [found[2].cut]
    for chunk in found:
        assert data[chunk.offset : chunk.offset + len(chunk.data)] == chunk.data
    assert found[-1].offset + len(found[-1].data) == len(data) == end(data_dir, "stdout")
    kept = sum(size for _, size in files(data_dir, "stdout"))
    assert 3 * TAIL_FILE_BYTES_MIN < kept <= 1000 + TAIL_FILES * TAIL_FILE_BYTES_MIN
    # The middle is gone: whoever asks for it gets the next byte that is there.
    assert chunks(data_dir, 5000)[0].cut == found[2].offset - 5000


def test_single_bytes_take_no_more_room_than_allowed(data_dir: Path) -> None:
    out = writer(data_dir, head_bytes=5000, tail_bytes=1)
    for number in range(5000):
        out.write(number, b"x")
    assert sum(size for _, size in files(data_dir, "stdout")) <= 5000 + TAIL_FILES * TAIL_FILE_BYTES_MIN
    assert len(files(data_dir, "stdout")) <= 1 + TAIL_FILES


def test_both_streams_come_in_their_order(data_dir: Path) -> None:
    out, err = writer(data_dir), writer(data_dir, "stderr")
    for number, letter in enumerate("abcdefghij"):
        (err if number % 3 else out).write(number, letter.encode())
    assert order_of(merged(data_dir, 0, 0)) == "abcdefghij"
    reading = merged(data_dir, 2, 3)  # behind a and d, b c and e
    assert order_of(reading) == "fghij"
    err.write(10, b"k")
    out.write(11, b"l")
    assert order_of(reading) == "kl"
    reading.close()


def test_neighbours_of_one_stream_are_one_piece(data_dir: Path) -> None:
    out, err = writer(data_dir), writer(data_dir, "stderr")
    for number, (stream, letter) in enumerate([(out, b"a"), (out, b"b"), (err, b"c"), (out, b"d")]):
        stream.write(number, letter)
    reading = merged(data_dir, 0, 0)
    assert [(piece.stream, piece.offset, piece.data) for piece in attempts.batch(reading)] == [
        ("stdout", 0, b"ab"),
        ("stderr", 0, b"c"),
        ("stdout", 2, b"d"),
    ]
    assert attempts.batch(reading) == []
    reading.close()


@pytest.mark.parametrize("left", range(1, HEAD + 5))
def test_a_chunk_that_was_torn_is_as_if_not_written(data_dir: Path, left: int) -> None:
    out = writer(data_dir)
    out.write(0, b"whole")
    size = files(data_dir, "stdout")[0][1]
    out.write(1, b"torn!")
    [(begin, _)] = files(data_dir, "stdout")
    os.truncate(data_dir / f"stdout.{begin:016}", size + left - 1)
    assert [chunk.data for chunk in chunks(data_dir)] == [b"whole"]
    assert end(data_dir, "stdout") == 5
    assert attempts.read(data_dir, "stdout", -3, 100).data == b"ole"


def test_a_length_that_cannot_be_ends_the_file(data_dir: Path) -> None:
    (data_dir / "stdout.0000000000000000").write_bytes(b"\xff" * 4096)
    assert chunks(data_dir) == []


class FullDisk:
    """Takes so many bytes, then none; a file in part."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
        self.room = room
        self._writev, self._write = os.writev, os.write
        monkeypatch.setattr(os, "writev", lambda fd, parts: self.write(fd, b"".join(parts)))
        monkeypatch.setattr(os, "write", self.write)

    def write(self, fd: int, data: bytes) -> int:
        taken = data[: self.room]
        if not taken:
            raise OSError(28, "No space left on device")
        self.room -= len(taken)
        return self._write(fd, taken)


def test_a_full_disk_leaves_a_gap_and_what_was_there(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = writer(data_dir, head_bytes=100, tail_bytes=4 * TAIL_FILE_BYTES_MIN)
    disk = FullDisk(monkeypatch, 100_000)
    number = 0
    for _ in range(300):
        out.write(number, b"%099d\n" % number)
        number += 1
    before = files(data_dir, "stdout")
    disk.room = 30  # the next is torn
    for _ in range(50):
        out.write(number, b"%099d\n" % number)
        number += 1
    assert [name for name, _ in files(data_dir, "stdout")] == [name for name, _ in before]
    assert out.unkept == 5000
    assert "No space" in out.error
    disk.room = 100_000
    out.write(number, b"after\n")
    out.finish()
    assert out.total == 35_006
    found = chunks(data_dir)
    assert (found[-1].offset, found[-1].data, found[-1].cut) == (35_000, b"after\n", 5000)
    assert found[-2].offset + len(found[-2].data) == 30_000
    assert attempts.read(data_dir, "stdout", -8, 100).data == b"after\n"


def test_a_disk_that_is_full_from_the_beginning_leaves_no_files(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = writer(data_dir)
    FullDisk(monkeypatch, 0)
    for number in range(20):
        out.write(number, b"lost")
    assert files(data_dir, "stdout") == []
    assert (out.total, out.unkept) == (80, 80)
    out.finish()


def test_pieces_are_no_longer_than_asked_and_stop_at_a_gap(data_dir: Path) -> None:
    out = writer(data_dir, head_bytes=30, tail_bytes=1)
    for number in range(2000):
        out.write(number, b"%05d " % number)
    first = attempts.read(data_dir, "stdout", 0, 4)
    assert (first.offset, first.data, first.cut) == (0, b"0000", 0)
    head = attempts.read(data_dir, "stdout", 0, 1 << 20)
    assert head.data == b"00000 "
    tail = attempts.read(data_dir, "stdout", len(head.data), 1 << 20)
    assert tail.cut == tail.offset - len(head.data) > 0
    assert tail.data.endswith(b"01999 ")
    assert attempts.read(data_dir, "stdout", -6, 100).data == b"01999 "
    assert attempts.read(data_dir, "stdout", -(1 << 40), 100).offset == 0
    assert attempts.read(data_dir, "stdout", 1 << 40, 100).data == b""
    assert attempts.read(data_dir, "stderr", 0, 100).data == b""
