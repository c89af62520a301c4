"""Slices compute what the model does: logit difference 0.0 in llama.cpp, for every architecture that may be cut."""

import importlib.util

import pytest

from meshnode.llm.gguf.rules import RULES
from tests.llm.gguf.certification import difference, runs
from tests.support.tiny_models import MODELS


def test_every_architecture_that_may_be_cut_has_a_model() -> None:
    assert set(MODELS) == set(RULES)


@pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None,
    reason="llama.cpp is not installed; to install it: .venv/bin/pip install -e '.[llm]'",
)
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("architecture", "kind", "hook"), runs())
def test_stages_are_exact(architecture: str, kind: str, hook: str) -> None:
    assert difference(architecture, kind, hook) == 0.0
