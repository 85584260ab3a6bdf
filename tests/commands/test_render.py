"""Tables on the terminal."""

import json
import math
import sys
from collections import Counter
from pathlib import Path

import pytest

from probsurgery.commands.render import counted, print_json, print_rows, print_tables, rate_text
from probsurgery.pipeline.analysis.tables import Line, Table
from probsurgery.pipeline.store.results import Spread


def test_text_from_foreign_files_does_not_control_the_terminal(capsys):
    evil = "a\x1b[31m[b]"
    print_rows(("name", "size"), [(evil, evil)])
    print_tables([Table(evil, {"acc": ".1f"}, (Line(evil, {"acc": evil}),), notes=(evil,))])
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert out.count("a?[31m[b]") == 6


def test_a_table_has_its_title_its_figures_and_its_notes(capsys):
    table = Table("Accuracy", {"a": ".1f", "b": ".1f"}, (Line("head", {"a": 91.25}),), notes=("A note.",))
    print_tables([table])
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip(" ─")]
    assert lines == [["Accuracy"], ["method", "a", "b"], ["head", "91.2", "-"], ["A", "note."]]


def test_a_count_is_plural_unless_it_is_one():
    assert [counted(n, "cache") for n in (0, 1, 2_000)] == ["0 caches", "1 cache", "2,000 caches"]


TASKS = ["sun397", "cars", "resisc45", "eurosat", "svhn", "gtsrb", "mnist", "dtd", "oxford-flowers102", "pcam"]
TASKS += ["fer2013", "oxford-iiit-pet", "stl10", "cifar100", "cifar10", "food101", "fashionmnist", "emnist_letters"]
LABELS = ["pretrained", "individual experts", "merged (ties)", "+ ProbSurgery (h=128, 5000 steps)", "+ ridge"]


@pytest.mark.parametrize("tasks", [TASKS[:3], TASKS[:8], TASKS])
@pytest.mark.parametrize("labels", [LABELS[:2], LABELS, LABELS * 4])
@pytest.mark.parametrize("width", [40, 80, 120])
def test_no_word_and_no_number_is_broken_on_a_terminal(tasks, labels, width, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("LINES", "25")  # rich takes a dumb terminal's width from COLUMNS only if LINES is set too
    monkeypatch.setenv("TERM", "dumb")
    values = [{t: Spread(12.3 + i + 2 * j, 0.25, 3) for i, t in enumerate(tasks)} for j in range(len(labels))]
    lines = tuple(Line(f"{label} {number}", v) for number, (label, v) in enumerate(zip(labels, values, strict=True)))
    table = Table(
        "Accuracy in % of a table with a long title, longer than most terminals", dict.fromkeys(tasks, ".1f"), lines
    )
    print_tables([table])
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= width
    words = Counter(out.split())
    for line in lines:
        for task in tasks:
            assert words[table.text(line, task)] >= 1
        assert all(words[word] for word in line.label.split())
    assert all(words[word] for word in [*table.title.split(), *tasks])


def test_many_columns_and_few_lines_are_turned(capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    table = Table("T", dict.fromkeys(TASKS, ".1f"), (Line("merged", dict.fromkeys(TASKS, 1.5)),))
    print_tables([table])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert all([task, "1.5"] in rows for task in TASKS)


def test_a_word_wider_than_half_of_the_terminal_is_folded_and_not_cut(capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "60")
    print_rows(("name", "size"), [("x" * 100, "1,234")])
    out = capsys.readouterr().out
    assert out.count("x") == 100
    assert "1,234" in out


@pytest.mark.parametrize(("rate", "text"), [(0.0314, "0.031"), (0.5, "0.5"), (9.94, "9.9"), (1234.0, "1,234")])
def test_a_rate_below_one_is_not_zero(rate, text):
    assert rate_text(rate) == text


def test_json_has_null_for_what_is_no_number(capsys):
    print_json({"a": [math.nan, 1.0], "b": {"c": -math.inf}, "d": Path("x")})
    assert json.loads(capsys.readouterr().out) == {"a": [None, 1.0], "b": {"c": None}, "d": "x"}
