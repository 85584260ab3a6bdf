"""Tables as text to paste: Markdown, LaTeX, CSV."""

import csv
import io
import math

import pytest

from probsurgery.pipeline.analysis.tables import Line, Table, mean_of, to_csv, to_latex, to_markdown
from probsurgery.pipeline.store.results import Spread, spread
from probsurgery.pipeline.texts import plain

TABLE = Table(
    "Of 5 % & more",
    {"a_b": ".1f", "n": ","},
    (
        Line("base", {"a_b": 99.0}, "baseline"),
        Line("x|y", {"a_b": Spread(1.25, 0.5, 2), "n": 1234}),
        Line("z", {"a_b": 1.0, "n": 5678}),
    ),
    max,
)


def test_markdown():
    assert to_markdown([TABLE]) == (
        "**Of 5 % & more**\n\n| method | a_b | n |\n| --- | ---: | ---: |\n| base | 99.0 | - |\n"
        "| x\\|y | **1.2±0.5** | 1,234 |\n| z | **1.0** | **5,678** |\n"
    )


def test_latex_escapes_what_it_would_obey():
    text = to_latex([TABLE])
    assert r"\caption{Of 5 \% \& more.}" in text
    assert r"x|y & \textbf{1.2$\pm$0.5} & 1,234 \\" in text
    assert r"method & a\_b & n \\" in text
    assert text.count(r"\midrule") == 2
    assert to_latex([Table("^~\\", {}, ())]).count(r"\textasciicircum{}\textasciitilde{}\textbackslash{}") == 1


def test_csv_has_every_figure_in_full():
    rows = list(csv.DictReader(io.StringIO(to_csv([TABLE]))))
    assert len(rows) == 5
    assert rows[1] == {
        "table": "Of 5 % & more",
        "line": "x|y",
        "kind": "measured",
        "column": "a_b",
        "value": "1.25",
        "sd": "0.5",
        "seeds": "2",
    }


def line(label, **by_seed):
    return Line(label, {"a": spread({int(seed[1:]): value for seed, value in by_seed.items()})})


def best(*lines, columns=(("a", ".1f"),), choose=max):
    table = Table("", dict(columns), lines, choose)
    return [line.label for line in lines if table.is_best(line, "a")]


def test_a_lucky_seed_is_compared_on_the_seeds_that_all_have():
    lucky, three = line("lucky", s0=84.0), line("three", s0=84.6, s1=82.3, s2=82.4)
    assert three.number("a") < lucky.number("a")
    assert best(lucky, three) == ["three"]


def test_what_is_within_a_standard_deviation_of_the_best_is_bold_too():
    best_line = line("best", s0=82.0, s1=84.0)  # 83 ± 1.4
    assert best(best_line, line("near", s0=81.0, s1=82.5), line("far", s0=80.0, s1=82.0)) == ["best", "near"]
    assert best(best_line, line("best of all", s0=85.0, s1=85.0), line("near", s0=84.8, s1=84.9)) == ["best of all"]
    assert best(line("low", s0=0.1, s1=0.2), line("far", s0=0.5, s1=0.6), choose=min) == ["low"]


def test_lines_without_common_seeds_are_compared_as_they_are():
    assert best(line("a", s0=80.0), line("b", s1=81.0)) == ["b"]
    assert best(Line("merged", {"a": 90.0}), line("b", s0=80.0, s1=81.0)) == ["merged"]


def test_the_number_of_seeds_is_shown_where_it_differs_in_every_format():
    one, three = line("one", s0=84.0), line("three", s0=84.0, s1=82.0, s2=83.0)
    same = Table("", {"a": ".1f"}, (three, line("also three", s0=1.0, s1=2.0, s2=3.0)))
    assert [same.label(each) for each in same.lines] == ["three", "also three"]
    table = Table("", {"a": ".1f"}, (one, three, Line("merged", {"a": 70.0})))
    for text in (to_markdown([table]), to_latex([table])):
        assert all(word in text for word in ("one (n=1)", "three (n=3)", "merged "))
        assert "merged (n" not in text
    holes = Line("holes", {"a": three.values["a"], "b": spread({0: 1.0, 1: 2.0})})
    assert Table("", {"a": ".1f", "b": ".1f"}, (holes,)).text(holes, "b") == "1.5±0.7 (n=2)"


@pytest.mark.parametrize("value", [math.nan, math.inf, Spread(math.nan, None)])
def test_what_is_no_number_is_no_figure(value):
    holes = Line("x", {"a": value, "b": 1.0})
    table = Table("", {"a": ".1f", "b": ".1f"}, (holes, Line("y", {"a": 2.0, "b": 0.5})), max)
    assert table.text(holes, "a") == "-"
    assert not table.is_best(holes, "a")
    assert table.to_json()["lines"][0]["values"] == {"a": None, "b": 1.0}
    assert mean_of(table.lines, "a") is None


EVIL = "\x1b[31mX\n\u202ey\u2028z\ud800\x9b"


def test_text_is_one_line_that_controls_nothing():
    assert plain(EVIL) == "?[31mX ?y z??"
    assert plain("Zürich, 日本語: 50 %") == "Zürich, 日本語: 50 %"


@pytest.mark.parametrize("write", [to_markdown, to_latex, to_csv])
def test_foreign_text_is_plain_in_every_format(write):
    evil = Table(EVIL, {"a": ".1f"}, (Line(EVIL, {"a": EVIL}),), notes=(EVIL,))
    good = Table("title", {"a": ".1f"}, (Line("label", {"a": "value"}),), notes=("note",))
    text = write([evil])
    assert text.count("\n") == write([good]).count("\n")
    assert text.replace("\n", "").isprintable()


def test_foreign_text_is_no_markup():
    name = "*a* <img src=x> [b](c) `d` $e$ | f \\"
    text = to_markdown([Table(name, {"a": ".1f"}, (Line(name, {"a": name}),), notes=(name,))])
    escaped = r"\*a\* \<img src=x> [b]\(c) \`d\` \$e\$ \| f \\"
    assert text.count(escaped) == 4
    assert r"\\" + "\n{[}b{]} & {*}" in to_latex([Table("", {"a": ".1f"}, (Line("x", {}), Line("[b]", {"a": "*"})))])


@pytest.mark.parametrize("name", ["=1+1", "@SUM(1)", "-1+cmd", "+1+1"])
def test_no_cell_of_csv_is_a_formula(name):
    table = Table(name, {"a": ".1f"}, (Line(name, {"a": name}), Line("+ ridge", {"a": -1.5})))
    (first, second) = csv.DictReader(io.StringIO(to_csv([table])))
    assert {first["table"], first["line"], first["value"]} == {f"'{name}"}
    assert (second["line"], second["value"]) == ("+ ridge", "-1.5")


def test_tables_of_many_tasks_are_turned_on_pages():
    columns = {f"task{number}": ".1f" for number in range(20)}
    values = [{name: float(number) for number, name in enumerate(columns)}, dict.fromkeys(columns, 5.0)]
    lines = tuple(Line(f"line{n} (x=1)", row) for n, row in enumerate(values))
    wide = Table("t", columns, lines, best=max)
    assert "| task7 | **7.0** | 5.0 |" in to_markdown([wide])
    latex = to_latex([wide])
    assert r"\begin{tabular}{lrr}" in latex
    assert r"\shortstack[r]{line0 \\ (x=1)}" in latex
    assert r"task4 & 4.0 & \textbf{5.0} \\" in latex
    assert not Table("t", dict(list(columns.items())[:12]), lines).is_turned
