"""The shape of the agent: which layer and tier imports which, and what each role of a subsystem may know.

Everything is derived from the folders that are there, so that a new subsystem is held to the shape from its first file;
one that is not in TIERS fails until somebody decides where it stands.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from tests.house.purity import PROTOCOL_MAY_NOT_IMPORT
from tests.house.source import Imported, Source

# From the ground up. What shares a line may not import one another.
TIERS: Final[tuple[frozenset[str], ...]] = (
    frozenset({"cluster", "health"}),
    frozenset({"storage", "gpu", "wol", "sdn", "tunnel"}),
    frozenset({"tasks", "memory"}),
    frozenset({"llm"}),
    frozenset({"brain", "agents"}),
    frozenset({"flows", "pipelines", "mcp", "bench"}),
)
SUBSYSTEMS: Final = frozenset().union(*TIERS)
LAYERS: Final[tuple[frozenset[str], ...]] = (
    frozenset({"kernel"}),
    frozenset({"settings"}),
    frozenset({"api"}),
    *TIERS,
    frozenset({"surfaces"}),
    frozenset({"node"}),
    frozenset({"cli"}),
    frozenset({"__main__"}),
)
# The package itself holds its version and nothing that could lead upwards.
GROUND: Final = frozenset({"__init__", "version"})


@dataclass(frozen=True)
class Allowance:
    """What one role may import besides the standard library."""

    own: frozenset[str]
    agent: frozenset[str] = frozenset()  # modules of meshnode outside the subsystems
    libraries: frozenset[str] | None = frozenset({"msgspec"})  # None: any
    protocol: frozenset[str] = frozenset({"protocol.ids"})
    pure: bool = False  # True: nor anything of the standard library that protocol/ may not import


# Errors and ids are words that every role speaks; they come with no behaviour.
_WORDS: Final = frozenset({"meshnode.kernel.errors"})
ROLES: Final[dict[str, Allowance]] = {
    "model": Allowance(own=frozenset({"model"}), agent=_WORDS),
    "core": Allowance(
        own=frozenset({"model", "core"}),
        agent=_WORDS | {"meshnode.kernel.times"},  # how times are spelled; it reads no clock
        protocol=frozenset({"protocol"}),
        pure=True,
    ),
    "store": Allowance(
        own=frozenset({"model", "store"}),
        agent=_WORDS | {"meshnode.kernel.database"},
        libraries=frozenset({"msgspec", "apsw"}),
    ),
    # Model files: read and cut; engines and services both use it, and it knows neither.
    "gguf": Allowance(
        own=frozenset({"model", "gguf"}),
        agent=_WORDS,
        libraries=frozenset({"msgspec", "blake3"}),
        protocol=frozenset({"protocol"}),
    ),
    # Prompts and answers: text in, text out, and the process in which strangers' templates run.
    "templates": Allowance(
        own=frozenset({"model", "templates"}), agent=_WORDS, libraries=frozenset({"msgspec", "jinja2", "trio"})
    ),
    # Processes of their own around foreign code, and how an agent talks to them.
    "engine": Allowance(
        own=frozenset({"model", "engine"}),
        agent=_WORDS,
        libraries=None,
        protocol=frozenset({"protocol"}),
    ),
    # Processes of strangers: what starts them, and stands by them without an agent.
    "execution": Allowance(
        own=frozenset({"model", "execution"}),
        agent=frozenset({"meshnode.kernel"}),
        libraries=frozenset({"trio"}),
        protocol=frozenset({"protocol.placement"}),
    ),
    "service": Allowance(
        own=frozenset({"model", "core", "store", "gguf", "templates", "engine", "execution", "service"}),
        agent=frozenset({"meshnode.kernel"}),
        libraries=None,
        protocol=frozenset({"protocol"}),
    ),
    "peers": Allowance(
        own=frozenset({"model", "service", "peers"}),
        agent=frozenset({"meshnode.kernel"}),
        protocol=frozenset({"protocol"}),
    ),
    "routes": Allowance(own=frozenset({"model", "service", "routes"}), agent=_WORDS | {"meshnode.api"}),
    "setup": Allowance(
        own=frozenset(
            {
                *{"model", "core", "store", "gguf", "templates", "engine", "execution"},
                *{"service", "peers", "routes", "setup"},
            }
        ),
        agent=frozenset({"meshnode.kernel", "meshnode.settings", "meshnode.api"}),
        libraries=None,
        protocol=frozenset({"protocol"}),
    ),
    # Importing one role of a subsystem must not drag in the others.
    "__init__": Allowance(own=frozenset(), libraries=frozenset(), protocol=frozenset()),
}
SURFACE_ROLES: Final = frozenset({"__init__", "routes", "schema", "translate", "errors", "setup"})


def unit_of(parts: tuple[str, ...]) -> str:
    """The part of the agent that `meshnode/<unit>/...` or `meshnode/<unit>.py` belongs to."""
    return parts[1].removesuffix(".py") if len(parts) > 1 else "__init__"


def layer_of(unit: str) -> int | None:
    """How high a unit stands; None when nobody has said."""
    return next((height for height, units in enumerate(LAYERS) if unit in units), None)


def upward_imports(source: Source) -> Iterator[str]:
    """Imports inside meshnode/ that go up, sideways, or into a place whose layer nobody fixed."""
    unit = unit_of(source.path.parts)
    height = -1 if unit in GROUND else layer_of(unit)
    if height is None:
        yield source.at(1, f"meshnode/{unit} has no layer: give it one in tests/house/shape.py and in pyproject.toml")
        return
    for imported in source.imports:
        if not imported.within("meshnode"):
            continue
        target = unit_of(tuple(imported.name.split(".")))
        if target == unit or target in GROUND or target.startswith("__version"):
            continue
        target_height = layer_of(target)
        if target_height is None or target_height >= height:
            yield source.at(imported.line, f"{unit} may not import {imported.name}: imports go down only")


def role_of(source: Source) -> str:
    """`service` for both cluster/service.py and cluster/service/members.py."""
    return source.path.parts[2].removesuffix(".py")


def role_breaches(source: Source) -> Iterator[str]:
    """What a subsystem's file is or imports against the table `One shape for every subsystem`."""
    if len(source.path.parts) < 3 or source.path.parts[1] not in SUBSYSTEMS:
        return
    subsystem, role = source.path.parts[1], role_of(source)
    allowance = ROLES.get(role)
    if allowance is None:
        roles = ", ".join(sorted(ROLES))
        yield source.at(
            1, f"{role} is no role of a subsystem ({roles}); a role that grows becomes a folder of its name"
        )
        return
    for imported in source.imports:
        if not _role_may_import(subsystem, allowance, imported):
            yield source.at(imported.line, f"the role {role} may not import {imported.name}")


def _role_may_import(subsystem: str, allowance: Allowance, imported: Imported) -> bool:
    if imported.top == "apsw" and allowance is not ROLES["store"]:
        return False  # the store has the only SQL
    if imported.within("protocol"):
        return any(imported.within(module) for module in allowance.protocol)
    if imported.is_stdlib:
        return not (allowance.pure and imported.top in PROTOCOL_MAY_NOT_IMPORT)
    if not imported.within("meshnode"):
        return allowance.libraries is None or imported.top in allowance.libraries
    parts = imported.name.split(".")
    unit = unit_of(tuple(parts))
    if unit == subsystem:
        return len(parts) > 2 and parts[2] in allowance.own
    if unit in SUBSYSTEMS:
        # The consumer states the Protocol it needs; of its neighbour it knows the model alone.
        return bool(allowance.own) and len(parts) > 2 and parts[2] == "model"
    return any(imported.within(module) for module in allowance.agent)


def surface_breaches(source: Source) -> Iterator[str]:
    """A surface translates between a foreign API and our services; it knows nothing else of the agent."""
    parts = source.path.parts
    if len(parts) < 4 or parts[1] != "surfaces":
        return
    role, own = parts[3].removesuffix(".py"), f"meshnode.surfaces.{parts[2]}"
    if role not in SURFACE_ROLES:
        yield source.at(1, f"{role} is no role of a surface ({', '.join(sorted(SURFACE_ROLES))})")
    for imported in source.imports:
        if not imported.within("meshnode") or imported.within(own):
            continue
        allowed = imported.within("meshnode.api") or any(imported.within(word) for word in _WORDS)
        target = imported.name.split(".")
        if len(target) > 2 and target[1] in SUBSYSTEMS and target[2] in ("service", "model"):
            allowed = True
        if not allowed or (role == "translate" and imported.within("meshnode.api")):
            yield source.at(imported.line, f"a surface's {role} may not import {imported.name}")
