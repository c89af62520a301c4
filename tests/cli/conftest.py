"""What the tests of the command line share: no settings of the machine they run on, a fake agent, and the command."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from meshnode.cli.main import run
from tests.cli.fake_agent import FakeAgent, fake_agent


@pytest.fixture(autouse=True)
def _untouched_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in list(os.environ):
        if name.startswith(("MESHNODE_", "_MESHNODE")) or name in ("NO_COLOR", "SHELL"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))


@pytest.fixture
def agent() -> Iterator[FakeAgent]:
    """A fake agent."""
    with fake_agent() as listening:
        yield listening


@dataclass(frozen=True)
class Done:
    """What a command line came to."""

    code: int
    out: str
    err: str


Command = Callable[..., Done]


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str], agent: FakeAgent) -> Command:
    """Runs `meshnode ...` in this process against the fake agent."""

    def call(*arguments: str) -> Done:
        capfd.readouterr()
        code = run([*arguments, "--api-port", str(agent.port)])
        out, err = capfd.readouterr()
        return Done(code, out, err)

    return call
