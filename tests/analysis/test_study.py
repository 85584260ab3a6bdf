"""The papers' analyses: what each fits, that it resumes, and its table."""

import json
from dataclasses import replace

import pytest

from probsurgery.pipeline.analysis import study as study_module
from probsurgery.pipeline.analysis.study import STUDIES, study
from probsurgery.pipeline.config import (
    LOSSES,
    AffineSettings,
    ClassifierSettings,
    OrthogonalSettings,
    ProbSettings,
    RidgeSettings,
    SurgerySettings,
    SweepConfig,
)
from probsurgery.pipeline.errors import InputError
from probsurgery.pipeline.fitting.fit import fit_all
from probsurgery.pipeline.heads.head import recorded
from probsurgery.pipeline.heads.kinds import parameter_count
from probsurgery.pipeline.store.results import read_results
from support import refused, write_cache


def configs(name, cache, **other):
    base = SweepConfig(cache.path, **({"seed": (0,)} | other))
    return [config for sweep in STUDIES[name].sweeps(base) for config in sweep.expand()]


@pytest.fixture
def quick(monkeypatch):
    """Run studies with fewer steps; gives the configurations that they ask for."""
    asked = []

    def few_steps(configs, **other):
        asked.extend(configs)
        heads = [
            replace(c.head, steps=min(c.head.steps, 3 + c.head.steps // 500)) if c.head.is_trained else c.head
            for c in configs
        ]
        return fit_all([replace(c, head=head) for c, head in zip(configs, heads, strict=True)], **other)

    monkeypatch.setattr(study_module, "fit_all", few_steps)
    return asked


@pytest.mark.parametrize("name", STUDIES)
def test_every_study_runs_resumes_and_names_its_protocol(quick, small_cache, name):
    base = SweepConfig(small_cache.path, seed=(0, 1))
    first = study(name, base)
    assert first.fitted > 0
    assert not first.failures
    again = study(name, base)
    assert (again.fitted, again.table) == (0, first.table)
    assert "transductive" in first.table.title
    assert "2 seeds" in first.table.title
    labels = [line.label for line in first.table.lines]
    assert len(set(labels)) == len(labels)
    heads = [line for line in first.table.lines if line.kind == "measured"]
    assert len(heads) > 1
    for line in heads:
        expected = {"a", "b", "Avg"} | (set() if "FT-Classifier" in line.label else {"bias"})
        assert expected == {column for column, value in line.values.items() if value is not None}
    rows = read_results(small_cache.path)
    assert heads[0].values["a"].seeds == 2
    assert {row.seed for row in rows} == {0, 1}


def test_what_each_study_asks_for(small_cache):
    heads = {name: [config.head for config in configs(name, small_cache)] for name in STUDIES}
    assert [head.rank for head in heads["rank"]] == [4, 8, 16, 32, 64]
    assert {(head.hidden, head.kl_weight) for head in heads["width"]} == {
        (h, kl) for h in (32, 64, 128, 256) for kl in (0.0, 1e-5, 1e-4, 1e-3)
    }
    assert {(type(head), head.steps) for head in heads["steps"]} >= {(ProbSettings, 5_000), (SurgerySettings, 5_000)}
    assert [config.fraction for config in configs("data", small_cache)] == [0.01, 0.05, 0.1, 1.0] * 2
    online = configs("online", small_cache)
    assert all(config.online and config.head.batch_size == 1 for config in online)
    assert {config.fraction for config in online} == {0.1, 0.5, 1.0}
    assert [config.shared for config in configs("shared", small_cache)] == [False, False, True, True]
    assert [head.samples for head in heads["samples"]] == [0, 1, 2, 5]
    assert [head.loss for head in heads["loss"]] == [*LOSSES, *LOSSES]
    assert {config.holdout for config in configs("protocol", small_cache)} == {0.0, 0.2}


def test_equal_budgets_are_equal(small_cache):
    heads = {config.head for config in configs("budget", small_cache)}
    assert {SurgerySettings(), ProbSettings()} <= heads
    assert SurgerySettings(rank=128, steps=5_000) in heads  # ProbSurgery's width and steps
    assert ProbSettings(hidden=16, steps=1_000) in heads  # Surgery's
    as_many = SurgerySettings(rank=192, steps=5_000)
    assert as_many in heads
    assert parameter_count(as_many, 512) == parameter_count(ProbSettings(), 512)
    for without in ({"samples": 0}, {"kl_weight": 0.0}, {"samples": 0, "kl_weight": 0.0}):
        assert ProbSettings(**without) in heads
    assert {RidgeSettings(), AffineSettings(), OrthogonalSettings(), ClassifierSettings()} <= heads


def test_classifiers_are_in_the_budget_where_every_task_has_one(quick, tmp_path):
    def without(task, arrays):
        return {kind: values for kind, values in arrays.items() if (task, kind) != ("b", "classifier")}

    path = write_cache(tmp_path / "cache", {"a": 40, "b": 30}, change=without)
    assert not study("budget", SweepConfig(path)).failures
    assert "classifier" not in {config.head.kind for config in quick}
    study("budget", SweepConfig(path, tasks=("a",)))
    assert "classifier" in {config.head.kind for config in quick}


def test_train_images_are_a_protocol_where_the_cache_has_them(quick, tmp_path):
    path = write_cache(tmp_path / "cache", {"a": 60, "b": 40}, splits=("test", "train"))
    table = study("protocol", SweepConfig(path)).table
    assert {config.fit_split for config in quick} == {"test", "train"}
    assert "transductive; holdout 0.2; train" in table.title
    labels = [line.label for line in table.lines]
    assert "+ ProbSurgery (h=128, 13 steps) (train)" in labels
    # Encoders are evaluated on the same rows as under the transductive protocol: no second line.
    assert "individual (holdout 0.2)" in labels
    assert "individual (train)" not in labels


def test_a_table_has_the_figures_of_the_results(quick, small_cache):
    table = study("samples", SweepConfig(small_cache.path)).table
    rows = {(row.settings["samples"], row.task): row for row in read_results(small_cache.path)}
    for line, samples in zip([x for x in table.lines if x.kind == "measured"], (0, 1, 2, 5), strict=True):
        for task in "ab":
            assert line.values[task].mean == 100 * rows[samples, task].accuracy.head
        assert line.values["bias"].mean == sum(rows[samples, task].bias.after for task in "ab") / 2


def test_the_command(quick, small_cache, run, tmp_path):
    status, out, err = run("study", "samples", "--cache", small_cache.path, "--seed", 0, "--format", "markdown")
    assert (status, err.splitlines()[-1]) == (0, "samples: 8 heads fitted")
    assert "| + ProbSurgery (h=128, 13 steps, samples=0) |" in out
    out = run("study", "samples", "--cache", small_cache.path, "--seed", 0, "--json", "--results", tmp_path / "else")[1]
    (table,) = json.loads(out)
    assert len(table["lines"]) == 6
    assert (tmp_path / "else" / "results.jsonl").exists()
    status, out, _ = run("study")
    assert status == 0
    assert all(any(line.startswith(name) for line in out.splitlines()) for name in STUDIES)
    assert json.loads(run("study", "--json")[1]).keys() == STUDIES.keys()


def test_bad_requests(run, small_cache, tmp_path):
    refused(run("study", "ranks", "--cache", small_cache.path), "unknown study 'ranks'", "rank, width, steps")
    refused(run("study", "rank"), "a study needs a cache", "--cache")
    refused(run("study", "rank", "--cache", tmp_path / "none"), "does not exist")
    refused(run("study", "rank", "--cache", small_cache.path, "--seed", "x"), "'--seed': 'x' is not a whole number")
    refused(run("study", "rank", "--cache", small_cache.path, "--format", "pdf"), "'pdf'", "markdown")
    refused(run("study", "rank", "--cache", small_cache.path, "--tasks", "z"), "'z'")
    assert not (small_cache.path / "results.jsonl").exists()
    with pytest.raises(InputError, match="unknown study"):
        study("ranks", SweepConfig(small_cache.path))


def test_a_head_that_fails_is_named_and_the_table_has_the_others(monkeypatch, small_cache, run):
    def diverging(base):
        return [replace(base, head=("surgery",), values={"steps": (5,)}), replace(base, values={"steps": (9,)} | BAD)]

    BAD = {"lr": (10.0,), "kl_weight": (1e6,), "steps": (500,)}
    monkeypatch.setitem(STUDIES, "samples", replace(STUDIES["samples"], sweeps=diverging))
    status, out, err = run("study", "samples", "--cache", small_cache.path, "--seed", 0)
    assert status == 1
    assert "the loss is" in err
    assert "Surgery (r=16, 5 steps)" in out
    assert "ProbSurgery" not in out
    assert recorded(SurgerySettings(steps=5)) in [row.settings for row in read_results(small_cache.path)]
