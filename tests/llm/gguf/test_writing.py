"""Writing a virtual file: whole or not at all, taken up where it broke off, verified."""

import os
from pathlib import Path

import pytest
from blake3 import blake3

from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.llm.gguf import writing
from meshnode.llm.gguf.errors import GgufError
from meshnode.llm.gguf.pieces import Copy, Literal, VirtualFile, Zeros
from meshnode.llm.gguf.source import PrefixSource
from meshnode.llm.gguf.writing import content_id, write_file

BODY = bytes(range(256)) * 64
FILE = VirtualFile([Literal(b"head"), Copy(0, 100, 9000), Zeros(50_000), Copy(0, 0, 5000), Literal(b"end")])
RIGHT = b"head" + BODY[100:9100] + bytes(50_000) + BODY[:5000] + b"end"


class Source(PrefixSource):
    """Counts what is read, and breaks off where told."""

    def __init__(self, breaks_after: int | None = None) -> None:
        super().__init__(BODY, len(BODY))
        self.breaks_after = breaks_after
        self.read = 0

    def read_at(self, offset: int, length: int) -> bytes:
        self.read += length
        if self.breaks_after is not None and self.read > self.breaks_after:
            raise OSError(5, "Input/output error")
        return super().read_at(offset, length)


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "CHUNK_BYTES", 4096)


def test_what_lies_there_is_right(tmp_path: Path) -> None:
    told: list[int] = []
    path = tmp_path / "deep" / "slice.gguf"
    written = write_file(FILE, [Source()], path, progress=told.append)
    assert path.read_bytes() == RIGHT
    assert written.content == blake3(RIGHT).hexdigest() == content_id(FILE, [Source()])
    assert (written.size, written.copied) == (len(RIGHT), len(RIGHT))
    assert told == sorted(told)
    assert told[-1] == len(RIGHT)
    assert os.listdir(path.parent) == ["slice.gguf"]


def test_zeros_are_holes(tmp_path: Path) -> None:
    file = VirtualFile([Literal(b"a"), Zeros(8 << 20), Literal(b"b")])
    path = tmp_path / "slice.gguf"
    write_file(file, [], path)
    assert path.stat().st_size == (8 << 20) + 2
    if path.stat().st_blocks * 512 >= 8 << 20:
        pytest.skip("this file system keeps no holes")


def test_it_goes_on_where_it_broke_off(tmp_path: Path) -> None:
    path = tmp_path / "slice.gguf"
    with pytest.raises(MeshError) as failed:
        write_file(FILE, [Source(breaks_after=10_000)], path)
    assert (failed.value.code, failed.value.retryable) == (ErrorCode.STORAGE_FAILED, True)
    assert not path.exists()
    assert write_file(FILE, [Source()], path).copied < len(RIGHT) - 4096
    assert path.read_bytes() == RIGHT


@pytest.mark.parametrize("rubbish", [b"", b"head", RIGHT[:20_000] + b"x" * 90_000, b"x" * 70_000, RIGHT + b"more"])
def test_a_part_is_believed_as_far_as_it_is_right(tmp_path: Path, rubbish: bytes) -> None:
    path = tmp_path / "slice.gguf"
    (tmp_path / "slice.gguf.part").write_bytes(rubbish)
    assert write_file(FILE, [Source()], path).content == blake3(RIGHT).hexdigest()
    assert path.read_bytes() == RIGHT


def test_another_content_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "slice.gguf"
    path.write_bytes(b"the old one")
    with pytest.raises(GgufError, match="another one"):
        write_file(FILE, [Source()], path, expected="0" * 64)
    assert path.read_bytes() == b"the old one"
    assert os.listdir(tmp_path) == ["slice.gguf"]


def test_what_the_disk_spoils_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "slice.gguf"
    real = os.fsync

    def spoil(fd: int) -> None:
        real(fd)
        os.pwrite(fd, b"\x01", 30_000)

    monkeypatch.setattr(os, "fsync", spoil)
    with pytest.raises(GgufError, match="read back"):
        write_file(FILE, [Source()], path)
    assert os.listdir(tmp_path) == []


def test_a_full_disk_is_told_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(MeshError) as failed:
        write_file(FILE, [Source()], tmp_path / "slice.gguf")
    assert failed.value.code is ErrorCode.DISK_FULL
    assert "No space left" in failed.value.message
