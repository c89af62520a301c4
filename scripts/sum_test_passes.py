"""Adds up pytest's JUnit reports of several passes and prints one closing line in pytest's own form.

It judges nothing: the exit code of the run is that of the passes themselves, which scripts/test keeps.
"""

import sys
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree


def count(report: Path) -> Counter[str]:
    """Outcomes in one JUnit report; a missing report (the pass never began) counts as one error."""
    if not report.is_file():
        return Counter(errors=1)
    outcomes: Counter[str] = Counter()
    for suite in ElementTree.parse(report).getroot().iter("testsuite"):
        for outcome in ("tests", "failures", "errors", "skipped"):
            outcomes[outcome] += int(suite.get(outcome, "0"))
    return outcomes


def closing_line(outcomes: Counter[str], seconds: float) -> str:
    """`===== 1 failed, 20 passed, 3 skipped in 12.34s =====`, 100 columns wide."""
    passed = outcomes["tests"] - outcomes["failures"] - outcomes["errors"] - outcomes["skipped"]
    named = [
        (outcomes["failures"], "failed"),
        (passed, "passed"),
        (outcomes["skipped"], "skipped"),
        (outcomes["errors"], "error" if outcomes["errors"] == 1 else "errors"),
    ]
    text = ", ".join(f"{number} {name}" for number, name in named if number > 0) or "no tests ran"
    return f" {text} in {seconds:.2f}s ".center(100, "=")


def main(arguments: list[str]) -> int:
    """Arguments: elapsed seconds, then the reports."""
    total: Counter[str] = Counter()
    for report in arguments[1:]:
        total += count(Path(report))
    print(closing_line(total, float(arguments[0])))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
