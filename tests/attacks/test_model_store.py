"""Cases 31, 32, 34, 35 and 36: the store of models under hostile names, foreign files, a failing disk, a power cut."""

import errno
import gzip
import io
import os
import pickle
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import msgspec
import pytest
import trio

from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.llm.gguf import foreign
from meshnode.llm.service.pull import fetch, pulls, refs
from meshnode.llm.service.weights import staging
from meshnode.llm.service.weights.records import ModelRecords
from tests.llm.service.weights.world import Member, model, world
from tests.support.failing_disk import FailingDisk
from tests.support.origin_server import origin_server
from tests.support.power import Disk, Kept, lay_out

BODY = model(layers=2)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "BACKOFF_FIRST_S", 0.001)
    monkeypatch.setattr(pulls, "POLL_S", 0.01)
    monkeypatch.setattr(fetch, "WRITE_BYTES", len(BODY) // 6)
    monkeypatch.setattr(fetch, "SYNC_BYTES", len(BODY) // 3)


# ---- 31: ways out of the folder

NAMES = ["../../../etc/cron.d/x", "..", ".", "/etc/passwd", "a/../../b", "x\x00y", "~/x", "a\\..\\b", "\n", "e" * 5000]


@pytest.mark.parametrize("name", NAMES)
async def test_case_31_a_models_name_leads_nowhere(tmp_path: Path, name: str) -> None:
    async with origin_server({"/m.gguf": BODY}) as origin, world(tmp_path) as w:
        node = await w.add()
        await node.pull(origin.url("/m.gguf"))
        known = node.weights.find("m")
        named = msgspec.structs.replace(known, name=name, aliases=(name,))
        await w.board.put("llm/models", known.digest.encode(), msgspec.msgpack.encode(named))
        path = await node.stage(named, 0, 2)
        assert path.resolve().parent == (node.folder / known.digest).resolve()
        assert path.read_bytes() == BODY
        assert len(path.name) < 200


@pytest.mark.parametrize("defended", [True, False])
async def test_case_31_a_digest_that_begins_like_anothers_takes_no_file_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, defended: bool
) -> None:
    """Sibling prefix: a member makes up a model whose digest shares its beginning with one that this node holds."""
    if not defended:
        monkeypatch.setattr(staging.Staging, "_folder", lambda self, digest: self._shelf.folder / digest[:16])
    other = model("llama", "F16", layers=2)
    async with origin_server({"/m.gguf": BODY, "/o/m.gguf": other}) as origin, world(tmp_path) as w:
        node = await w.add()
        await node.pull(origin.url("/m.gguf"), whole=True)
        mine = node.weights.find("m")
        held = await node.stage(mine, 0, 2)
        liar = await w.add()
        await liar.pull(origin.url("/o/m.gguf"))
        [theirs] = [one for one in liar.weights.manifests() if one.digest != mine.digest]
        digest = mine.digest[:16] + "0" * 48
        shape = msgspec.structs.replace(theirs.shape, digest=digest)
        lie = msgspec.structs.replace(theirs, digest=digest, shape=shape)
        await w.board.put("llm/models", digest.encode(), msgspec.msgpack.encode(lie))
        await node.stage(lie, 0, 2)
        assert (held.read_bytes() == BODY) is defended


@pytest.mark.parametrize("source", ["/etc/passwd.gguf", "file:///etc/x.gguf", "../x.gguf", "hf:../../x.gguf", "m"])
async def test_case_31_a_source_that_a_member_names_is_never_a_path_of_this_machine(
    tmp_path: Path, source: str
) -> None:
    async with origin_server({"/m.gguf": BODY}) as origin, world(tmp_path) as w:
        giver, node = await w.add(), await w.add()
        await giver.pull(origin.url("/m.gguf"))
        named = msgspec.structs.replace(giver.weights.find("m"), source=source)
        await w.board.put("llm/models", named.digest.encode(), msgspec.msgpack.encode(named))
        before = len(origin.asked)
        with pytest.raises(MeshError, match=r"no origin|could not be had|no member"):
            await node.stage(named, 0, 2)
        assert len(origin.asked) == before


async def test_case_31_removing_a_model_follows_no_link(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_bytes(BODY)
    async with origin_server({"/m.gguf": BODY}) as origin, world(tmp_path) as w:
        node = await w.add()
        await node.pull(origin.url("/m.gguf"), whole=True)
        path = await node.stage(node.weights.find("m"), 0, 2)
        path.unlink()
        path.symlink_to(precious)
        await node.weights.shelf.add_files(node.weights.find("m").digest, [path], owned=True)
        await node.pulls.remove("m", everywhere=False)
        assert not path.is_symlink()
        assert precious.read_bytes() == BODY


@pytest.mark.parametrize("alike", [True, False], ids=["whose shape says the same", "whose shape does not"])
@pytest.mark.parametrize("key", ["../../x", "0" * 63, "A" * 64, "0" * 64 + "/..", "0" * 64, ""])
async def test_case_31_a_record_under_another_key_than_its_digest_is_passed_over(
    tmp_path: Path, key: str, alike: bool
) -> None:
    if alike and key == "0" * 64:
        return  # which is as sound as any
    async with origin_server({"/m.gguf": BODY}) as origin, world(tmp_path) as w:
        node = await w.add()
        await node.pull(origin.url("/m.gguf"))
        known = node.weights.find("m")
        shape = msgspec.structs.replace(known.shape, digest=key) if alike else known.shape
        lie = msgspec.structs.replace(known, digest=key, shape=shape, name="lie")
        await w.board.put("llm/models", key.encode(), msgspec.msgpack.encode(lie))
        records = ModelRecords(me=node.id, reads=w.board, writes=w.board)
        assert records.manifest(key) is None
        assert [manifest.name for manifest in records.manifests()] == ["m"]
        await w.board.put("llm/models", b"1" * 64, msgspec.msgpack.encode(msgspec.structs.replace(known, name="lie")))
        assert [manifest.name for manifest in records.manifests()] == ["m"], "another model's own record"


# ---- 32 and 36: files of other kinds


def archive(kind: str) -> bytes:
    out = io.BytesIO()
    if kind == "tar":
        with tarfile.open(fileobj=out, mode="w") as tar:
            slip = tarfile.TarInfo("../../../etc/cron.d/x")
            slip.size = 1
            tar.addfile(slip, io.BytesIO(b"x"))
            link = tarfile.TarInfo("out")
            link.type, link.linkname = tarfile.SYMTYPE, "/etc"
            tar.addfile(link)
    else:
        with zipfile.ZipFile(out, "w") as zipped:
            zipped.writestr("../../../etc/cron.d/x", b"x")
    return out.getvalue()


class Evil:
    ran = False

    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return os.mkdir, ("/tmp/mn-this-pickle-was-read",)


FOREIGN = {
    "zip": (archive("zip"), "a zip archive"),
    "tar": (archive("tar"), "a tar archive"),
    "gzip": (gzip.compress(BODY), "a gzip file"),
    "pickle": (pickle.dumps(Evil()), "a pickle"),
    "an old pickle": (pickle.dumps(Evil(), protocol=2), "a pickle"),
    "safetensors": (b"\x40\0\0\0\0\0\0\0" + b'{"a":{"dtype":"F32"' + bytes(100), "safetensors"),
    "GGML": (b"tjgg" + bytes(100), "before GGUF"),
    "git-lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "git-lfs"),
    "a page": (b"<!doctype html><title>Log in</title>", "a web page"),
}


@pytest.mark.parametrize(("body", "kind"), FOREIGN.values(), ids=FOREIGN)
async def test_case_32_and_36_another_kind_of_file_is_refused_by_name_and_never_opened(
    tmp_path: Path, body: bytes, kind: str
) -> None:
    (tmp_path / "m.gguf").write_bytes(body)
    async with origin_server({"/m.gguf": body}) as origin, world(tmp_path) as w:
        node = await w.add()
        for ref in (origin.url("/m.gguf"), str(tmp_path / "m.gguf")):
            with pytest.raises(MeshError, match=f"{kind}.*Only GGUF files are taken") as caught:
                await node.pull(ref, whole=True)
            assert caught.value.code is ErrorCode.BAD_REQUEST
        assert not w.board.rows
    assert not await trio.Path("/tmp/mn-this-pickle-was-read").exists()


@pytest.mark.parametrize("ending", sorted(foreign.NAME_ENDINGS))
@pytest.mark.parametrize("form", ["hf:o/r/m{}", "https://host.example/m{}?x=y", "/models/m{}", "m{}"])
def test_case_32_and_36_the_name_of_another_kind_of_file_is_refused(form: str, ending: str) -> None:
    with pytest.raises(MeshError, match="Only GGUF files are taken") as caught:
        refs.parse_ref(form.format(ending))
    assert foreign.NAME_ENDINGS[ending] in caught.value.message


# ---- 34: a disk that fails


@pytest.mark.parametrize("stays", [False, True], ids=["once", "from then on"])
@pytest.mark.parametrize("wrong", [errno.ENOSPC, errno.EIO], ids=["full", "broken"])
async def test_case_34_at_whatever_change_the_disk_fails_nothing_half_is_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: int, stays: bool
) -> None:
    disk, failures, last = Disk(monkeypatch, tmp_path / "models"), list[MeshError](), 0
    async with origin_server({"/m.gguf": BODY}) as origin, world(tmp_path) as w:
        for number in range(1, 200):
            node = await w.add()
            disk.changes = 0
            disk.before = partial(fails, number, wrong, stays)
            failure: MeshError | None = None
            try:
                await node.pull(origin.url("/m.gguf"), whole=True)
            except MeshError as error:
                failure = error
            disk.before, made = lambda number, what: None, disk.changes
            if failure is not None:
                failures.append(failure)
                assert node.weights.shelf.files() == []
                assert node.weights.shelf.owned_bytes() == 0
                assert all(node.weights.holds(node.id, known.digest) == () for known in node.weights.manifests())
            await node.pull(origin.url("/m.gguf"), whole=True)
            assert (await node.stage(node.weights.find("m"), 0, 2)).read_bytes() == BODY
            # The next one must not get it from here.
            w.down.add(node.id)
            node.scope.cancel()
            last = number
            if made < number:
                break
    assert last > 15
    assert len(failures) > last / 2
    assert {error.code for error in failures} == {
        ErrorCode.DISK_FULL if wrong == errno.ENOSPC else ErrorCode.STORAGE_FAILED
    }
    assert all("llm.models_dir" in error.message for error in failures)


def fails(at: int, wrong: int, stays: bool, number: int, what: str) -> None:
    """The disk fails at one change, or from it on."""
    if number == at or (stays and number > at):
        raise OSError(wrong, os.strerror(wrong))


async def test_case_34_a_failed_sync_is_not_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel reports lost pages once, and calls them written the next time: no journal may vouch for them then."""
    disk = Disk(monkeypatch, tmp_path / "models0")
    seen: list[str] = []

    def fail(number: int, what: str) -> None:
        seen.append(what)
        if what == "sync m.gguf.part" and seen.count(what) == 1:
            raise OSError(errno.EIO, "Input/output error")

    disk.before = fail
    async with origin_server({"/m.gguf": BODY}) as origin, world(tmp_path) as w:
        node = await w.add()
        with pytest.raises(MeshError, match="Input/output error") as caught:
            await node.pull(origin.url("/m.gguf"), whole=True)
        assert caught.value.code is ErrorCode.STORAGE_FAILED
    after = seen[seen.index("sync m.gguf.part") + 1 :]
    assert not any("journal" in what or "sync" in what or "rename m.gguf" in what for what in after)


@pytest.mark.parametrize("wrong", [errno.ENOSPC, errno.EIO])
async def test_case_34_a_database_that_fails_lists_nothing_and_ends_no_service(tmp_path: Path, wrong: int) -> None:
    async with origin_server({"/m.gguf": BODY}) as origin, world(tmp_path) as w:
        node = await w.add()
        with FailingDisk(wrong), pytest.raises(MeshError) as caught:
            await node.pull(origin.url("/m.gguf"), whole=True)
        assert caught.value.code in (ErrorCode.DISK_FULL, ErrorCode.STORAGE_FAILED)
        assert node.weights.shelf.files() == []
        assert node.pulls.under_way() == []
        # The services live on, whatever the database says now.
        with suppress(MeshError):
            await node.pull(origin.url("/m.gguf"), whole=True)
            assert (await node.stage(node.weights.find("m"), 0, 2)).read_bytes() == BODY


@pytest.mark.parametrize("wrong", [errno.ENOSPC, errno.EIO])
async def test_case_34_a_database_that_fails_while_layers_are_fetched_ends_no_service(
    tmp_path: Path, wrong: int
) -> None:
    async with origin_server({"/m.gguf": BODY}) as origin, world(tmp_path) as w:
        node = await w.add()
        w.plan = [(node.id, 0, 1)]
        await node.pull(origin.url("/m.gguf"))
        with FailingDisk(wrong), pytest.raises(MeshError) as caught:
            await node.stage(node.weights.find("m"), 0, 2)
        assert caught.value.code in (ErrorCode.DISK_FULL, ErrorCode.STORAGE_FAILED)
        assert node.weights.shelf.files() == []
        with suppress(MeshError):
            assert (await node.stage(node.weights.find("m"), 0, 2)).read_bytes() == BODY


async def test_case_34_what_cannot_be_removed_ends_no_service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model, the parts of one that is on its way, and a file that arrived corrupt."""
    disk = Disk(monkeypatch, tmp_path / "models0")
    refused: list[str] = []

    def fail(number: int, what: str) -> None:
        if what.startswith("remove"):
            refused.append(what)
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    async with origin_server({"/m.gguf": BODY}, hub_hashes=True) as origin, world(tmp_path) as w:
        node = await w.add()
        await node.pull(origin.url("/m.gguf"), whole=True)
        disk.before = fail
        removed = await node.pulls.remove("m", everywhere=False)
        assert removed.freed_bytes == 0
        assert node.weights.shelf.files() == []
        origin.corrupt_at = len(BODY) // 2
        with pytest.raises(MeshError, match="cannot be used") as caught:
            await node.pull(origin.url("/m.gguf"), whole=True)
        assert caught.value.code is ErrorCode.STORAGE_FAILED
        origin.corrupt_at, origin.pause_s = None, 0.01
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stopped_pull, node, origin.url("/m.gguf"))
            sent = origin.sent
            while origin.sent < sent + len(BODY) // 2:  # noqa: ASYNC110 -- the server's own counter
                await trio.sleep(0.005)
            await node.pulls.remove("m", everywhere=False)
        assert {"remove m.gguf", "remove m.gguf.part"} <= set(refused)
        disk.before, origin.pause_s = lambda number, what: None, 0
        await node.pull(origin.url("/m.gguf"), whole=True)
        assert (await node.stage(node.weights.find("m"), 0, 2)).read_bytes() == BODY


async def stopped_pull(node: Member, ref: str) -> None:
    with pytest.raises(MeshError, match="stopped"):
        await node.pull(ref, whole=True)


# ---- 35: the power is cut


@pytest.mark.parametrize(
    ("moved", "sized"),
    [(False, False), (True, False), (True, True)],
    ids=["renames lost", "renames without their bytes", "zeros instead of bytes"],
)
async def test_case_35_after_a_power_cut_at_any_change_nothing_acknowledged_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moved: bool, sized: bool
) -> None:
    first = tmp_path / "first"
    first.mkdir()
    images: list[tuple[dict[Path, Kept], bool]] = []
    acknowledged = False
    with monkeypatch.context() as patch:
        disk = Disk(patch, first / "models0")

        def keep(number: int, what: str) -> None:
            images.append((disk.after_a_cut(moved=moved, sized=sized), acknowledged))
            copy_database(first, tmp_path / f"cut{len(images) - 1}")

        disk.before = keep
        async with origin_server({"/m.gguf": BODY}) as origin:
            async with world(first) as w:
                node = await w.add()
                await node.pull(origin.url("/m.gguf"), whole=True)
                acknowledged = True
                keep(0, "the end")
                rows = dict(w.board.rows)
            disk.before = lambda number, what: None
            for number in sorted({*range(0, len(images), 3), len(images) - 2, len(images) - 1}):
                files, told = images[number]
                # At the same place: the database knows where its files were.
                lay_out(files, first / "models0")
                put_back(tmp_path / f"cut{number}", first)
                origin.sent = 0
                async with world(first) as w:
                    w.board.rows = dict(rows)
                    node = await w.add()
                    for row in node.weights.shelf.files():
                        assert Path(row.path).name == "m.gguf"
                    await node.pull(origin.url("/m.gguf"), whole=True)
                    path = await node.stage(node.weights.find("m"), 0, 2)
                    assert path.read_bytes() == BODY
                    if told:
                        assert origin.sent < 100_000, "it was acknowledged, and had to be fetched again"
    assert len(images) > 20


def copy_database(folder: Path, target: Path) -> None:
    target.mkdir()
    for path in folder.glob("0.db*"):
        shutil.copy(path, target / path.name)


def put_back(source: Path, folder: Path) -> None:
    for path in folder.glob("0.db*"):
        path.unlink()
    for path in source.glob("0.db*"):
        shutil.copy(path, folder / path.name)
