"""Prints docs/settings.md: `python -m meshnode.settings > docs/settings.md`. A test holds the two equal."""

import sys

from meshnode.settings.catalogue import render_markdown

if __name__ == "__main__":
    sys.stdout.write(render_markdown())
