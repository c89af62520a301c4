"""Settings: the order of sources, mistakes that name everything one needs, and documentation that is true."""

from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import msgspec
import pytest
from hypothesis import given

from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.settings import Settings, catalogue, load_settings, node_name, normalise_name, render_markdown
from meshnode.settings.names import NAME_CHARS_MAX

ROOT = Path(__file__).parents[1]


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    return tmp_path / "meshnode" / "config.toml"


def write(config: Path, text: str) -> Path:
    config.parent.mkdir(exist_ok=True)
    config.write_text(text, encoding="utf-8")
    return config


def mistake(environ: dict[str, str] | None = None, flags: dict[str, Any] | None = None, **more: Any) -> str:
    with pytest.raises(MeshError) as caught:
        load_settings(environ=environ or {}, flags=flags, **more)
    assert caught.value.code is ErrorCode.BAD_SETTING
    return caught.value.message


def test_without_any_source_all_is_at_its_default(config: Path) -> None:
    resolved = load_settings(environ={"PATH": "/bin", "HOME": "/"})
    assert resolved.settings == Settings()
    assert (resolved.settings.api.port, resolved.settings.peers.port, resolved.settings.onboarding.port) == (
        4892,
        4893,
        4894,
    )
    assert {view.origin for view in resolved.show()} == {"default"}
    with pytest.raises(AttributeError):
        resolved.settings.api.port = 1


def test_the_later_source_wins_and_show_says_which(config: Path) -> None:
    write(config, '[api]\nport = 1001\nrequire_token = true\nrate_burst = 7\n[node]\nname = "file"\n')
    resolved = load_settings(
        environ={"MESHNODE_API_PORT": "1002", "MESHNODE_API_RATE_BURST": "8"},
        flags={"api.port": 1003, "node.name": None},
    )
    assert resolved.settings.api.port == 1003
    assert resolved.settings.api.rate_burst == 8
    assert resolved.settings.api.require_token is True
    assert resolved.settings.node.name == "file"
    views = {view.key: view for view in resolved.show()}
    assert views["api.port"].origin == "command line"
    assert views["api.rate_burst"].origin == "environment variable MESHNODE_API_RATE_BURST"
    assert views["api.require_token"].origin == f"{config}, line 3"
    assert views["node.name"].origin == f"{config}, line 6"
    assert views["peers.port"].origin == "default"
    assert views["api.port"].default == 4892


def test_the_environment_speaks_every_type(config: Path) -> None:
    resolved = load_settings(
        environ={
            "MESHNODE_API_REQUIRE_TOKEN": "true",
            "MESHNODE_API_ALLOWED_ORIGINS": "http://a.example, https://b.example:8443",
            "MESHNODE_MEMBERSHIP_PROFILE": "wan",
            "MESHNODE_MEMBERSHIP_PROBE_INTERVAL_S": "0.25",
            "MESHNODE_HEARTBEATS_SAMPLE_INTERVAL_S": "5",
            "MESHNODE_NODE_NAME": "12",
            "MESHNODE_PEERS_HOST": "",
        }
    ).settings
    assert resolved.api.require_token is True
    assert resolved.api.allowed_origins == ("http://a.example", "https://b.example:8443")
    assert (resolved.membership.profile, resolved.membership.probe_interval_s) == ("wan", 0.25)
    assert resolved.heartbeats.sample_interval_s == 5.0
    assert resolved.node.name == "12"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[api]\nprot = 1\n", "api.prot (FILE, line 2) is not a setting; did you mean api.port?"),
        (
            "[mesh]\nmembers_may_invite = false\n",
            "mesh.members_may_invite (FILE, line 2) is not a setting of this node: settings of the mesh are the same "
            "on all members; an admin changes one with 'meshnode config mesh members_may_invite VALUE'",
        ),
        ("[ip]\nport = 1\n", "ip.port (FILE, line 2) is not a setting; did you mean api.port?"),
        ("[zzz]\nqqq = 1\n", "zzz.qqq (FILE, line 2) is not a setting; 'meshnode config' lists all settings"),
        ("api = 3\n", "api (FILE, line 1) is a section: write [api] and settings below it"),
        ('[api]\n# x\nport = "4892"\n', "api.port = '4892' (FILE, line 3): expected a whole number from 0 to 65535"),
        ("api.port = 70000\n", "api.port = 70000 (FILE, line 1): expected a whole number from 0 to 65535"),
        ("api = { port = true }\n", "api.port = True (FILE): expected a whole number from 0 to 65535"),
        ("[log]\nlevel = 'loud'\n", "log.level = 'loud' (FILE, line 2): expected `debug` or `error` or `info` or"),
        ("[api]\nheader_deadline_s = nan\n", "api.header_deadline_s = nan (FILE, line 2): expected a number above 0"),
        ("[api]\nrate_per_s = inf\n", "api.rate_per_s = inf (FILE, line 2): expected a number above 0"),
        ("[api]\nallowed_origins = ['*']\n", "api.allowed_origins = ['*'] (FILE, line 2): expected a list of text"),
        ("[membership]\nrelays = 1.5\n", "membership.relays = 1.5 (FILE, line 2): expected a whole number"),
        ("[api\nport = 1\n", "it is not valid TOML: Expected ']'"),
        ("[api]\nport = 5000\n[peers]\nport = 5000\n", "api.port and peers.port are both 5000"),
    ],
)
def test_a_mistake_in_the_file_is_named_with_its_place(config: Path, text: str, expected: str) -> None:
    write(config, text)
    assert expected.replace("FILE", str(config)) in mistake()


def test_mistakes_in_the_environment_and_in_flags_are_named(config: Path) -> None:
    message = mistake({"MESHNODE_API_PROT": "1"})
    assert "MESHNODE_API_PROT" in message
    assert "did you mean MESHNODE_API_PORT?" in message
    expected = "api.port = 'x' (environment variable MESHNODE_API_PORT): expected a whole number from 0 to 65535"
    assert expected in mistake({"MESHNODE_API_PORT": "x"})
    assert "api.port = -1 (command line): expected" in mistake(flags={"api.port": -1})
    assert "did you mean peers.host?" in mistake(flags={"peer.host": "x"})


def test_all_mistakes_are_told_at_once(config: Path) -> None:
    write(config, "[api]\nprot = 1\nport = -4\n")
    message = mistake({"MESHNODE_LOG_LEVEL": "loud"})
    assert message.startswith("3 settings are wrong:\n")
    assert all(text in message for text in ("api.prot", "api.port = -4", "log.level = 'loud'"))


def test_a_long_value_is_cut(config: Path) -> None:
    assert len(mistake({"MESHNODE_API_PORT": "x" * 10_000})) < 300


def test_a_named_file_must_exist_and_be_readable(config: Path, tmp_path: Path) -> None:
    assert "there is no such file" in mistake(config=tmp_path / "absent.toml")
    assert "there is no such file" in mistake({"MESHNODE_CONFIG": str(tmp_path / "absent.toml")})
    assert "Is a directory" in mistake(config=tmp_path)
    (tmp_path / "latin.toml").write_bytes(b"[node]\nname = '\xe9'\n")
    assert "not valid TOML" in mistake(config=tmp_path / "latin.toml")
    (tmp_path / "big.toml").write_bytes(b"#" * 2_000_000)
    assert "larger than" in mistake(config=tmp_path / "big.toml")
    other = tmp_path / "other.toml"
    other.write_bytes(b"\xef\xbb\xbf[api]\r\nport = 99\r\n")
    for resolved in (
        load_settings(config=other, environ={"MESHNODE_CONFIG": "ignored"}),
        load_settings(environ={"MESHNODE_CONFIG": str(other)}),
    ):
        assert resolved.settings.api.port == 99


def test_ports_of_zero_do_not_clash(config: Path) -> None:
    load_settings(environ={}, flags={"api.port": 0, "peers.port": 0, "onboarding.port": 0})


def test_every_setting_is_documented_and_has_a_name_of_its_own() -> None:
    settings = catalogue()
    assert (
        len({setting.variable for setting in settings}) == len({setting.key for setting in settings}) == len(settings)
    )
    for setting in settings:
        assert setting.description.endswith("."), setting.key
        assert setting.key.rsplit("_", 1)[-1] not in ("s", "bytes") or setting.unit, setting.key
    fields = {
        f"{section.name}.{field.name}"
        for section in msgspec.structs.fields(Settings)
        for field in msgspec.structs.fields(section.type)
    }
    assert fields == {setting.key for setting in settings}


def test_every_default_is_valid() -> None:
    for setting in catalogue():
        assert msgspec.convert(setting.default, setting.type) == setting.default


def test_the_document_lists_exactly_the_settings_that_exist() -> None:
    """To renew it: python -m meshnode.settings > docs/settings.md"""
    assert (ROOT / "docs" / "settings.md").read_text(encoding="utf-8") == render_markdown()


# ---- node names -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given_name", "expected"),
    [
        ("workstation", "workstation"),
        ("  Anna's \t\n big   Mac ", "Anna's big Mac"),
        ("rocket \U0001f680 lab", "rocket \U0001f680 lab"),
        ("family \U0001f469\u200d\U0001f469\u200d\U0001f467", "family \U0001f469\u200d\U0001f469\u200d\U0001f467"),
        ("cafe\u0301", "caf\u00e9"),
        ("red\x1b[31m\x07", "red[31m"),
        ("\u202eevil\u2066\ufeff", "evil"),
        ("line\u2028two", "line two"),
        ("bad\udc80", "bad"),
        ("\x00\u200b \u200d", ""),
        ("x" * 100, "x" * 63),
        ("x" * 62 + "e\u0301\u0323" * 3, "x" * 62),
        ("x" * 61 + "\U0001f469\u200d\U0001f467", "x" * 61),
        ("x" * 62 + "\U0001f44d\U0001f3fd", "x" * 62),
    ],
)
def test_names_are_made_safe_to_show(given_name: str, expected: str) -> None:
    assert normalise_name(given_name) == expected


@given(st.text(max_size=200))
def test_a_normalised_name_is_short_clean_and_stays_as_it_is(text: str) -> None:
    name = normalise_name(text)
    assert len(name) <= NAME_CHARS_MAX
    assert normalise_name(name) == name
    assert name == name.strip()
    assert name.encode().decode() == name
    assert all(character.isprintable() or character == "\u200d" or ord(character) > 0x300 for character in name)


def test_the_host_name_stands_in_for_a_missing_name() -> None:
    assert node_name("  ", "büro pc.fritz.box") == "büro pc"
    assert node_name("Küche", "host") == "Küche"
    assert node_name("", "192.168.1.7") == "192.168.1.7"
    assert node_name("\x00", "\x00") == "node"


def test_a_secret_is_shown_to_nobody(tmp_path: Path) -> None:
    environ = {"MESHNODE_LLM_HUB_TOKEN": "hf_verysecret", "MESHNODE_LLM_UPSTREAM_KEYS": "a=sk-secret"}
    shown = repr(load_settings(config=None, environ=environ).show())
    assert "verysecret" not in shown
    assert "sk-secret" not in shown
    with pytest.raises(MeshError) as caught:
        load_settings(config=None, environ={"MESHNODE_LLM_UPSTREAM_KEYS": "a=sk secret"})
    assert "sk secret" not in caught.value.message
