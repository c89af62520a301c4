"""`python -m meshnode` is the command `meshnode`."""

from meshnode.cli.main import main

if __name__ == "__main__":
    main()
