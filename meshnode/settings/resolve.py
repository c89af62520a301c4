"""Which value wins, whether it is valid, and where it came from.

Its job: merge the sources in order, check every value against the tree, and report all mistakes at once, each with its
key, value, what was expected and the place it was written. It leaves acting on the values to those who take `Settings`.
"""

import difflib
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec

from meshnode.kernel.errors import ErrorCode, MeshError
from meshnode.settings.catalogue import ENVIRONMENT_PREFIX, Setting, catalogue
from meshnode.settings.sources import Assignment, from_environment, from_flags, read_file
from meshnode.settings.tree import Settings

DEFAULT_ORIGIN: Final = "default"
_VALUE_CHARS_SHOWN: Final = 80
_NEAR: Final = 0.5
_OF_MESH: Final = "mesh."
_OF_MESH_VARIABLE: Final = ENVIRONMENT_PREFIX + "MESH_"


@dataclass(frozen=True, slots=True)
class SettingView:
    """One line of `meshnode config`: the value in force and where it comes from."""

    key: str
    value: Any
    origin: str
    default: Any
    unit: str
    variable: str
    description: str


@dataclass(frozen=True, slots=True)
class ResolvedSettings:
    """The settings in force, and for each key that is not at its default, where its value was written."""

    settings: Settings
    origins: Mapping[str, str]

    def show(self) -> list[SettingView]:
        """Every setting with its value and origin, in the order of the documentation."""
        return [
            SettingView(
                key=setting.key,
                value=_shown(setting, _value_of(self.settings, setting.key)),
                origin=self.origins.get(setting.key, DEFAULT_ORIGIN),
                default=setting.default,
                unit=setting.unit,
                variable=setting.variable,
                description=setting.description,
            )
            for setting in catalogue()
        ]


def load_settings(
    *,
    config: Path | None = None,
    environ: Mapping[str, str] = os.environ,
    flags: Mapping[str, Any] | None = None,
    system_service: bool = False,
) -> ResolvedSettings:
    """Read the settings file, then the environment, then `flags` (dotted key to value, None for not given).

    `config` names the file; without it MESHNODE_CONFIG or the usual place is used. Raises MeshError(BAD_SETTING) that
    lists every mistake found; nothing is changed anywhere.
    """
    by_key = {setting.key: setting for setting in catalogue()}
    by_variable = {setting.variable: setting for setting in catalogue()}
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    mistakes: list[str] = []
    in_order = [
        *((by_key, assignment) for assignment in read_file(config, environ, system_service=system_service)),
        *((by_variable, assignment) for assignment in from_environment(environ)),
        *((by_key, assignment) for assignment in from_flags(flags or {})),
    ]
    for known, assignment in in_order:
        setting = known.get(assignment.key)
        if setting is None:
            mistakes.append(_unknown(assignment, known))
            continue
        try:
            values[setting.key] = _convert(setting, assignment)
        except (msgspec.ValidationError, ValueError):
            mistakes.append(_invalid(setting, assignment))
        else:
            origins[setting.key] = assignment.origin
    if mistakes:
        raise _bad(mistakes)
    settings = _build(values)
    if clashes := list(_clashes(settings)):
        raise _bad(clashes)
    return ResolvedSettings(settings, origins)


def _convert(setting: Setting, assignment: Assignment) -> Any:
    value = assignment.value
    if assignment.text and isinstance(setting.default, tuple):
        value = [item.strip() for item in value.split(",") if item.strip()]
    converted = msgspec.convert(value, setting.type, strict=not assignment.text)
    if isinstance(converted, float) and not math.isfinite(converted):
        raise ValueError("neither nan nor inf is a setting")
    return converted


def _build(values: Mapping[str, Any]) -> Settings:
    sections: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        section, name = key.split(".", 1)
        sections.setdefault(section, {})[name] = value
    built = {
        field.name: field.type(**sections[field.name])
        for field in msgspec.structs.fields(Settings)
        if field.name in sections
    }
    return Settings(**built)


def _clashes(settings: Settings) -> Iterable[str]:
    """What no single value is wrong about."""
    ports = {
        "api.port": settings.api.port,
        "peers.port": settings.peers.port,
        "onboarding.port": settings.onboarding.port,
    }
    for key, port in ports.items():
        for other, same in ports.items():
            if key < other and port == same != 0:
                yield f"{key} and {other} are both {port}: each needs a port of its own"


def _value_of(settings: Settings, key: str) -> Any:
    section, name = key.split(".", 1)
    return getattr(getattr(settings, section), name)


def _shown(setting: Setting, value: Any) -> Any:
    """A secret is only said to be set."""
    if not setting.secret or not value:
        return value
    return ("(hidden)",) * len(value) if isinstance(value, tuple) else "(hidden)"


def _unknown(assignment: Assignment, known: Mapping[str, Setting]) -> str:
    for prefix in (_OF_MESH, _OF_MESH_VARIABLE):
        if assignment.key.startswith(prefix):
            key = assignment.key[len(prefix) :].lower()
            return (
                f"{assignment.key} ({assignment.origin}) is not a setting of this node: settings of the mesh are the "
                f"same on all members; an admin changes one with 'meshnode config mesh {key} VALUE'"
            )
    sections = {setting.section for setting in catalogue()}
    if assignment.key in sections:
        return f"{assignment.key} ({assignment.origin}) is a section: write [{assignment.key}] and settings below it"
    near = difflib.get_close_matches(assignment.key, known, n=1, cutoff=_NEAR)
    if not near and not assignment.key.startswith(ENVIRONMENT_PREFIX):
        # A setting written under the wrong section is nearest by its own name.
        name = assignment.key.rsplit(".", 1)[-1]
        near = [key for key in known if key.rsplit(".", 1)[-1] == name][:1]
    hint = f"; did you mean {near[0]}?" if near else "; 'meshnode config' lists all settings"
    return f"{assignment.key} ({assignment.origin}) is not a setting{hint}"


def _invalid(setting: Setting, assignment: Assignment) -> str:
    shown = "(hidden)" if setting.secret else repr(assignment.value)
    if len(shown) > _VALUE_CHARS_SHOWN:
        shown = shown[:_VALUE_CHARS_SHOWN] + "..."
    return f"{setting.key} = {shown} ({assignment.origin}): expected {setting.kind}"


def _bad(mistakes: list[str]) -> MeshError:
    if len(mistakes) == 1:
        sentence = mistakes[0] if mistakes[0].endswith("?") else f"{mistakes[0]}."
        return MeshError(ErrorCode.BAD_SETTING, sentence, detail={"mistakes": mistakes})
    listed = "\n".join(f"  {mistake}" for mistake in mistakes)
    return MeshError(
        ErrorCode.BAD_SETTING, f"{len(mistakes)} settings are wrong:\n{listed}", detail={"mistakes": mistakes}
    )
