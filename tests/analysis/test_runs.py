"""Tables of single runs of `fit` and `sweep`."""

from dataclasses import replace
from statistics import fmean

import pytest

from probsurgery.pipeline.analysis.runs import fit_table, sweep_tables
from probsurgery.pipeline.config import FitConfig, ProbSettings, SweepConfig
from probsurgery.pipeline.fitting.fit import fit
from probsurgery.pipeline.fitting.sweep import sweep

PROB = ProbSettings(hidden=4, steps=60)


def texts(table, line):
    return [table.text(line, column) for column in table.columns]


@pytest.mark.parametrize(("shared", "heads"), [(False, "2 heads"), (True, "1 head")])
def test_a_fit_has_a_line_for_each_task_and_their_average(small_cache, shared, heads):
    result = fit(FitConfig(small_cache.path, PROB, shared=shared))
    table = fit_table(result.rows, result.path)
    assert table.title == f"{result.path} (transductive)"
    assert fit_table(result.rows).title == f"{result.path.name} (transductive)"
    assert list(table.columns) == ["merged", "with head", "expert", "bias before", "after"]
    assert [line.label for line in table.lines] == ["a", "b", "average"]
    a, b, average = table.lines
    row = result.rows[1]
    assert texts(table, b) == [
        *(f"{100 * x:.1f}" for x in (row.accuracy.merged, row.accuracy.head, row.accuracy.individual)),
        *(f"{x:.3f}" for x in (row.bias.before, row.bias.after)),
    ]
    assert average.values == {column: fmean((a.values[column], b.values[column])) for column in table.columns}
    seconds = result.rows[0].seconds if shared else sum(row.seconds for row in result.rows)
    assert table.notes == (f"{heads}, {3 * 16 * 4} parameters each, {seconds:.1f} s of training",)


def test_a_sweep_has_baselines_a_line_for_each_setting_and_grids_where_two_vary(small_cache):
    values = {"hidden": (4, 8), "kl_weight": (0.0, 1e-2), "steps": (60,)}
    result = sweep(SweepConfig(small_cache.path, values=values, seed=(0, 1)))
    table, accuracy, bias = sweep_tables(result)
    assert table.title == (f"Accuracy in % ({small_cache.path}: transductive); mean and standard deviation over seeds")
    assert [line.label for line in table.lines] == [
        "merged",
        "individual",
        "hidden 4 kl-weight 0",
        "hidden 4 kl-weight 0.01",
        "hidden 8 kl-weight 0",
        "hidden 8 kl-weight 0.01",
    ]
    merged = result.baselines["merged"]
    assert texts(table, table.lines[0]) == [*(f"{x:.1f}" for x in (*merged.values(), fmean(merged.values()))), "-"]
    last = result.lines[-1]
    figure = last.average_bias
    assert table.lines[-1].values == last.accuracy | {"Avg": last.average_accuracy, "bias": figure}
    assert table.text(table.lines[-1], "bias") == f"{figure.mean:.4f}±{figure.sd:.4f}"
    for grid, title, name in ((accuracy, "Average accuracy", "average_accuracy"), (bias, "Bias", "average_bias")):
        assert (grid.title, grid.first, list(grid.columns)) == (title, r"hidden \ kl-weight", ["0", "0.01"])
        assert [line.label for line in grid.lines] == ["4", "8"]
        cells = [line.values[column] for line in grid.lines for column in grid.columns]
        assert cells == [getattr(line, name) for line in result.lines]


def test_one_varying_setting_has_no_grid(small_cache):
    (table,) = sweep_tables(sweep(SweepConfig(small_cache.path, values={"hidden": (4, 8), "steps": (60,)})))
    assert "standard deviation" not in table.title
    assert [line.label for line in table.lines[2:]] == ["hidden 4", "hidden 8"]
    (single,) = sweep_tables(sweep(SweepConfig(small_cache.path, values={"hidden": (4,), "steps": (60,)})))
    assert single.lines[-1].label == "with head"


def test_a_setting_without_all_seeds_or_tasks_says_so(small_cache):
    result = sweep(SweepConfig(small_cache.path, values={"hidden": (4, 8), "steps": (60,)}))
    partial = replace(result.lines[0], seeds=1, average_accuracy=None, average_bias=None)
    (table,) = sweep_tables(replace(result, lines=(partial, result.lines[1]), seeds=2))
    assert table.lines[2].label == "hidden 4 (1 of 2 seeds)"
    assert texts(table, table.lines[2])[-2:] == ["-", "-"]
