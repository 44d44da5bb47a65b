"""``python -m weightlift``: the command line."""

from weightlift.cli.main import main

if __name__ == "__main__":
    main()
