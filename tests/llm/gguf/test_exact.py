"""Slices compute what the model does: logit difference 0.0 in llama.cpp, for every architecture that may be cut."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from meshnode.llm.gguf.rules import RULES
from tests.house.source import ROOT
from tests.support.tiny_models import MODELS

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("llama_cpp") is None,
        reason="llama.cpp is not installed; to install it: .venv/bin/pip install -e '.[llm]'",
    ),
    pytest.mark.timeout(600),
]


def differences(architecture: str, kind: str, hook: str) -> list[float]:
    """The largest difference of a logit in two, three and four stages."""
    periodic = RULES[architecture].cut_every == 4
    layers, cuts = ("16", ("8", "4,8", "4,8,12")) if periodic else ("8", ("3", "1,6", "2,3,6"))
    run = subprocess.run(
        [sys.executable, "-m", "tests.support.stage_comparison", architecture, kind, layers, hook, *cuts],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    # A model whose logits are all alike would show nothing.
    assert all(0.1 < line["largest"] < 1e3 for line in lines)
    return [line["difference"] for line in lines]


def test_every_architecture_that_may_be_cut_has_a_model() -> None:
    assert set(MODELS) == set(RULES)


@pytest.mark.parametrize("kind", ["F16", "Q4_K"])
@pytest.mark.parametrize("architecture", MODELS)
def test_stages_are_exact_by_callback(architecture: str, kind: str) -> None:
    assert differences(architecture, kind, "callback") == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("kind", ["F16", "Q4_K"])
@pytest.mark.parametrize("architecture", [name for name, rule in RULES.items() if rule.layer_input])
def test_stages_are_exact_by_layer_input(architecture: str, kind: str) -> None:
    assert differences(architecture, kind, "layer_input") == [0.0, 0.0, 0.0]
