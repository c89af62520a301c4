"""What each setting is called, means and accepts, read from the tree; the text of docs/settings.md is made here."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from inspect import cleandoc
from typing import Any, get_type_hints

import msgspec

from meshnode.settings.tree import Settings

ENVIRONMENT_PREFIX = "MESHNODE_"
CONFIG_VARIABLE = "MESHNODE_CONFIG"
TOKEN_VARIABLE = "MESHNODE_TOKEN"
"""Names the TOML file to read; not a setting, since it decides where settings come from."""

_INTRODUCTION = """\
# Settings

Every setting has a default: an agent needs no configuration at all. A value is taken from, the later winning,

1. the default below;
2. the TOML file: `~/.config/meshnode/config.toml` on Linux (the usual place of the operating system elsewhere,
   `/etc/meshnode/config.toml` for a system service), or the file named by `--config` or `MESHNODE_CONFIG`;
3. the environment variable named below; a list is written with commas;
4. the command line's flag, where there is one.

A name that does not exist is an error, in the file and in the environment: the message says which known name is
nearest. `meshnode config` prints the values in force and where each one comes from.

```toml
[node]
name = "Big machine under the desk"

[api]
port = 4892
```
"""


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting. `kind` says in words what it accepts; `unit` is empty where there is none."""

    key: str
    section: str
    kind: str
    unit: str
    default: Any
    description: str
    type: Any
    secret: bool

    @property
    def variable(self) -> str:
        """The environment variable: api.port is MESHNODE_API_PORT."""
        return ENVIRONMENT_PREFIX + self.key.upper().replace(".", "_")


@cache
def catalogue() -> tuple[Setting, ...]:
    """Every setting, in the order of the tree."""
    return tuple(_settings())


def render_markdown() -> str:
    """The text of docs/settings.md."""
    parts = [_INTRODUCTION]
    for section in msgspec.structs.fields(Settings):
        parts.append(f"\n## {section.name}\n\n{cleandoc(section.type.__doc__ or '')}\n\n")
        parts.append("| setting | default | accepts | meaning |\n|---|---|---|---|\n")
        for setting in catalogue():
            if setting.section == section.name:
                unit = f" ({setting.unit})" if setting.unit else ""
                parts.append(
                    f"| `{setting.key}`<br>`{setting.variable}` | {_shown(setting.default)} | {setting.kind}{unit} "
                    f"| {setting.description} |\n"
                )
    return "".join(parts)


def _settings() -> Iterator[Setting]:
    for section in msgspec.structs.fields(Settings):
        hints = get_type_hints(section.type, include_extras=True)
        for field in msgspec.structs.fields(section.type):
            info = msgspec.inspect.type_info(hints[field.name])
            assert isinstance(info, msgspec.inspect.Metadata)
            schema, extra = info.extra_json_schema or {}, info.extra or {}
            yield Setting(
                key=f"{section.name}.{field.name}",
                section=section.name,
                kind=_kind(info.type),
                unit=str(extra.get("unit", "")),
                default=field.default,
                description=str(schema.get("description", "")),
                type=hints[field.name],
                secret=bool(extra.get("secret", False)),
            )


def _kind(info: msgspec.inspect.Type) -> str:
    """What a type accepts, in words."""
    match info:
        case msgspec.inspect.Metadata():
            return _kind(info.type)
        case msgspec.inspect.BoolType():
            return "true or false"
        case msgspec.inspect.IntType():
            return "a whole number" + _bounds(info)
        case msgspec.inspect.FloatType():
            return "a number" + _bounds(info)
        case msgspec.inspect.StrType(pattern=pattern, max_length=longest):
            shape = " without spaces" if pattern == r"^\S+$" else " like https://host" if pattern else ""
            return f"text{shape}" + (f" of at most {longest} characters" if longest else "")
        case msgspec.inspect.LiteralType(values=values):
            return " or ".join(f"`{value}`" for value in values)
        case msgspec.inspect.VarTupleType(item_type=item):
            return f"a list of {_kind(item)}"
        case msgspec.inspect.UnionType(types=types):
            (kind,) = (_kind(one) for one in types if not isinstance(one, msgspec.inspect.NoneType))
            return kind
        case _:
            raise TypeError(f"no words for settings of type {info!r}")


def _bounds(info: msgspec.inspect.IntType | msgspec.inspect.FloatType) -> str:
    bounds = []
    if info.ge is not None:
        bounds.append(f"from {info.ge:g}" if isinstance(info.ge, float) else f"from {info.ge}")
    if info.gt is not None:
        bounds.append(f"above {info.gt:g}")
    if info.le is not None:
        bounds.append(f"to {info.le}")
    return "".join(f" {bound}" for bound in bounds)


def _shown(value: object) -> str:
    match value:
        case None:
            return "by the profile"
        case bool():
            return f"`{str(value).lower()}`"
        case tuple():
            return f"`[{', '.join(repr(item) for item in value)}]`"
        case str():
            return f'`"{value}"`'
        case _:
            return f"`{value}`"
