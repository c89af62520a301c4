"""Checks the links of the project's own documents: a relative link must lead to a file, an anchor to a heading.

It reads README.md, CONTRIBUTING.md, CHANGELOG.md and everything under docs/. Links to other sites are left alone,
because a check that needs the network fails for reasons that are nobody's fault here.
"""

import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

_IMAGE = re.compile(r"!\[[^\]]*\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)")
_LINK = re.compile(r"\[(?:[^\]\[]|\[[^\]]*\])*\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)")
_REFERENCE = re.compile(r"^\s{0,3}\[[^\]]+\]:\s*<?(\S+?)>?(?:\s+\"[^\"]*\")?\s*$")
_ELSEWHERE = re.compile(r"^(?:[a-z][a-z0-9+.-]*:|//)", re.IGNORECASE)
_HEADING = re.compile(r"^\s{0,3}#{1,6}\s+(.*?)\s*#*\s*$")
_FENCE = re.compile(r"^\s{0,3}(```+|~~~+)")
_CODE = re.compile(r"(`+)(?:(?!\1).)+\1")
_EXPLICIT_ANCHOR = re.compile(r"<a\s+(?:id|name)=\"([^\"]+)\"", re.IGNORECASE)


def prose_lines(text: str) -> Iterator[tuple[int, str]]:
    """Numbered lines outside fenced code blocks."""
    fence = ""
    for number, line in enumerate(text.splitlines(), start=1):
        mark = _FENCE.match(line)
        if mark and not fence:
            fence = mark.group(1)
        elif mark and mark.group(1).startswith(fence):
            fence = ""
        elif not fence:
            yield number, line


def anchors_of(text: str) -> set[str]:
    """The anchors that the usual renderers make of headings, and those written as <a id="...">."""
    anchors: set[str] = set()
    seen: Counter[str] = Counter()
    for _, line in prose_lines(text):
        anchors.update(_EXPLICIT_ANCHOR.findall(line))
        heading = _HEADING.match(line)
        if heading:
            words = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading.group(1))
            slug = re.sub(r"[^\w\- ]", "", words.lower()).replace(" ", "-")
            anchors.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
            seen[slug] += 1
    return anchors


def links_of(text: str) -> Iterator[tuple[int, str]]:
    """Line number and target of every link, inline or by reference, outside code."""
    for number, line in prose_lines(text):
        bare = _CODE.sub("", line)
        # An image may stand inside a link's text, so images are read first and taken out.
        for target in (*_IMAGE.findall(bare), *_LINK.findall(_IMAGE.sub("", bare))):
            yield number, target
        reference = _REFERENCE.match(bare)
        if reference:
            yield number, reference.group(1)


def broken_links(document: Path, root: Path) -> Iterator[str]:
    """One sentence for every link of `document` that leads nowhere, or out of the project."""
    text = document.read_text(encoding="utf-8")
    for number, target in links_of(text):
        if _ELSEWHERE.match(target):
            continue
        path, _, anchor = unquote(target).partition("#")
        place = f"{document.relative_to(root)}:{number}"
        goal = (document.parent / path).resolve() if path else document
        if not goal.is_relative_to(root):
            yield f"{place}: {target} leads out of the project"
        elif not goal.exists():
            yield f"{place}: {target} does not exist"
        elif anchor and goal.suffix == ".md" and anchor.lower() not in anchors_of(goal.read_text(encoding="utf-8")):
            yield f"{place}: {target} names no heading of {goal.relative_to(root)}"


def documents(root: Path) -> list[Path]:
    """Every document that is checked, in a stable order."""
    return sorted([*root.glob("*.md"), *root.glob("docs/**/*.md")])


def main() -> int:
    """Prints what is broken and ends with 1 if anything is."""
    root = Path(__file__).resolve().parent.parent
    broken = [line for document in documents(root) for line in broken_links(document, root)]
    print("\n".join(broken) if broken else f"links of {len(documents(root))} documents lead somewhere")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
