"""`python -m tests.protocol.election COUNT [FIRST]`: so many seeded histories, beyond what a run of the tests takes."""

import sys

from tests.protocol.election.histories import run_history


def main() -> None:
    """Raises InvariantError with the seed of the first history that breaks an invariant."""
    count = int(sys.argv[1])
    first = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    checks = commands = 0
    for seed in range(first, first + count):
        outcome = run_history(seed)
        checks += outcome.checks
        commands += outcome.commands
        if (seed + 1 - first) % 1000 == 0:
            print(f"{seed + 1 - first} histories", file=sys.stderr, flush=True)
    print(f"{count} histories from seed {first}: {checks} checks and {commands} commands, no invariant broken")


if __name__ == "__main__":
    main()
