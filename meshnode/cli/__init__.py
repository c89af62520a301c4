"""The command line: `main` is its door, `commands` has one module for each family of commands, `doctor` the checks."""
