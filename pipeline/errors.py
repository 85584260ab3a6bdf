"""The base of all our errors. The command line prints one as a single line and exits with its status."""

import difflib
from collections.abc import Iterable


class ProbsurgeryError(Exception):
    """The work failed. Its message is one line: what was given, what is allowed, what to do next."""

    exit_status = 1


class InputError(ProbsurgeryError):
    """The request or its inputs are wrong. Nothing was begun or changed."""

    exit_status = 2


class AccessError(InputError):
    """The system does not let this user read a file, or cannot: it may be whole, and is not missing."""


class DamagedCacheError(InputError):
    """A cache's bytes contradict its manifest or its checksums."""


class PassedOverWarning(UserWarning):
    """One line or head among several cannot be used, and the others are. The command line prints it as a note."""


def unknown(what: str, given: str, allowed: Iterable[str]) -> InputError:
    """The error for a name that is not in a table. It lists the allowed names."""
    names = list(allowed)
    return InputError(f"unknown {what} {given!r}{nearest(given, names)}; choose from: {', '.join(names)}")


def nearest(given: str, allowed: Iterable[str]) -> str:
    """` (did you mean ...?)` with the allowed name that is most like the given one, or nothing."""
    close = difflib.get_close_matches(given, list(allowed), 1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def first_line(error: Exception) -> str:
    """The first line of another library's error, with the next if it announces one; its type if it has no message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
