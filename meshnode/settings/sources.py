"""Where values come from: each source yields assignments that remember their origin. Validation is `resolve`'s part."""

import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import platformdirs

from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.settings.catalogue import CONFIG_VARIABLE, ENVIRONMENT_PREFIX, TOKEN_VARIABLE

CONFIG_BYTES_MAX: Final = 1024 * 1024
CONFIG_NAME: Final = "config.toml"
SYSTEM_CONFIG: Final = Path("/etc/meshnode") / CONFIG_NAME


@dataclass(frozen=True, slots=True)
class Assignment:
    """One value for one name. `key` is dotted for files and flags, a variable's name for the environment.

    `origin` says to people where it stands; `text` is true where the value is text that stands for another type.
    """

    key: str
    value: Any
    origin: str
    text: bool


def default_config_path(*, system_service: bool = False) -> Path:
    """Where the settings file is looked for when none is named."""
    return SYSTEM_CONFIG if system_service else platformdirs.user_config_path("meshnode") / CONFIG_NAME


def read_file(config: Path | None, environ: Mapping[str, str], *, system_service: bool) -> list[Assignment]:
    """The assignments of the settings file. A file that was named must exist; the default one need not.

    Raises MeshError(BAD_SETTING) when it cannot be read or is not TOML.
    """
    named = config or (Path(environ[CONFIG_VARIABLE]) if environ.get(CONFIG_VARIABLE) else None)
    path = named or default_config_path(system_service=system_service)
    try:
        with path.open("rb") as file:
            content = file.read(CONFIG_BYTES_MAX + 1)
    except FileNotFoundError as error:
        if named is None:
            return []
        raise _unreadable(path, "there is no such file") from error
    except OSError as error:
        raise _unreadable(path, error.strerror or str(error)) from error
    if len(content) > CONFIG_BYTES_MAX:
        raise _unreadable(path, f"it is larger than {CONFIG_BYTES_MAX} bytes")
    try:
        text = content.decode("utf-8-sig")
        tree = tomllib.loads(text)
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise _unreadable(path, f"it is not valid TOML: {error}") from error
    return list(_from_tree(tree, text, path))


def from_environment(environ: Mapping[str, str]) -> list[Assignment]:
    """Every variable that begins with MESHNODE_, except those that name the settings file and hold the API's token."""
    return [
        Assignment(name, value, f"environment variable {name}", text=True)
        for name, value in sorted(environ.items())
        if name.startswith(ENVIRONMENT_PREFIX) and name not in (CONFIG_VARIABLE, TOKEN_VARIABLE)
    ]


def from_flags(flags: Mapping[str, Any]) -> list[Assignment]:
    """The command line's values by dotted key; None means that the flag was not given."""
    return [
        Assignment(key, list(value) if isinstance(value, tuple) else value, "command line", text=isinstance(value, str))
        for key, value in flags.items()
        if value is not None
    ]


def _from_tree(tree: Mapping[str, Any], text: str, path: Path) -> Iterator[Assignment]:
    for section, content in tree.items():
        if not isinstance(content, dict):
            yield Assignment(section, content, _origin(path, text, section), text=False)
            continue
        for name, value in content.items():
            key = f"{section}.{name}"
            yield Assignment(key, value, _origin(path, text, key), text=False)


def _origin(path: Path, text: str, key: str) -> str:
    line = _line_of(text, key)
    return f"{path}" if line is None else f"{path}, line {line}"


def _line_of(text: str, key: str) -> int | None:
    """The line on which `key` is set. tomllib does not tell; this finds the usual ways of writing it."""
    table = ""
    for number, line in enumerate(text.splitlines(), 1):
        if match := re.match(r"\s*\[\s*([^\[\]]+?)\s*\]", line):
            table = _bare(match[1]) + "."
            if table == f"{key}.":
                return number
        elif (match := re.match(r"\s*([\w\-\"'. ]+?)\s*=", line)) and table + _bare(match[1]) == key:
            return number
    return None


def _bare(name: str) -> str:
    return ".".join(part.strip().strip("\"'") for part in name.split("."))


def _unreadable(path: Path, why: str) -> MeshError:
    return MeshError(
        ErrorCode.BAD_SETTING,
        f"The settings file {path} cannot be used: {why}. Correct it, or name another one with --config.",
        detail={"path": str(path)},
    )
