"""Join URLs: what is built is read again, and whatever happened to one on its way is named precisely."""

import re
from contextlib import suppress

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from protocol.ids import Address
from protocol.trust.join_url import (
    ALTERNATES_MAX,
    JoinUrl,
    JoinUrlError,
    build_join_url,
    join_addresses,
    parse_join_url,
    parse_token,
    token_text,
)
from tests.protocol.trust.parts import seed

SECRET = seed("secret")[:16]
PLAIN = JoinUrl("192.168.1.10", 4894, seed("token")[:8], SECRET, seed("pin"))
WIDE = JoinUrl(
    "fe80::1%eth0", 4894, seed("token")[:8], SECRET, seed("pin"), (Address("10.0.0.7", 4894), Address("fd00::7", 999))
)
TEXT = build_join_url(PLAIN)
HEAD, FRAGMENT = TEXT.split("#")
SECRET_TEXT, PIN_TEXT = FRAGMENT.split(".")


@pytest.mark.parametrize("url", [PLAIN, WIDE, JoinUrl("laptop.local", 1, b"\x00" * 8, b"\xff" * 16, bytes(32))])
def test_round_trip(url: JoinUrl) -> None:
    assert parse_join_url(build_join_url(url)) == url


def test_its_shape_is_the_documented_one() -> None:
    assert re.fullmatch(r"http://192\.168\.1\.10:4894/join/[a-z2-7]{16}#[A-Za-z0-9_-]{24}\.[A-Za-z0-9_-]{44}", TEXT)


@given(
    st.binary(min_size=8, max_size=8),
    st.binary(min_size=16, max_size=16),
    st.binary(min_size=32, max_size=32),
    st.lists(st.ip_addresses(), max_size=ALTERNATES_MAX),
    st.integers(1, 65535),
)
def test_any_url_is_read_again(token: bytes, secret: bytes, pin: bytes, hosts: list[object], port: int) -> None:
    assume(all(getattr(host, "ipv4_mapped", None) is None and not getattr(host, "scope_id", None) for host in hosts))
    url = JoinUrl("10.1.2.3", port, token, secret, pin, tuple(Address(str(host), port) for host in hosts))
    assert parse_join_url(build_join_url(url)) == url


def test_what_people_paste_along_is_taken_off() -> None:
    for pasted in (f"  {TEXT}\n", f"'{TEXT}'", f'"{TEXT}"', f"<{TEXT}>", f"`{TEXT}`"):
        assert parse_join_url(pasted) == PLAIN


def test_the_port_may_be_left_out() -> None:
    assert parse_join_url(TEXT.replace(":4894", "")) == PLAIN


BROKEN = [
    ("", "url", "invite"),
    ("x" * 2000, "url", "longer"),
    (TEXT.replace("/join/", "/jo in/"), "url", "blank"),
    (TEXT.replace("http://", ""), "scheme", "http://"),
    (TEXT.replace("http://", "https://"), "scheme", "encrypted"),
    (TEXT.replace("http://", "ftp://"), "scheme", "http://"),
    (TEXT.replace("192.168.1.10", ""), "host", "host"),
    (TEXT.replace("192.168.1.10", "user@host"), "host", "host"),
    (TEXT.replace("192.168.1.10", "[nonsense]"), "host", "IPv6"),
    (TEXT.replace("192.168.1.10:4894", "fe80::1:4894"), "host", "brackets"),
    (TEXT.replace(":4894", ":0"), "port", "65535"),
    (TEXT.replace(":4894", ":70000"), "port", "65535"),
    (TEXT.replace(":4894", ":48x4"), "port", "65535"),
    (TEXT.replace("/join/", "/"), "path", "/join/"),
    ("http://192.168.1.10:4894", "path", "/join/"),
    (f"{HEAD[:-1]}#{FRAGMENT}", "token", "cut off"),
    (f"{HEAD}a#{FRAGMENT}", "token", "16 letters"),
    (f"{HEAD[:-1]}1#{FRAGMENT}", "token", "a to z"),
    (HEAD, "fragment", "quotes"),
    (f"{HEAD}#", "fragment", "quotes"),
    (f"{HEAD}#{SECRET_TEXT[:-3]}", "secret", "cut off"),
    (f"{HEAD}#{SECRET_TEXT}", "pin", "cut off"),
    (f"{HEAD}#{SECRET_TEXT}.", "pin", "cut off"),
    (f"{HEAD}#{SECRET_TEXT}.{PIN_TEXT[:-1]}", "pin", "cut off"),
    (f"{HEAD}#{SECRET_TEXT}.{PIN_TEXT}x", "pin", "added"),
    (f"{HEAD}#x{FRAGMENT}", "secret", "added"),
    (f"{HEAD}#{SECRET_TEXT[:-1]}!.{PIN_TEXT}", "secret", "does not belong"),
    (f"{HEAD}#{FRAGMENT}.", "addresses", "cut off"),
    (f"{HEAD}#{FRAGMENT}.abc.def", "addresses", "one dot too many"),
    (f"{build_join_url(WIDE)[:-2]}", "addresses", ""),
]


@pytest.mark.parametrize(("text", "part", "says"), BROKEN)
def test_what_is_wrong_is_named(text: str, part: str, says: str) -> None:
    with pytest.raises(JoinUrlError) as caught:
        parse_join_url(text)
    assert caught.value.part == part
    assert says in str(caught.value)


@pytest.mark.parametrize("text", [text for text, _, _ in BROKEN])
def test_an_error_never_repeats_the_secret(text: str) -> None:
    with pytest.raises(JoinUrlError) as caught:
        parse_join_url(text)
    assert SECRET_TEXT[4:-4] not in str(caught.value) + repr(caught.value)


def test_a_mistyped_character_is_found_and_its_part_named() -> None:
    start = TEXT.index("/join/") + 6
    secret_start, pin_start = TEXT.index("#") + 1, TEXT.index(".", TEXT.index("#")) + 1
    found = 0
    for position in [*range(start, start + 16), *range(secret_start, secret_start + 24), *range(pin_start, len(TEXT))]:
        wrong = "b" if TEXT[position] != "b" else "c"
        part = "token" if position < secret_start else "secret" if position < pin_start else "pin"
        try:
            parse_join_url(TEXT[:position] + wrong + TEXT[position + 1 :])
        except JoinUrlError as error:
            found += error.part == part
    # The pin's check is one byte: 1 in 256 slips through and is then a pin that fits no root.
    assert found >= 16 + 24 + 44 - 2


@pytest.mark.parametrize("cut", range(1, len(TEXT)))
def test_a_url_cut_anywhere_is_refused(cut: int) -> None:
    with pytest.raises(JoinUrlError):
        parse_join_url(TEXT[:cut])


@given(st.text(max_size=120))
def test_any_text_is_read_or_refused(text: str) -> None:
    for candidate in (text, f"http://{text}", f"{HEAD}#{text}", f"http://h/join/{text}"):
        with suppress(JoinUrlError):
            assert len(parse_join_url(candidate).secret) == 16


def test_a_secret_does_not_show_itself() -> None:
    assert "secret" not in repr(PLAIN)


def test_all_addresses_are_named_once() -> None:
    twice = JoinUrl("10.0.0.7", 4894, WIDE.token_id, SECRET, WIDE.pin, WIDE.alternates)
    assert join_addresses(twice) == [("10.0.0.7", 4894), ("fd00::7", 999)]


def test_a_part_of_the_wrong_size_cannot_be_built() -> None:
    with pytest.raises(ValueError, match="size"):
        build_join_url(JoinUrl("h", 1, b"short", SECRET, seed("pin")))


def test_tokens_are_read_in_any_case() -> None:
    assert parse_token(token_text(PLAIN.token_id).upper()) == PLAIN.token_id
