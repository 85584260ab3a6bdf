"""Tables of a report against figures computed here."""

import cProfile
import json
import shutil
from statistics import fmean, stdev

import pytest
from safetensors.torch import load_file

from probsurgery.pipeline.analysis.report import report
from probsurgery.pipeline.config import FitConfig, ProbSettings, SurgerySettings, SweepConfig
from probsurgery.pipeline.errors import InputError
from probsurgery.pipeline.fitting.fit import fit
from probsurgery.pipeline.fitting.sweep import sweep
from probsurgery.pipeline.models.architectures import MINI
from probsurgery.pipeline.models.encoders import get_encoder
from probsurgery.pipeline.models.open_clip_encoder import OpenClipEncoder
from probsurgery.pipeline.store.results import Spread
from support import edit_manifest, refused, write_cache

PROB = ProbSettings(hidden=8, steps=60)
SURGERY = SurgerySettings(rank=4, steps=60)


def labels(table):
    return [line.label for line in table.lines]


def line_of(table, label):
    (line,) = [line for line in table.lines if line.label == label]
    return line


def means(line):
    return {column: value.mean for column, value in line.values.items()}


def test_figures_are_those_of_the_results(small_cache):
    prob, surgery = (fit(FitConfig(small_cache.path, settings)).rows for settings in (PROB, SURGERY))
    (result,) = report(small_cache.path)
    assert labels(result.accuracy) == [
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
        figures = [100 * getattr(row.accuracy, kind) for row in rows]
        expected = {"a": figures[0], "b": figures[1], "Avg": sum(figures) / 2}
        assert means(line_of(result.accuracy, label)) == pytest.approx(expected)
    assert line_of(result.bias, "merged (ta)").values["b"].mean == prob[1].bias.before
    assert line_of(result.bias, "+ Surgery (r=4, 60 steps)").values["b"].mean == surgery[1].bias.after

    merged, experts, head = (
        line_of(result.accuracy, label).values["Avg"].mean
        for label in ("merged (ta)", "individual experts", "+ Surgery (r=4, 60 steps)")
    )
    assert experts > merged
    cost = line_of(result.costs, "+ Surgery (r=4, 60 steps)").values
    assert cost["won back, %"].mean == pytest.approx(100 * (head - merged) / (experts - merged))
    assert (cost["parameters"], cost["all heads"]) == (2 * 4 * 16, 2 * 2 * 4 * 16)
    tower = sum(tensor.numel() for tensor in load_file(MINI / "weights" / "pretrained.safetensors").values())
    assert cost["of the encoder, %"] == pytest.approx(100 * 2 * 4 * 16 / tower)


def test_seeds_are_a_mean_and_a_standard_deviation(small_cache):
    rows = [fit(FitConfig(small_cache.path, PROB, seed=seed)).rows for seed in (0, 1, 2)]
    (result,) = report(small_cache.path)
    line = line_of(result.accuracy, "+ ProbSurgery (h=8, 60 steps)")
    figures = [[100 * row.accuracy.head for row in of_seed] for of_seed in rows]
    assert line.values["a"] == Spread(fmean(f[0] for f in figures), stdev(f[0] for f in figures), 3)
    averages = [fmean(f) for f in figures]
    assert line.values["Avg"] == Spread(pytest.approx(fmean(averages)), pytest.approx(stdev(averages)), 3)
    assert "±" in result.accuracy.text(line, "Avg")
    assert line_of(result.accuracy, "merged (ta)").values["a"].sd is None  # no seed changes it
    assert result.accuracy.notes


def test_the_best_measured_line_of_a_column_is_bold_and_no_other(small_cache):
    for settings in (PROB, SURGERY):
        fit(FitConfig(small_cache.path, settings))
    (result,) = report(small_cache.path)
    for table, best in ((result.accuracy, max), (result.bias, min)):
        for column in table.columns:
            figures = {
                line.label: round(line.values[column].mean, 1 if best is max else 3)
                for line in table.lines
                if line.kind == "measured"
            }
            bold = {line.label for line in table.lines if table.is_best(line, column)}
            assert bold == {label for label, figure in figures.items() if figure == best(figures.values())}
    assert line_of(result.accuracy, "individual experts").values["Avg"].mean > 90  # higher, but it does not compete


def test_several_caches_are_one_table_with_the_experts_once(tmp_path):
    paths = [write_cache(tmp_path / name, {"a": 60, "b": 40}) for name in ("one", "two")]
    merge = {"method": "wa", "settings": {}, "digest": "1"}
    edit_manifest(paths[1], lambda manifest: manifest["identity"].update(merge=merge))
    for path in paths:
        fit(FitConfig(path, PROB))
    (result,) = report(paths)
    assert labels(result.accuracy) == [
        "pretrained",
        "individual experts",
        "merged (ta)",
        "ta + ProbSurgery (h=8, 60 steps)",
        "merged (wa)",
        "wa + ProbSurgery (h=8, 60 steps)",
    ]
    assert result.merges == ("ta", "wa")
    with pytest.raises(InputError, match="named twice"):
        report([paths[0], paths[0]])
    with pytest.raises(InputError, match="--results goes with one --cache"):
        report(paths, tmp_path)


def test_one_merge_of_two_caches_is_told_apart_by_the_folder(tmp_path):
    paths = [write_cache(tmp_path / name, {"a": 60 + i, "b": 40}) for i, name in enumerate(("one", "two"))]
    for path in paths:
        fit(FitConfig(path, PROB))
    (result,) = report(paths)
    assert "merged (ta, two)" in labels(result.accuracy)
    assert "individual experts (ta, one)" in labels(result.accuracy)


def test_a_head_fitted_again_under_the_same_name_replaces_the_figures(small_cache):
    first = fit(FitConfig(small_cache.path, SurgerySettings(rank=1, steps=1), name="mine"))
    shutil.rmtree(first.path)
    second = fit(FitConfig(small_cache.path, SURGERY, name="mine"))
    (result,) = report(small_cache.path)
    assert result.accuracy.lines[-1].label == "+ Surgery (r=4, 60 steps)"
    values = means(result.bias.lines[-1])
    assert {task: values[task] for task in "ab"} == {row.task: row.bias.after for row in second.rows}


def test_heads_are_compared_on_the_rows_that_they_were_evaluated_on(tmp_path):
    path = write_cache(tmp_path / "cache", {"a": 300, "b": 200})
    runs = [fit(FitConfig(path, PROB, holdout=0.3, seed=seed)).rows for seed in (0, 1)]
    (result,) = report(path)
    assert runs[0][0].accuracy.merged != runs[1][0].accuracy.merged
    shares = []
    for rows in runs:
        merged, head, expert = (sum(getattr(r.accuracy, k) for r in rows) for k in ("merged", "head", "individual"))
        shares.append(100 * (head - merged) / (expert - merged))
    assert result.costs.lines[-1].values["won back, %"].mean == pytest.approx(fmean(shares))
    merged = line_of(result.accuracy, "merged (ta)").values["a"]
    assert merged.mean == pytest.approx(fmean(100 * rows[0].accuracy.merged for rows in runs))
    assert merged.sd > 0


def test_protocols_have_tables_of_their_own_and_partial_heads_no_average(small_cache):
    fit(FitConfig(small_cache.path, PROB))
    fit(FitConfig(small_cache.path, SURGERY, tasks=("a",)))
    fit(FitConfig(small_cache.path, PROB, holdout=0.3))
    transductive, holdout = report(small_cache.path)
    assert (transductive.protocol, holdout.protocol) == ("transductive", "holdout 0.3")
    assert all(result.protocol in table.title for result in (transductive, holdout) for table in result.tables)
    partial = transductive.accuracy.lines[-1]
    assert list(partial.values) == ["a"]
    assert "won back, %" not in transductive.costs.lines[-1].values


def test_labels_tell_settings_apart_and_where_they_are_equal_the_names_of_heads_do(tmp_path):
    path = write_cache(tmp_path / "cache", {"a": 60, "b": 40, "c": 20})
    fit(FitConfig(path, PROB))
    fit(FitConfig(path, ProbSettings(hidden=8, steps=60, kl_weight=0.5, loss="mse"), seed=1))
    for tasks in (("a", "b"), ("b", "c")):
        fit(FitConfig(path, PROB, tasks=tasks, shared=True))
    (result,) = report(path)
    assert labels(result.accuracy)[3:] == [
        "+ ProbSurgery (h=8, 60 steps)",
        "+ ProbSurgery (h=8, 60 steps, loss=mse, kl-weight=0.5)",
        "+ ProbSurgery (h=8, 60 steps, shared) [prob-h8-steps60-shared-a+b]",
        "+ ProbSurgery (h=8, 60 steps, shared) [prob-h8-steps60-shared-b+c]",
    ]


def test_heads_of_one_setting_are_one_line_whatever_they_are_called(small_cache):
    for task in ("a", "b"):
        fit(FitConfig(small_cache.path, PROB, tasks=(task,)))
    (result,) = report(small_cache.path)
    assert labels(result.accuracy)[3:] == ["+ ProbSurgery (h=8, 60 steps)"]
    assert "Avg" in result.accuracy.lines[3].values


def test_sweeps_are_curves_and_the_main_table_has_what_is_kept(small_cache, run):
    fit(FitConfig(small_cache.path, SURGERY))
    values = {"rank": (2, 4, 8), "steps": (30, 60)}
    swept = sweep(SweepConfig(small_cache.path, ("surgery",), values, seed=(0, 1)))
    (result,) = report(small_cache.path)
    assert labels(result.accuracy)[3:] == ["+ Surgery (r=4, 60 steps)"]
    assert result.others == 5
    curves = {curve.axis: curve for curve in result.curves}
    assert list(curves) == ["rank", "steps"]
    assert list(curves["rank"].points) == [2, 4, 8]
    assert curves["rank"].label == "Surgery (30 steps)"
    expected = {line.setting["rank"]: line.average_accuracy for line in swept.lines if line.setting["steps"] == 30}
    assert {rank: point.accuracy["Avg"] for rank, point in curves["rank"].points.items()} == expected
    (all_of_it,) = report(small_cache.path, everything=True)
    assert (len(all_of_it.accuracy.lines), all_of_it.others) == (3 + 6, 0)
    status, out, err = run("report", "--cache", small_cache.path)
    assert (status, err) == (
        0,
        "5 more settings of sweeps are only in the tables by setting; --all gives each a line\n",
    )
    assert "Accuracy in % against rank: Surgery (30 steps) (transductive)" in out


def test_without_a_kept_or_default_head_every_setting_has_a_line(small_cache):
    sweep(SweepConfig(small_cache.path, ("surgery",), {"rank": (2, 4), "steps": (30,)}))
    (result,) = report(small_cache.path)
    assert labels(result.accuracy)[3:] == ["+ Surgery (r=2, 30 steps)", "+ Surgery (r=4, 30 steps)"]


def test_shares_of_the_data_are_a_curve(small_cache):
    sweep(SweepConfig(small_cache.path, ("surgery",), {"steps": (30,)}, fraction=(0.2, 1.0)))
    (result,) = report(small_cache.path)
    (curve,) = result.curves
    assert (curve.axis, list(curve.points), curve.protocol) == ("fraction", [0.2, 1.0], "transductive")
    assert labels(result.accuracy)[3:] == ["+ Surgery (r=16, 30 steps, 20 % of the rows)", "+ Surgery (r=16, 30 steps)"]


def test_results_of_another_identity_are_left_out(small_cache):
    fit(FitConfig(small_cache.path, PROB))
    file = small_cache.path / "results.jsonl"
    file.write_text(file.read_text().replace(small_cache.task_fingerprint("a"), "0").replace('"b"', '"c"'))
    with pytest.raises(InputError, match="no results of this cache"):
        report(small_cache.path)


def test_rows_of_something_else_do_not_stop_a_report(small_cache):
    row = fit(FitConfig(small_cache.path, SURGERY)).rows[0].to_json()
    odd = [
        {"settings": row["settings"] | {"rank": [4], "loss": {"a": 1}}, "head": "odd"},
        {"settings": row["settings"] | {"rank": "four"}, "head": "odder"},
        {"protocol": "transductive, fraction e-.", "head": "oddest"},
        {"accuracy": row["accuracy"] | {"pretrained": "much"}, "head": "last"},
    ]
    with (small_cache.path / "results.jsonl").open("a") as file:
        for number, change in enumerate(odd):
            file.write(json.dumps(row | {"request": str(number)} | change) + "\n")
    first, *others = report(small_cache.path, everything=True)
    assert "+ Surgery (r=4, 60 steps)" in labels(first.accuracy)
    assert [result.protocol for result in others] == ["transductive, fraction e-."]
    assert first.tables


@pytest.mark.parametrize("form", ["text", "markdown", "latex", "csv", "json"])
def test_every_format_from_the_command(run, small_cache, form):
    fit(FitConfig(small_cache.path, PROB))
    status, out, err = run("report", "--cache", small_cache.path, "--format", form)
    assert (status, err) == (0, "")
    average = report(small_cache.path)[0].accuracy.lines[-1].values["Avg"].mean
    assert (f"{average:.1f}" if form in ("text", "markdown", "latex") else repr(average)) in out
    if form == "json":
        assert json.loads(out)[0]["protocol"] == "transductive"
        assert out == run("report", "--cache", small_cache.path, "--json")[1]


def test_bad_report_requests(run, small_cache, tmp_path):
    refused(run("report", "--cache", small_cache.path, "--format", "html"), "'html'", "markdown, latex, csv, json")
    refused(run("report", "--cache", tmp_path / "none"), "does not exist", "probsurgery extract")
    refused(run("report", "--cache", small_cache.path), "no results", "probsurgery fit --cache")


def test_a_report_of_many_settings_builds_one_encoder_and_takes_linear_time(small_cache, monkeypatch):
    """Time is counted in calls of functions: four times the settings take four times as many, and some to begin."""
    row = fit(FitConfig(small_cache.path, PROB)).rows[0].to_json()
    built, empty = [], OpenClipEncoder.empty
    monkeypatch.setattr(OpenClipEncoder, "empty", lambda self: built.append(self.name) or empty(self))
    empty(get_encoder("mini"))
    calls = []
    for count in (50, 200):
        rows = [row | {"settings": row["settings"] | {"hidden": 9 + n}, "request": str(n)} for n in range(count)]
        (small_cache.path / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        profile = cProfile.Profile()
        (result,) = profile.runcall(report, small_cache.path, everything=True)
        texts = [table.text(line, c) for table in result.tables for line in table.lines for c in table.columns]
        assert len(texts) > 10 * count
        calls.append(sum(entry.callcount for entry in profile.getstats()))
    assert built == ["mini", "mini"]
    assert calls[1] < 4 * calls[0]
