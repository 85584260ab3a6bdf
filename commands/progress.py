"""Progress on standard error: a bar on a terminal, elsewhere a line every ten seconds."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich import progress as bars
from rich.console import Console

from probsurgery.commands.render import note, rate_text
from probsurgery.pipeline.extraction.distributed import launched_rank
from probsurgery.pipeline.progress import Progress, no_progress

_BAR_WIDTH = 16
_SECONDS_BETWEEN_LINES = 10.0


@contextmanager
def shown_progress(unit: str) -> Iterator[Progress]:
    """Show how much work is done, at which rate, and how long the rest takes. `unit` names what is counted."""
    if launched_rank()[0]:  # rank 0 shows the progress of all ranks
        yield no_progress
    elif sys.stderr.isatty():
        with bars.Progress(
            bars.BarColumn(_BAR_WIDTH),
            bars.MofNCompleteColumn(),
            bars.TextColumn("{task.fields[rate]}"),
            bars.TimeRemainingColumn(),
            bars.TextColumn("{task.description}"),
            console=Console(stderr=True),
            transient=True,
        ) as bar:
            yield _Bar(bar, unit)
    else:
        yield PlainLines(unit)


class _Bar:
    """Progress as a bar that disappears when the work is done."""

    def __init__(self, bar: bars.Progress, unit: str) -> None:
        self._bar, self._default_unit, self._unit = bar, unit, unit
        self._task = bar.add_task("", total=None, rate="", visible=False)

    def __call__(self, done: int, total: int, what: str = "", *, unit: str | None = None) -> None:
        unit = unit or self._default_unit
        if unit != self._unit:  # other work, with its own rate
            self._bar.remove_task(self._task)
            self._task, self._unit = self._bar.add_task("", total=None, rate=""), unit
        speed = self._bar.tasks[0].speed
        rate = f"{rate_text(speed)} {unit}/s" if speed else ""
        # The description is cut here to the room that is left; rich would cut the numbers before it as well.
        room = max(0, self._bar.console.width - _BAR_WIDTH - 2 * len(f"{total:,}") - len(rate) - 14)
        self._bar.update(self._task, completed=done, total=total, description=what[:room], rate=rate, visible=True)


class PlainLines:
    """Progress as lines of text, the first after a second of the main work."""

    def __init__(self, unit: str) -> None:
        self._default_unit = unit
        self._unit = ""
        self._started = self._printed = 0.0
        self._done_at_start = 0

    def __call__(self, done: int, total: int, what: str = "", *, unit: str | None = None) -> None:
        unit, now = unit or self._default_unit, time.monotonic()
        if unit != self._unit:  # other work, with its own rate
            self._unit, self._started, self._done_at_start = unit, now, done
            self._printed = now - (_SECONDS_BETWEEN_LINES - 1 if unit == self._default_unit else 0)
        if now - self._printed < _SECONDS_BETWEEN_LINES:
            return
        self._printed = now
        rate = (done - self._done_at_start) / (now - self._started)
        speed = f", {rate_text(rate)}/s, {(total - done) / rate:,.0f} s left" if rate else ""
        note(f"{what + ': ' if what else ''}{done:,} of {total:,} {unit}{speed}")
