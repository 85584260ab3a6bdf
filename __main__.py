"""`python -m probsurgery`, and the installed command."""

import os
import sys

_INTERRUPTED = (130, 143)


def main() -> None:
    """Run the command line; an interruption during the imports ends as quietly as a later one."""
    try:
        from probsurgery import cli

        cli.main()
    except KeyboardInterrupt:
        sys.exit(130)
    except SystemExit as ended:
        if ended.code not in _INTERRUPTED:
            raise
        # Everything is cleaned up. At a normal exit, libraries would print warnings of interrupted work.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(ended.code)


if __name__ == "__main__":
    main()
