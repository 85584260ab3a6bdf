"""Progress as lines, where standard error is not a terminal, and as a bar, where it is."""

import io
import sys
from types import SimpleNamespace

import pytest

from probsurgery.commands import progress as module
from probsurgery.commands.progress import PlainLines, shown_progress
from probsurgery.pipeline.progress import no_progress


@pytest.fixture
def clock(monkeypatch):
    """Seconds at which progress is called, in order."""
    times = []
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: times.pop(0)))
    return times


def test_plain_lines_show_no_rate_before_there_is_one(capsys, clock):
    clock += [100.0, 102.0, 120.0]
    show = PlainLines("head-steps")
    for done in (0, 0, 500):
        show(done, 1_000, "best")
    assert capsys.readouterr().err.splitlines() == [
        "best: 0 of 1,000 head-steps",
        "best: 500 of 1,000 head-steps, 25/s, 20 s left",
    ]


def test_another_unit_starts_with_its_own_rate(capsys, clock):
    clock += [0.0, 10.0, 11.0, 22.0, 23.0]
    show = PlainLines("images")
    show(0, 100)
    show(50, 100)
    show(0, 8, "mask", unit="steps")
    show(4, 8, "mask", unit="steps")
    show(5, 8, "mask", unit="steps")  # within ten seconds of the last line
    assert capsys.readouterr().err.splitlines() == [
        "50 of 100 images, 5/s, 10 s left",
        "mask: 4 of 8 steps, 0.36/s, 11 s left",
    ]


def test_rank_0_alone_shows_progress(monkeypatch):
    monkeypatch.setattr(module, "launched_rank", lambda: (1, 2))
    with shown_progress("images") as progress:
        assert progress is no_progress


def test_a_terminal_gets_a_bar(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    with shown_progress("images") as progress:
        progress(3, 12, "digits8")
        progress(1, 5, "mask", unit="steps")
    out = sys.stderr.getvalue()
    assert "3/12" in out or "1/5" in out
