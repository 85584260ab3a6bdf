"""Tables against figures worked out here."""

import shutil

import pytest

from probsurgery.pipeline.config import FitConfig, ProbSettings, SurgerySettings
from probsurgery.pipeline.errors import InputError
from probsurgery.pipeline.fit import fit
from probsurgery.pipeline.report import published, report
from support import write_cache

PROB = ProbSettings(hidden=8, steps=60)
SURGERY = SurgerySettings(rank=4, steps=60)


def test_figures_are_those_of_the_results(small_cache):
    prob, surgery = (fit(FitConfig(small_cache.path, settings)).rows for settings in (PROB, SURGERY))
    (one,) = report(small_cache.path)
    lines = {line.label: line for line in one.accuracy}
    assert list(lines) == [
        "pretrained",
        "individual experts",
        "merged (ta)",
        "+ ProbSurgery (h=8, 60 steps)",
        "+ Surgery (r=4, 60 steps)",
    ]
    for label, kind, rows in (
        ("individual experts", "individual", prob),
        ("merged (ta)", "merged", prob),
        ("+ ProbSurgery (h=8, 60 steps)", "head", prob),
        ("+ Surgery (r=4, 60 steps)", "head", surgery),
    ):
        figures = [100 * row["accuracy"][kind] for row in rows]
        assert list(lines[label].values.values()) == pytest.approx(figures)
        assert lines[label].mean == pytest.approx(sum(figures) / 2)
    bias = {line.label: line for line in one.bias}
    assert bias["merged (before)"].values["b"] == prob[1]["bias"]["before"]
    assert bias["+ Surgery (r=4, 60 steps)"].values["b"] == surgery[1]["bias"]["after"]

    merged, experts = lines["merged (ta)"].mean, lines["individual experts"].mean
    assert experts > merged
    won = (lines["+ Surgery (r=4, 60 steps)"].mean - merged) / (experts - merged)
    assert one.won_back["+ Surgery (r=4, 60 steps)"] == pytest.approx(won)
    assert one.won_back.keys() == one.costs.keys()
    assert one.costs["+ Surgery (r=4, 60 steps)"].parameters == 2 * 4 * 16


def test_a_head_fitted_anew_under_its_name_replaces_its_figures(small_cache):
    first = fit(FitConfig(small_cache.path, SurgerySettings(rank=1, steps=1), name="mine"))
    shutil.rmtree(first.path)
    second = fit(FitConfig(small_cache.path, SURGERY, name="mine"))
    (one,) = report(small_cache.path)
    assert one.accuracy[-1].label == "+ Surgery (r=4, 60 steps)"
    assert one.bias[-1].values == {row["task"]: row["bias"]["after"] for row in second.rows}


def test_heads_are_compared_on_the_rows_that_they_were_evaluated_on(tmp_path):
    path = write_cache(tmp_path / "cache", {"a": 300, "b": 200})
    runs = {seed: fit(FitConfig(path, PROB, holdout=0.3, seed=seed)).rows for seed in (0, 1)}
    (one,) = report(path)
    assert runs[0][0]["accuracy"]["merged"] != runs[1][0]["accuracy"]["merged"]
    for rows, won in zip(runs.values(), one.won_back.values(), strict=True):
        merged, head, expert = (sum(r["accuracy"][k] for r in rows) for k in ("merged", "head", "individual"))
        assert won == pytest.approx((head - merged) / (expert - merged))


def test_protocols_have_tables_of_their_own_and_partial_heads_no_average(small_cache):
    fit(FitConfig(small_cache.path, PROB))
    fit(FitConfig(small_cache.path, SURGERY, tasks=("a",)))
    fit(FitConfig(small_cache.path, PROB, holdout=0.3))
    transductive, holdout = report(small_cache.path)
    assert (transductive.protocol, holdout.protocol) == ("transductive", "holdout 0.3")
    partial = transductive.accuracy[-1]
    assert list(partial.values) == ["a"]
    assert partial.mean is None
    assert partial.label not in transductive.won_back


def test_labels_tell_settings_apart_and_the_heads_name_does_where_they_do_not(tmp_path):
    path = write_cache(tmp_path / "cache", {"a": 60, "b": 40, "c": 20})
    fit(FitConfig(path, PROB))
    fit(FitConfig(path, ProbSettings(hidden=8, steps=60, kl_weight=0.5, loss="mse"), seed=1))
    for tasks in (("a", "b"), ("b", "c")):
        fit(FitConfig(path, PROB, tasks=tasks, shared=True))
    (one,) = report(path)
    assert [line.label for line in one.accuracy[3:]] == [
        "+ ProbSurgery (h=8, 60 steps)",
        "+ ProbSurgery (h=8, 60 steps, loss=mse, kl-weight=0.5, seed 1)",
        "+ ProbSurgery (h=8, 60 steps, shared) [prob-h8-steps60-shared-a+b]",
        "+ ProbSurgery (h=8, 60 steps, shared) [prob-h8-steps60-shared-b+c]",
    ]


def test_heads_of_one_setting_are_one_line_whatever_they_are_called(small_cache):
    for task in ("a", "b"):
        fit(FitConfig(small_cache.path, PROB, tasks=(task,)))
    (one,) = report(small_cache.path)
    assert [line.label for line in one.accuracy[3:]] == ["+ ProbSurgery (h=8, 60 steps)"]
    assert one.accuracy[3].mean is not None


def test_results_of_another_identity_are_left_out(small_cache):
    fit(FitConfig(small_cache.path, PROB))
    file = small_cache.path / "results.jsonl"
    file.write_text(file.read_text().replace(small_cache.task_fingerprint("a"), "0").replace('"b"', '"c"'))
    with pytest.raises(InputError, match="no results of this cache"):
        report(small_cache.path)


def test_published_figures_are_the_papers():
    rows = {row["method"]: row for row in published("vitl14") if row["source"].startswith("Surgery")}
    assert (rows["ta"]["Avg"], rows["ta+surgery(r=16)"]["Avg"], rows["individual"]["DTD"]) == ("84.5", "89.0", "84.1")
    assert published("mini") == []


def test_published_figures_stand_apart_from_measured_ones(run, small_cache, monkeypatch):
    fit(FitConfig(small_cache.path, PROB))
    status, out, err = run("report", "--cache", small_cache.path, "--published")
    assert (status, "Accuracy" in out, err) == (0, True, "no figures were published for mini\n")
    monkeypatch.setattr("probsurgery.pipeline.report.published", lambda arch: [{"source": "a paper", "Avg": "84.5"}])
    out = run("report", "--cache", small_cache.path, "--published")[1]
    measured, theirs = out.split("Published figures")
    assert "84.5" in theirs
    assert "84.5" not in measured
