"""Classifier heads leave features as they are: every table has their accuracy, and "-" for bias."""

import csv
import io
import json

import pytest

from probsurgery.pipeline.analysis.figures import draw
from probsurgery.pipeline.analysis.kept_heads import uncertainties
from probsurgery.pipeline.analysis.projection import projection
from probsurgery.pipeline.analysis.report import report
from probsurgery.pipeline.config import SweepConfig
from probsurgery.pipeline.fitting.sweep import sweep
from probsurgery.pipeline.store.cache import Cache
from support import edit_manifest, write_cache

CLASSIFIER = ("--head", "classifier", "--steps", 20)
NAME = "FT-Classifier (steps=20)"


def classes_of_its_own(task, arrays):
    """Three classes of a, two of b, so that heads differ in their number of parameters."""
    if task == "a":
        return arrays
    return arrays | {"classifier": arrays["classifier"][:2], "labels": arrays["labels"] % 2}


@pytest.fixture
def cache(tmp_path):
    path = write_cache(tmp_path / "cache", {"a": 40, "b": 30}, change=classes_of_its_own)
    edit_manifest(path, lambda manifest: manifest["tasks"]["b"].update(classes=2))
    return path


@pytest.fixture(params=["alone", "beside Surgery"])
def fitted(request, cache, run):
    assert run("fit", "--cache", cache, *CLASSIFIER)[0] == 0
    if request.param != "alone":
        assert run("fit", "--cache", cache, "--head", "surgery", "--steps", 20)[0] == 0
    return cache


def test_every_format_of_a_report(fitted, run, tmp_path):
    page = tmp_path / "page.html"
    status, out, err = run("report", "--cache", fitted, "--html", page, "--all", "--uncertainty", "--published")
    assert status == 0, err
    (row,) = [line for line in out.split("Bias, mean")[1].split("Heads:")[0].splitlines() if "FT-Classifier" in line]
    assert row.split()[-3:] == ["-", "-", "-"]
    in_page = page.read_text().split("Bias, mean")[1].split(f"<td>+ {NAME}</td>")[1]
    assert in_page.startswith("<td>-</td><td>-</td><td>-</td></tr>")
    markdown, latex, table = (run("report", "--cache", fitted, "--format", f)[1] for f in ("markdown", "latex", "csv"))
    assert f"| + {NAME} | - | - | - |" in markdown
    assert f"+ {NAME} & - & - & -" in latex
    of_bias = [r for r in csv.DictReader(io.StringIO(table)) if r["table"].startswith("Bias")]
    assert {r["line"] for r in of_bias} >= {"merged (ta)"}
    assert f"+ {NAME}" not in {r["line"] for r in of_bias}
    (found,) = json.loads(run("report", "--cache", fitted, "--json")[1])
    lines = {name: {line["label"]: line for line in found[name]["lines"]} for name in ("accuracy", "bias", "costs")}
    assert set(lines["bias"][f"+ {NAME}"]["values"].values()) == {None}
    assert lines["bias"][f"+ {NAME}"]["best"] == []
    assert None not in lines["accuracy"][f"+ {NAME}"]["values"].values()
    costs = lines["costs"][f"+ {NAME}"]["values"]
    assert (costs["parameters"], costs["all heads"]) == ("34 to 51", 34 + 51)


def test_an_online_head_names_no_steps_and_no_batch_size(cache, run):
    assert run("fit", "--cache", cache, "--head", "classifier", "--online")[0] == 0
    (result,) = report(cache)
    assert result.accuracy.lines[-1].label == "+ FT-Classifier"


def test_fits_sweeps_figures_and_analyses(fitted, run, tmp_path):
    status, out, err = run("fit", "--cache", fitted, *CLASSIFIER, "--seed", 1)
    assert status == 0, err
    assert out.count(" -") >= 3
    assert "34 to 51 parameters each" in out
    result = sweep(SweepConfig(fitted, ("classifier",), {"steps": (5, 10), "lr": (0.01, 0.1)}))
    assert all(line.average_bias is None and line.average_accuracy for line in result.lines)
    assert run("sweep", "--cache", fitted, *CLASSIFIER[:2], "--steps", "5,10", "--lr", "0.01,0.1")[0] == 0
    reports = report(fitted)
    drawn = draw(reports, tmp_path / "figures", uncertainties(Cache(fitted)))
    assert NAME not in next(path for path in drawn if path.stem == "bias").with_suffix(".svg").read_text()
    assert {path.stem for path in drawn} >= {"bias", "steps", "lr"}
    shown = projection(Cache(fitted))
    assert (shown is None) == ("surgery" not in " ".join(path.name for path in (fitted / "heads").iterdir()))
    assert run("transfer", "--cache", fitted, "--on", fitted)[0] == 0
