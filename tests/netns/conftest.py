"""What the tests with several hosts share: whether they can run at all, hosts that always go away, and the figures.

Times that were measured are printed at the end, and written as JSON to the file that MESHNODE_NETNS_FIGURES names.
With MESHNODE_NETNS_KEEP=1 the agents' folders stay in the temporary folder, logs included.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.support.agents import Mesh
from tests.support.netns import Lab, why_not

Figures = dict[str, float]
Place = tuple[Lab, Mesh]

FIGURES_VARIABLE = "MESHNODE_NETNS_FIGURES"
KEEP_VARIABLE = "MESHNODE_NETNS_KEEP"


@pytest.fixture(scope="session")
def several_hosts() -> None:
    """Skips where one machine cannot be several."""
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture(scope="session")
def figures() -> Iterator[Figures]:
    """Name of a figure to seconds; see the module."""
    found: Figures = {}
    yield found
    for name, value in found.items():
        print(f"\n  {name}: {value:.2f} s", end="")
    target = os.environ.get(FIGURES_VARIABLE)
    if target:
        Path(target).write_text(json.dumps(found, indent=2), encoding="utf-8")


@contextmanager
def place(title: str) -> Iterator[Place]:
    """A switch without hosts yet and a mesh without agents; afterwards no process and no namespace is left."""
    folder = Path(tempfile.mkdtemp(prefix="mn-"))
    with ExitStack() as stack:
        if os.environ.get(KEEP_VARIABLE):
            print(f"\n{title}: {folder}")
        else:
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
        lab = stack.enter_context(Lab(title))
        mesh = Mesh(folder)
        stack.callback(mesh.close)
        yield lab, mesh


@pytest.fixture
def make_place(several_hosts: None) -> Iterator[Callable[[str], Place]]:
    """Makes places; all of them go with the test."""
    with ExitStack() as stack:
        yield lambda title: stack.enter_context(place(title))
