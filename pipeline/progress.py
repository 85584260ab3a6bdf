"""How long-running work reports progress: one protocol for both stages and every command."""

from typing import Protocol


class Progress(Protocol):
    """Called as work goes on."""

    def __call__(self, done: int, total: int, what: str = "", *, unit: str | None = None) -> None:
        """`done` of `total` units are done; `what` describes the current item, `unit` the unit where it changes."""


def no_progress(done: int, total: int, what: str = "", *, unit: str | None = None) -> None:
    """Progress that nobody watches."""
