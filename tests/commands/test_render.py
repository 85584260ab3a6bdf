"""Tables on the terminal."""

from probsurgery.commands.render import counted, print_rows, print_tables
from probsurgery.pipeline.analysis.tables import Line, Table


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
