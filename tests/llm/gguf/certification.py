"""`scripts/certify`: which architectures may be cut, shown by running them, and the table of docs/models.md from it.

Every architecture with a rule is run whole and in two, three and four stages by tests/support/stage_comparison.py, with
F16 and with Q4_K weights and by every hook that it has.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from typing import Final

from meshnode.llm.gguf.rules import RULES, Rule
from tests.house.source import ROOT

KINDS: Final = ("F16", "Q4_K")
DOCUMENT: Final = ROOT / "docs" / "models.md"
BEGIN: Final = "<!-- the table that scripts/certify --write makes -->"
END: Final = "<!-- end of that table -->"
LIMIT_S: Final = 500

Differences = Mapping[tuple[str, str, str], float]
"""By architecture, type and hook, the largest difference of any logit."""


class NotExact(Exception):  # noqa: N818 -- named after what happened
    """An architecture computes something else when it is cut."""


def hooks(rule: Rule) -> tuple[str, ...]:
    """All that the architecture has."""
    return ("layer_inp", "cb_eval") if rule.layer_input else ("cb_eval",)


def runs() -> list[tuple[str, str, str]]:
    """All that is to be run: architecture, type, hook."""
    return [(name, kind, hook) for name, rule in RULES.items() for kind in KINDS for hook in hooks(rule)]


def difference(architecture: str, kind: str, hook: str) -> float:
    """The largest difference of a logit in two, three and four stages. Raises NotExact when a run breaks."""
    periodic = RULES[architecture].cut_every == 4
    layers, cuts = ("16", ("8", "4,8", "4,8,12")) if periodic else ("8", ("3", "1,6", "2,3,6"))
    run = subprocess.run(
        [sys.executable, "-m", "tests.support.stage_comparison", architecture, kind, layers, hook, *cuts],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=LIMIT_S,
    )
    if run.returncode:
        raise NotExact(f"{architecture}, {kind}, {hook}: the run ended with {run.returncode}: {run.stderr[-2000:]}")
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    # A model whose logits are all alike would show nothing.
    if len(lines) != len(cuts) or not all(0.1 < line["largest"] < 1e3 for line in lines):
        raise NotExact(f"{architecture}, {kind}, {hook}: the run shows nothing: {lines}")
    return max(float(line["difference"]) for line in lines)


def table(found: Differences) -> str:
    """The document's table."""
    lines = [
        "| architecture | cut at | what a slice does about it | hidden states by | F16 | Q4_K |",
        "|---|---|---|---|---|---|",
    ]
    for name, rule in RULES.items():
        hook = "input of the next layer" if rule.layer_input else "callback"
        worst = [max(found[name, kind, each] for each in hooks(rule)) for kind in KINDS]
        lines.append(f"| `{name}` | {_where(rule)} | {_what(rule)} | {hook} | {worst[0]} | {worst[1]} |")
    return "\n".join(lines)


def _where(rule: Rule) -> str:
    said = [f"multiples of {rule.cut_every}"] if rule.cut_every > 1 else []
    said += [f"multiples of the file's `{key}`" for key in rule.cut_keys]
    said += [f"models of up to {rule.layers_max} layers"] if rule.layers_max is not None else []
    said += [f"files that say `{key}`" for key in rule.needs]
    return " and ".join(said) or "anywhere"


def _what(rule: Rule) -> str:
    said = ["the window's pattern is written out for each layer"] if rule.window is not None else []
    said += ["a head of zeros stands where there is none"] if rule.own_output else []
    said += ["`embedding_scale` is 1 after the first stage"] if rule.scaled else []
    said += ["positions are zero after the first stage"] if rule.zeroed else []
    return "; ".join(said) or "-"


def measured(jobs: int) -> Iterator[tuple[tuple[str, str, str], float]]:
    """Every run with its result, in the order of `runs`."""
    with ThreadPoolExecutor(jobs) as threads:
        wanted = runs()
        yield from zip(wanted, threads.map(lambda run: difference(*run), wanted), strict=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/certify", description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"put the table into {DOCUMENT.relative_to(ROOT)}")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    chosen = parser.parse_args()
    found: dict[tuple[str, str, str], float] = {}
    for run, worst in measured(chosen.jobs):
        found[run] = worst
        print(f"[{len(found):3} of {len(runs())}] {', '.join(run)}: {worst}", file=sys.stderr, flush=True)
    print(table(found))
    print(f"llama-cpp-python {version('llama-cpp-python')}", file=sys.stderr)
    if wrong := [", ".join(run) for run, worst in found.items() if worst != 0.0]:
        sys.exit(f"not exact: {'; '.join(wrong)}. Take the rule away, or mend it: nothing was written.")
    if chosen.write:
        before, _, rest = DOCUMENT.read_text(encoding="utf-8").partition(BEGIN)
        after = rest.partition(END)[2]
        DOCUMENT.write_text(f"{before}{BEGIN}\n{table(found)}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
