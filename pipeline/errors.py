"""One error base. The command line turns each into a single line and its exit status."""


class ProbsurgeryError(Exception):
    """The work failed. Its message is one line: what was given, what is allowed, what to do next."""

    exit_status = 1


class InputError(ProbsurgeryError):
    """The request or its inputs are wrong, and nothing was begun or changed."""

    exit_status = 2


class DamagedCacheError(InputError):
    """A cache holds bytes that its manifest or its checksums contradict."""


def unknown(what: str, given: str, allowed) -> InputError:
    """The error for a name that is not in a table: it lists the names that are."""
    return InputError(f"unknown {what} {given!r}; choose from: {', '.join(allowed)}")


def first_line(error: Exception) -> str:
    """The first line of another library's error, or its type if it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
