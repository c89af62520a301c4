"""Log records: what they look like, where they go, what is cut out of them, and that a failing sink is survived."""

import errno
import io
import json
import logging
import logging.handlers
import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from meshnode.kernel.logs import LOG_CONTEXT, Logs, LogSettings, SecretSet, open_logs, printable
from meshnode.kernel.redaction import known_secrets_max, printable_json

CANARY = "Zx9-canary-5f2c8b71"


@pytest.fixture
def secrets() -> SecretSet:
    known = SecretSet()
    known.hide(CANARY)
    return known


@pytest.fixture
def logs(data_dir: Path, secrets: SecretSet) -> Iterator[Logs]:
    with open_logs(LogSettings(), data_dir=data_dir, secrets=secrets, stream=io.StringIO()) as opened:
        yield opened


def records(data_dir: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (data_dir / "logs" / "agent.log").read_text().splitlines()]


def text_of(logs: Logs) -> str:
    stream = logs._sink._stream
    assert isinstance(stream, io.StringIO)
    return stream.getvalue()


def test_a_record_goes_to_both_places(logs: Logs, data_dir: Path) -> None:
    logs.logger("cluster").info("peer joined", node="abc", rtt_s=0.25, name="my laptop")
    assert text_of(logs).split(" ", 1)[1] == 'info    cluster    peer joined node=abc rtt_s=0.25 name="my laptop"\n'
    [record] = records(data_dir)
    assert record | {"time": ""} == {
        "time": "",
        "level": "info",
        "logger": "cluster",
        "event": "peer joined",
        "node": "abc",
        "rtt_s": 0.25,
        "name": "my laptop",
    }
    assert str(record["time"]).endswith("Z")


def test_levels(data_dir: Path, secrets: SecretSet) -> None:
    stream = io.StringIO()
    with open_logs(LogSettings(level="warning"), data_dir=None, secrets=secrets, stream=stream) as logs:
        logs.logger("x").info("quiet")
        logs.logger("x").warning("loud")
    assert "quiet" not in stream.getvalue()
    assert "loud" in stream.getvalue()


def test_libraries_use_the_same_pipeline(logs: Logs, data_dir: Path) -> None:
    logging.getLogger("trio.something").warning("a library says %s\nnext", CANARY)
    [record] = records(data_dir)
    assert record["event"] == "a library says [redacted]\nnext"
    assert "a library says [redacted]\\nnext" in text_of(logs)


def test_closing_takes_the_root_handler_away(data_dir: Path, secrets: SecretSet) -> None:
    before = list(logging.getLogger().handlers)
    with open_logs(LogSettings(), data_dir=data_dir, secrets=secrets, stream=io.StringIO()):
        assert len(logging.getLogger().handlers) == len(before) + 1
    assert logging.getLogger().handlers == before


def test_the_context_is_in_every_record(logs: Logs, data_dir: Path) -> None:
    restore = LOG_CONTEXT.set({"request_id": "r1"})
    logs.logger("x").info("inside")
    LOG_CONTEXT.reset(restore)
    logs.logger("x").info("outside")
    assert [record.get("request_id") for record in records(data_dir)] == ["r1", None]


@pytest.mark.parametrize(
    "value",
    [
        CANARY,
        {"deep": [{"er": CANARY}]},
        {"token": "anything at all"},
        [{"password": "anything at all"}],
        f"http://10.0.0.1:4894/join/abc#{CANARY[:4]}anything at all".replace(" ", ""),
        "Authorization: Bearer anythingatall",
        "mnt_anythingatall0123456789",
        "meshnode_session_4892=anythingatall; Path=/",
        "-----BEGIN PRIVATE KEY-----\nanythingatall\n-----END PRIVATE KEY-----",
        "-----BEGIN EC PRIVATE KEY-----\nanythingatall cut off",
        'api_key="anything at all"',
        '{"secret": "anything at all"}',
        ValueError(f"an object with {CANARY} in it"),
        b"bytes with " + CANARY.encode(),
    ],
    ids=str,
)
def test_secrets_never_reach_either_place(logs: Logs, data_dir: Path, value: object) -> None:
    """Case 28: planted canaries, zero hits, in fields, messages, nested values and tracebacks."""
    logs.logger("x").info(f"event {value}", field=value)
    try:
        raise RuntimeError(f"in a traceback: {value}")
    except RuntimeError:
        logs.logger("x").exception("failed", token=value)
    everything = text_of(logs) + (data_dir / "logs" / "agent.log").read_text()
    assert "event" in everything
    assert CANARY not in everything
    assert "anything" not in everything


def test_without_redaction_the_canary_shows(logs: Logs, data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above can fail: with the defence taken away, the canary is in the log."""
    monkeypatch.setattr(SecretSet, "redact", lambda self, text: text)
    logs.logger("x").info(f"event {CANARY}")
    assert CANARY in text_of(logs)


def test_ordinary_words_stay(logs: Logs) -> None:
    logs.logger("x").info("the token was used: ask for a new one", path="/join/abc", tokens_per_s=12)
    assert "the token was used: ask for a new one path=/join/abc tokens_per_s=12" in text_of(logs)


def test_the_set_of_known_secrets_is_bounded() -> None:
    known = SecretSet()
    for number in range(known_secrets_max + 1):
        known.hide(f"secret-number-{number:06}")
    assert known.redact("secret-number-000000") == "secret-number-000000"
    assert known.redact(f"secret-number-{known_secrets_max:06}") == "[redacted]"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain ünïcode 🙂", "plain ünïcode 🙂"),
        ("a\r\nb\tc", "a\\r\\nb\\tc"),
        ("\x1b[31mred\x1b[0m", "\\x1b[31mred\\x1b[0m"),
        ("\x00\x7f\x9b", "\\x00\\x7f\\x9b"),
        ("\u202egnp.exe", "\\u202egnp.exe"),
        ("a\u2028b\u2029", "a\\u2028b\\u2029"),
        ("zero\u200bwidth\ufeff", "zero\\u200bwidth\\ufeff"),
        ("\ud800", "\\ud800"),
    ],
)
def test_printable(text: str, shown: str) -> None:
    assert printable(text) == shown
    assert json.loads(printable_json(json.dumps(text, ensure_ascii=False))) == text


def test_an_exception_cannot_forge_a_record(logs: Logs) -> None:
    try:
        raise RuntimeError("first\n2026-01-01T00:00:00.000Z error   cluster    forged")
    except RuntimeError:
        logs.logger("x").exception("failed")
    forged = [line for line in text_of(logs).splitlines() if "forged" in line]
    assert forged
    assert all(line.startswith("    | ") for line in forged)


def test_the_file_is_for_its_owner_and_rotates(data_dir: Path, secrets: SecretSet) -> None:
    settings = LogSettings(stderr=False, file_bytes_max=2000, files_kept=2)
    with open_logs(settings, data_dir=data_dir, secrets=secrets) as logs:
        for number in range(100):
            logs.logger("x").info("a record of some length", number=number)
    files = sorted((data_dir / "logs").iterdir())
    assert [file.name for file in files] == ["agent.log", "agent.log.1", "agent.log.2"]
    assert all(file.stat().st_size < 2500 for file in files)
    assert all(stat.S_IMODE(file.stat().st_mode) == 0o600 for file in files)
    assert stat.S_IMODE((data_dir / "logs").stat().st_mode) == 0o700


class _FullDisk(io.StringIO):
    """A stream on which every write fails as on a full disk."""

    def write(self, _text: str) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_closed_terminal_and_a_full_disk_are_survived(data_dir: Path, secrets: SecretSet) -> None:
    with open_logs(LogSettings(), data_dir=data_dir, secrets=secrets, stream=_FullDisk()) as logs:
        file = logs._file
        assert isinstance(file, logging.handlers.RotatingFileHandler)
        real = file.setStream(_FullDisk())
        logs.logger("x").info("nowhere to go")
        assert logs.lost_records == 1
        file.setStream(real)
        logs.logger("x").info("room again")
    assert [record["event"] for record in records(data_dir)] == ["room again"]


def test_a_very_long_record_is_cut(logs: Logs, data_dir: Path) -> None:
    logs.logger("x").info("long", text="x" * 1_000_000)
    [record] = records(data_dir)
    assert len(str(record["text"])) < 20_000


def test_rich_is_not_loaded() -> None:
    """4 MB of an idle agent's memory: a fresh interpreter opens logs without it."""
    import subprocess

    code = (
        "import sys, pathlib, tempfile\n"
        "from meshnode.kernel.logs import *\n"
        "open_logs(LogSettings(), data_dir=None, secrets=SecretSet()).logger('x').info('x')\n"
        "sys.exit('rich' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
