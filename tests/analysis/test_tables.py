"""Tables as text to paste: Markdown, LaTeX, CSV."""

import csv
import io

from probsurgery.pipeline.analysis.tables import Line, Table, to_csv, to_latex, to_markdown
from probsurgery.pipeline.store.results import Spread

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
        "| x\\|y | **1.2±0.5** | 1,234 |\n| z | 1.0 | **5,678** |\n"
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
