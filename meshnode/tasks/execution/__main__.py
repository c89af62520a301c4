"""python -m meshnode.tasks.execution FOLDER: the keeper of one agent."""

import sys
from pathlib import Path

from meshnode.tasks.execution.keeper import keep

if __name__ == "__main__":
    keep(Path(sys.argv[1]))
