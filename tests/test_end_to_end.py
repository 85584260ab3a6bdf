"""The main job on the whole mini suite, as the demo runs it, and the ordering that the suite was built to show.

The margins stand well inside what benchmarks/mini_margins.py measured over seeds 0, 1 and 2 (benchmarks/RESULTS.md).
"""

import contextlib
import io
import json
from statistics import fmean

import pytest

from probsurgery import cli
from probsurgery.pipeline.models.architectures import MINI

RUNS = {
    "prob": [],
    "surgery": ["--head", "surgery"],
    "surgery at prob's width and steps": ["--head", "surgery", "--rank", "128", "--steps", "5000"],
    "ridge": ["--head", "ridge"],
    "prob, holdout": ["--holdout", "0.3", "--steps", "2000"],
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Rows by head, from one extraction and five fits, and the report."""
    folder = tmp_path_factory.mktemp("demo")

    def run(*arguments):
        out = io.StringIO()
        with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as ended:
            cli.main([*arguments, "--json"])
        assert not ended.value.code
        return json.loads(out.getvalue())

    (cache,) = run("extract", "--arch", "mini", "--root", str(folder))["caches"]
    rows = {name: run("fit", "--cache", cache, *options)["results"] for name, options in RUNS.items()}
    return rows | {"report": run("report", "--cache", cache)}


def mean(rows, kind):
    return 100 * fmean(row["accuracy"][kind] for row in rows)


def test_merging_loses_more_than_fifteen_points_to_good_experts(results):
    rows = results["prob"]
    assert 6 <= len(rows) <= 8
    assert mean(rows, "individual") > 80
    assert mean(rows, "merged") < mean(rows, "individual") - 15


@pytest.mark.parametrize(("head", "least"), [("prob", 0.75), ("surgery", 0.5), ("ridge", 0.6)])
def test_every_head_wins_back_most_of_it(results, head, least):
    rows = results[head]
    merged, individual = mean(rows, "merged"), mean(rows, "individual")
    assert mean(rows, "head") - merged > least * (individual - merged)
    assert all(row["bias"]["after"] < row["bias"]["before"] for row in rows)


def test_prob_beats_surgery_as_published_and_ties_with_it_at_its_own_width_and_steps(results):
    prob, surgery, control = (mean(results[h], "head") for h in RUNS if h not in ("ridge", "prob, holdout"))
    assert prob > surgery + 2
    assert abs(prob - control) < 2


def test_images_that_the_fit_never_saw_gain_too(results):
    rows = results["prob, holdout"]
    merged, individual = mean(rows, "merged"), mean(rows, "individual")
    assert mean(rows, "head") - merged > 0.5 * (individual - merged)


def test_the_cache_shows_the_accuracies_that_the_suites_record_states(results):
    record = json.loads((MINI / "weights" / "record.json").read_text())["test_accuracy"]
    for row in results["prob"]:
        for ours, theirs in (("pretrained", "pretrained"), ("individual", "expert"), ("merged", "task_arithmetic")):
            assert 100 * row["accuracy"][ours] == pytest.approx(record[theirs][row["task"]], abs=1.0)


def test_the_report_has_every_line_of_the_demo(results):
    transductive, holdout = results["report"]
    assert [line["label"] for line in transductive["accuracy"]["lines"]] == [
        "pretrained",
        "individual experts",
        "merged (ta)",
        "+ ProbSurgery (h=128, 5000 steps)",
        "+ Surgery (r=16, 1000 steps)",
        "+ Surgery (r=128, 5000 steps)",
        "+ ridge",
    ]
    lines = transductive["accuracy"]["lines"] + transductive["bias"]["lines"]
    assert all("Avg" in line["values"] for line in lines)
    assert holdout["protocol"] == "holdout 0.3"
