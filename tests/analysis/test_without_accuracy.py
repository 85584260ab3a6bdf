"""Tasks without a classifier or without labels: every table has their bias, and "-" for accuracy and its average."""

import json
from dataclasses import replace

import pytest

from probsurgery.pipeline.analysis.runs import sweep_tables
from probsurgery.pipeline.analysis.study import STUDIES, study
from probsurgery.pipeline.config import SweepConfig
from probsurgery.pipeline.fitting.sweep import sweep
from probsurgery.pipeline.store.cache import Cache
from support import write_cache

FIT = ("--head", "prob", "--steps", 20, "--hidden", 4, "--device", "cpu")
LACKING = {"b": ["labels"], "c": ["classifier"], "d": ["labels", "classifier"]}


def lacking(task, arrays):
    return {kind: values for kind, values in arrays.items() if kind not in LACKING.get(task, ())}


@pytest.fixture(params=["some", "all"])
def cache(request, tmp_path):
    """Four tasks, of which only a has labels and a classifier; or without a."""
    sizes = {"a": 40, "b": 30, "c": 30, "d": 30}
    if request.param == "all":
        del sizes["a"]
    return write_cache(tmp_path / "cache", sizes, change=lacking)


def test_every_table_and_figure_is_made(cache, run, tmp_path):
    tasks = Cache(cache).tasks()
    status, out, err = run("fit", "--cache", cache, *FIT)
    assert (status, "nan" in out) == (0, False), err
    status, out, _ = run("fit", "--cache", cache, *FIT, "--json")
    rows = {row["task"]: row for row in json.loads(out)["results"]}
    for task in tasks:
        head = rows[task]["accuracy"]["head"]
        assert (head is not None) == (task == "a")
        assert rows[task]["bias"]["after"] > 0
    assert run("sweep", "--cache", cache, *FIT[:3], "10,20", "--hidden", "4,8", "--kl-weight", "0,0.1")[0] == 0
    page = ("--html", tmp_path / "page.html", "--all", "--uncertainty", "--published")
    status, out, err = run("report", "--cache", cache, *page)
    assert status == 0, err
    assert "nan" not in out
    for form in ("markdown", "latex", "csv"):
        assert run("report", "--cache", cache, "--format", form)[0] == 0
    (report,) = json.loads(run("report", "--cache", cache, "--json")[1])
    assert "without classifier or labels" in report["accuracy"]["notes"][0]
    for line in report["accuracy"]["lines"]:
        assert [column for column, value in line["values"].items() if value is not None] == ["a"] * ("a" in tasks)
        assert line["values"].keys() == {*tasks, "Avg"}
    for line in report["bias"]["lines"]:
        assert None not in line["values"].values()
    assert run("transfer", "--cache", cache, "--on", cache)[0] == 0
    tables = json.loads(run("transfer", "--cache", cache, "--json")[1])
    for line in tables[0]["lines"]:
        known = [column for column, value in line["values"].items() if value is not None]
        assert set(known) <= {"a"}


def test_a_study_has_no_accuracy_either(cache, monkeypatch):
    few = replace(STUDIES["loss"], sweeps=lambda base: [replace(base, head=("ridge",))])
    monkeypatch.setitem(STUDIES, "loss", few)
    for line in study("loss", SweepConfig(cache)).table.lines:
        assert set(line.values) <= {"a", "bias"}


def test_an_average_over_tasks_that_lack_a_figure_is_none(cache):
    result = sweep(SweepConfig(cache, ("ridge",)))
    (line,) = result.lines
    assert line.average_accuracy is None
    assert line.average_bias is not None
    for of_table in sweep_tables(result)[0].lines:
        assert of_table.values.get("Avg") is None
