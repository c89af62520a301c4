"""The project's own files: what is imported is declared, what is locked is in range, and no place is named."""

import re
import sys
import tomllib
from collections.abc import Collection
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.house.source import PACKAGES, ROOT, Source, expect_none, sample, sources


def _declared() -> dict[str, Requirement]:
    """Every requirement for running meshnode, with or without extras, by canonical name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [line for extra, lines in project["optional-dependencies"].items() if extra != "dev" for line in lines]
    requirements = map(Requirement, [*project["dependencies"], *extras])
    return {canonicalize_name(requirement.name): requirement for requirement in requirements}


def undeclared_imports(source: Source, declared: Collection[str], owners: dict[str, list[str]]) -> list[str]:
    """Imports of libraries that a plain install of meshnode might lack."""
    found = []
    for imported in source.imports:
        if imported.is_stdlib or imported.top in PACKAGES or imported.top == "__future__":
            continue
        dists = {canonicalize_name(name) for name in owners.get(imported.top, [])}
        if dists.isdisjoint(declared):
            found.append(source.at(imported.line, f"{imported.top} is not in pyproject.toml"))
    return found


def test_what_is_imported_is_declared() -> None:
    owners = {name: list(dists) for name, dists in metadata.packages_distributions().items()}
    # Extras that need a compiler are not in the development environment, so that nobody can look up who owns them.
    owners |= {"llama_cpp": ["llama-cpp-python"], "pywhispercpp": ["pywhispercpp"], "numpy": ["numpy"]}
    declared = _declared()
    expect_none(line for source in sources(*PACKAGES) for line in undeclared_imports(source, declared, owners))


def test_what_a_plain_install_brings_is_imported() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    tops = {imported.top for source in sources(*PACKAGES) for imported in source.imports}
    owners = metadata.packages_distributions()
    used = {canonicalize_name(name) for top in tops for name in owners.get(top, [])}
    # Hypercorn's own, held to its major: parts of the server are overridden.
    expect_none({canonicalize_name(Requirement(line).name) for line in project["dependencies"]} - used - {"wsproto"})


def test_an_undeclared_import_is_found() -> None:
    source = sample("meshnode/node.py", "import requests\nimport trio\nimport json\n")
    assert len(undeclared_imports(source, {"trio"}, {"trio": ["trio"], "requests": ["requests"]})) == 1


@pytest.mark.parametrize("name", sorted(_declared()))
def test_every_requirement_is_bounded_above(name: str) -> None:
    bounded = any(bound.operator in ("<", "<=", "==", "~=") for bound in _declared()[name].specifier)
    assert bounded, f"{name} has no upper bound: a new major would reach every user"


def test_the_lock_file_names_exact_versions_and_no_place() -> None:
    lines = [line for line in (ROOT / "requirements-dev.lock").read_text().splitlines() if line and line[0] != "#"]
    expect_none(line for line in lines if not re.fullmatch(r"[A-Za-z0-9_.-]+==[A-Za-z0-9_.+!-]+", line))


def out_of_range(requirements: list[str], lock: str) -> list[str]:
    """Requirements that the lock file does not name, or names in a version they exclude."""
    pairs = [line.split("==") for line in lock.splitlines() if "==" in line]
    locked = {canonicalize_name(name): version for name, version in pairs}
    found = []
    for requirement in map(Requirement, requirements):
        version = locked.get(canonicalize_name(requirement.name))
        if version is None or version not in requirement.specifier:
            found.append(f"{requirement}: the lock file has {version or 'nothing'}")
    return found


def test_the_lock_file_fits_what_is_required() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    requirements = [*project["dependencies"], *extras["dev"], *extras["gpu"], *extras["llm"]]
    expect_none(out_of_range(requirements, (ROOT / "requirements-dev.lock").read_text()))


def test_a_lock_file_that_does_not_fit_is_found() -> None:
    assert len(out_of_range(["trio>=0.35,<0.36"], "trio==0.36.1\n")) == 1
    assert len(out_of_range(["trio>=0.35,<0.36"], "quart==0.22.0\n")) == 1
    assert out_of_range(["PyNaCl>=1.6,<2"], "pynacl==1.6.2\n") == []


def test_the_scripts_say_what_they_need_in_bash() -> None:
    for name in ("scripts/test", "scripts/check", ".ci/run"):
        script = ROOT / name
        assert script.stat().st_mode & 0o111, f"{name} is not executable"
        assert "set -euo pipefail" in script.read_text()


def test_python_is_new_enough() -> None:
    assert sys.version_info >= (3, 11)


def test_the_licence_is_whole() -> None:
    text = Path(ROOT / "LICENSE").read_text()
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text
