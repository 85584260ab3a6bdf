"""`python -m probsurgery`, and the installed command."""

import sys


def main() -> None:
    """Run the command line; an interruption while it is still being imported ends it as quietly as a later one."""
    try:
        from probsurgery import cli
    except KeyboardInterrupt:
        sys.exit(130)
    cli.main()


if __name__ == "__main__":
    main()
