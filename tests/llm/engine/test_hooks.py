"""A llama.cpp that lacks one of the ways to a layer's hidden states: the other is taken, or the version is named.

What lacks is taken away in a process of its own; all else is the installed one.
"""

import json
import subprocess
import sys

from meshnode.llm.engine.spec import StageSpec
from tests.house.source import ROOT

RUN = """
import json, sys
import msgspec
from meshnode.llm.engine import computing
from meshnode.llm.engine.library import Log
from meshnode.llm.engine.spec import StageSpec
from protocol.sharding.steps import Run
lacks = json.loads(sys.argv[1])
if "layer_inp" in lacks:
    computing.exported = lambda what: None
if "cb_eval" in lacks:
    computing.Model._see_node = lambda self, tensor, ask, _: not ask
try:
    model = computing.Model(msgspec.json.decode(sys.argv[2], type=StageSpec), Log(), lambda share: None)
except computing.CannotLoad as error:
    print(json.dumps({"error": str(error), "code": error.code}))
else:
    model.compute([Run(0, 20, 0, 0)], bytes(80))
    print(json.dumps({"hook": model.hook, "states": model.hidden(20).tobytes().hex()}))
"""


def loaded(spec: StageSpec, file: tuple[str, int], *lacks: str) -> dict:
    import msgspec

    stage = msgspec.structs.replace(spec, path=file[0], layers=file[1], stages=2)
    done = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps(lacks), msgspec.json.encode(stage).decode()],
        cwd=ROOT, capture_output=True, text=True, check=True, timeout=100,
    )  # fmt: skip
    return json.loads(done.stdout)


def test_without_the_layers_input_the_callback_gives_the_same(cut, spec: StageSpec) -> None:
    file = cut(2)[0]
    best, other = loaded(spec, file), loaded(spec, file, "layer_inp")
    assert (best["hook"], other["hook"]) == ("layer_inp", "cb_eval")
    assert best["states"] == other["states"]


def test_without_either_the_version_is_named(cut, spec: StageSpec) -> None:
    from importlib.metadata import version

    told = loaded(spec, cut(2)[0], "layer_inp", "cb_eval")
    assert told["code"] == "uncut"
    words = told["error"]
    assert f"llama-cpp-python {version('llama-cpp-python')}" in words
    assert "can only run whole models" in words
