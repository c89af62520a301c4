"""python -m meshnode.tasks.execution: the keeper of one agent."""

from meshnode.tasks.execution.keeper import keep

if __name__ == "__main__":
    keep()
