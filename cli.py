"""The `probsurgery` command: its subcommands, and how errors and signals become one line and an exit status.

Exit statuses: 0 done; 2 the request or its inputs are wrong, and nothing was begun; 1 the work failed, or `cache
verify` found damage; 130 Ctrl-C; 143 SIGTERM.
"""

import errno
import io
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import typer

from probsurgery.commands import caches, deploy, extract, fit, import_features, report, suites
from probsurgery.commands.render import note
from probsurgery.pipeline.errors import InputError, PassedOverWarning, ProbsurgeryError
from probsurgery.pipeline.extraction.distributed import launched_rank

COMMANDS: dict[str, Callable[..., None]] = {
    "extract": extract.extract_command,
    "merges": extract.merges_command,
    "import": import_features.import_command,
    "fit": fit.fit_command,
    "sweep": fit.sweep_command,
    "study": fit.study_command,
    "report": report.report_command,
    "transfer": report.transfer_command,
    "predict": deploy.predict_command,
    "export": deploy.export_command,
}
CACHE_COMMANDS: dict[str, Callable[..., None]] = {
    "ls": caches.list_command,
    "info": caches.info_command,
    "verify": caches.verify_command,
    "convert": caches.convert_command,
    "rm": caches.remove_command,
}
_WRONG_PATH = (errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR)

app = typer.Typer(
    help="Representation surgery for merged CLIP encoders: extract features once, fit heads in seconds.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
cache_app = typer.Typer(help="List, describe, check, convert and delete caches.", no_args_is_help=True)
for _name, _command in COMMANDS.items():
    app.command(_name)(_command)
for _name, _command in CACHE_COMMANDS.items():
    cache_app.command(_name)(_command)
app.add_typer(cache_app, name="cache")
suites_app = typer.Typer(help="List the suites of tasks, show one, or check one.", invoke_without_command=True)
suites_app.callback()(suites.list_command)
suites_app.command("show")(suites.show_command)
suites_app.command("check")(suites.check_command)
app.add_typer(suites_app, name="suites")


@app.callback()
def _refuse_ranks(context: typer.Context) -> None:
    if context.invoked_subcommand != "extract" and launched_rank()[1] > 1:
        if launched_rank()[0]:  # rank 0 reports for all ranks
            raise typer.Exit(InputError.exit_status)
        raise InputError(f"{context.invoked_subcommand} runs as one process; start it without torchrun")


def main(arguments: list[str] | None = None) -> None:
    """Run the command; every error becomes one line on standard error and an exit status."""
    # A stream that was closed before the start is None.
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal or file that cannot show a character gets a question mark
        sys.stdout.reconfigure(errors="replace")
    with suppress(ValueError):  # raised outside the main thread
        signal.signal(signal.SIGTERM, _exit_quietly)
    for variable in ("HF_HUB_VERBOSITY", "DATASETS_VERBOSITY"):  # no warnings of retries; a final failure is an error
        os.environ.setdefault(variable, "error")
    try:
        with _warnings_as_notes():
            status = app(arguments, prog_name="probsurgery", standalone_mode=False) or 0
    except ProbsurgeryError as error:
        status = _fail(str(error), error.exit_status)
    except PermissionError as error:
        status = _fail(f"no permission: {error.filename or error}", InputError.exit_status)
    except BrokenPipeError:
        # The reader of the output is gone; without this, Python would report it again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    except OSError as error:
        name = str(error.filename or "system")
        message = f"{name if len(name) <= 200 else '...' + name[-197:]}: {error.strerror or error}"
        status = _fail(message, InputError.exit_status if error.errno in _WRONG_PATH else 1)
    except MemoryError:
        status = _fail("out of memory; use a smaller --batch-size or fewer --tasks", 1)
    except KeyboardInterrupt:
        warnings.simplefilter("ignore")  # libraries warn of interrupted work
        status = 130
    except Exception as error:
        # Typer's usage errors have no public base class; all of them have this method.
        if not hasattr(error, "format_message"):
            raise
        status = InputError.exit_status
        if type(error).__name__ == "NoArgsIsHelpError":
            print(error.format_message(), file=sys.stderr)
        else:
            _fail(error.format_message(), status)
    if status == 130:
        note("interrupted; nothing is half-written, and the same command may be run again (extract and sweep go on)")
    sys.exit(status if isinstance(status, int) else 0)


@contextmanager
def _warnings_as_notes() -> Iterator[None]:
    """Print each of our own warnings once, as a note; leave those of libraries as they are."""
    with warnings.catch_warnings():
        others = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *rest: Any, **named: Any) -> None:
            if issubclass(category, PassedOverWarning):
                note(f"note: {message}")
            else:
                others(message, category, *rest, **named)

        warnings.simplefilter("default", PassedOverWarning)
        warnings.showwarning = show
        yield


def _exit_quietly(*_: object) -> None:
    """Clean up after SIGTERM, with which batch systems end a job, as after Ctrl-C, but print nothing."""
    warnings.simplefilter("ignore")
    sys.exit(128 + signal.SIGTERM)


def _fail(message: str, status: int) -> int:
    note(f"error: {' '.join(message.split())}")
    return status
