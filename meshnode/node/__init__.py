"""The composition root: an agent holds a data folder; inside it a runtime stands for one mesh at a time.

`agent` is the life of the process, `runtime` builds everything in order with constructor arguments, `founding` makes
and loads what a node starts from, `adapters` fits parts to each other, `services` are what the supervisor runs.
"""

from meshnode.node.agent import run_agent
from meshnode.node.runtime import ReadyInfo, all_migrations

__all__ = ["ReadyInfo", "all_migrations", "run_agent"]
