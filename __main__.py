"""`python -m probsurgery`, and the installed command."""

import os
import sys

_INTERRUPTED = (130, 143)


def main() -> None:
    """Run the command line; an interruption while it is still being imported ends it as quietly as a later one."""
    try:
        from probsurgery import cli

        cli.main()
    except KeyboardInterrupt:
        sys.exit(130)
    except SystemExit as ended:
        if ended.code not in _INTERRUPTED:
            raise
        # Everything is cleaned up. Libraries would now complain on standard error of work that was cut short.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(ended.code)


if __name__ == "__main__":
    main()
