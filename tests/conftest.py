"""What every test shares: Hypothesis profiles, the two passes of scripts/test, and a data folder with a short path.

Fakes live in tests/support; this file holds only what pytest itself must know.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

# Deadlines measure the machine, not the code: a loaded machine would fail tests that are right.
hypothesis.settings.register_profile("ci", deadline=None, print_blob=True)
hypothesis.settings.register_profile("thorough", parent=hypothesis.settings.get_profile("ci"), max_examples=2_000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_addoption(parser: pytest.Parser) -> None:
    """The two passes of scripts/test. They are options and no `-m` expression, so that `-m` stays free for people."""
    group = parser.getgroup("meshnode")
    group.addoption("--only-shared", action="store_true", help="leave out the tests marked serial")
    group.addoption("--only-serial", action="store_true", help="run only the tests marked serial")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keeps the tests of the chosen pass and reports the others as deselected."""
    only_shared, only_serial = config.getoption("--only-shared"), config.getoption("--only-serial")
    if not only_shared and not only_serial:
        return
    kept: list[pytest.Item] = []
    left_out: list[pytest.Item] = []
    for item in items:
        is_serial = item.get_closest_marker("serial") is not None
        (kept if is_serial == bool(only_serial) else left_out).append(item)
    config.hook.pytest_deselected(items=left_out)
    items[:] = kept


@pytest.fixture
def data_dir() -> Iterator[Path]:
    """An empty folder for one agent's data, gone after the test.

    Its path is short, because a Unix socket's path may have at most 104 bytes on some systems and pytest's own
    tmp_path easily has more.
    """
    parent = "/tmp" if os.path.isdir("/tmp") else None
    folder = Path(tempfile.mkdtemp(prefix="mn-", dir=parent))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)
