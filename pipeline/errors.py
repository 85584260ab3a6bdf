"""The base of all our errors. The command line prints one as a single line and exits with its status."""

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
    return InputError(f"unknown {what} {given!r}; choose from: {', '.join(allowed)}")


def first_line(error: Exception) -> str:
    """The first line of another library's error, or its type if it has no message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
