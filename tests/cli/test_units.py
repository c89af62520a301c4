"""Sizes, durations and times as people read them."""

import pytest

from meshnode.cli.units import ago_text, duration_text, milliseconds_text, parse_duration_s, size_text, used_text


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (640 * 1024, "640 KiB"),
        (1024**2 - 1, "1.0 MiB"),
        (13 * 1024**3, "13.0 GiB"),
        (2**80, "1073741824 PiB"),
    ],
)
def test_sizes(size_bytes: int, text: str) -> None:
    assert size_text(size_bytes) == text


def test_used_is_in_the_unit_of_the_total() -> None:
    assert used_text(512 * 1024**2, 16 * 1024**3) == "0.5/16.0 GiB"
    assert used_text(165 * 1024**3, 252 * 1024**3) == "165/252 GiB"
    assert used_text(0, 0) == ""


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (-3, "0 s"), (59.4, "59 s"), (60, "1 min"), (61, "1 min 1 s"), (3_600, "1 h"), (11_520, "3 h 12 min"),
     (2 * 86_400 + 5, "2 d"), (86_399.7, "1 d")],
)  # fmt: skip
def test_durations(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


@pytest.mark.parametrize(
    ("stamp", "text"),
    [
        ("2027-01-15T07:59:48Z", "12 s ago"),
        ("2027-01-15T05:47:00Z", "2 h ago"),
        ("2027-01-15T08:00:00.250Z", "now"),
        ("yesterday", "-"),
        ("", "-"),
        (None, "-"),
    ],
)
def test_ago(stamp: str | None, text: str) -> None:
    assert ago_text(stamp, 1_800_000_000.0) == text


def test_milliseconds() -> None:
    assert [milliseconds_text(value) for value in (None, 0.4234, 3.21, 182.6)] == ["-", "0.42 ms", "3.2 ms", "183 ms"]


@pytest.mark.parametrize(
    ("text", "seconds"), [("600", 600), ("90s", 90), ("10m", 600), ("10 min", 600), ("1.5h", 5_400), ("7D", 604_800)]
)
def test_durations_are_read(text: str, seconds: float) -> None:
    assert parse_duration_s(text) == seconds


@pytest.mark.parametrize("text", ["", "m", "-5m", "ten", "5 weeks", "1e3"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="such as 10m"):
        parse_duration_s(text)
