"""`python -m meshnode.llm.templates`: the template worker; started by its client, on pipes."""

import sys

from meshnode.llm.templates.worker import confine, serve

if __name__ == "__main__":
    confine()
    serve(sys.stdin.buffer, sys.stdout.buffer)
