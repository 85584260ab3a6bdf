"""Heads where they were not fitted, against figures computed here."""

import json
from statistics import fmean

import numpy as np
import pytest

from probsurgery.pipeline.analysis.transfer import transfer
from probsurgery.pipeline.config import ClassifierSettings, FitConfig, ProbSettings, SurgerySettings
from probsurgery.pipeline.fitting.fit import fit
from probsurgery.pipeline.heads.head import load_head
from probsurgery.pipeline.heads.metrics import accuracy
from probsurgery.pipeline.store.cache import Cache
from support import refused, write_cache

SURGERY = SurgerySettings(rank=4, steps=60)


def noisy(task, arrays):
    generator = np.random.default_rng(7)
    return arrays | {"merged": arrays["merged"] + generator.normal(size=arrays["merged"].shape).astype("float32")}


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    folder = tmp_path_factory.mktemp("transfer")
    clean = write_cache(folder / "clean", {"a": 90, "b": 60, "c": 50})
    other = write_cache(folder / "noisy", {"a": 90, "b": 60, "c": 50}, change=noisy)
    fit(FitConfig(clean, SURGERY, name="private"))
    fit(FitConfig(clean, ProbSettings(hidden=8, steps=60), tasks=("a", "b"), shared=True, name="of-two"))
    fit(FitConfig(clean, ClassifierSettings(steps=60), name="classifier"))
    fit(FitConfig(other, SURGERY, name="there"))
    return clean, other


def percent(path, head, task, fitted):
    cache = Cache(path)
    return 100 * accuracy(head(cache.features(task), fitted), cache.classifier(task), cache.labels(task))


def test_every_head_on_every_task(caches):
    tables = {table.title.partition(" (")[0].partition(": ")[2]: table for table in transfer(caches[0])}
    (private,) = [t for t in tables.values() if "Surgery (r=4" in t.title and "Prob" not in t.title]
    head = load_head(caches[0] / "heads" / "private")
    lines = {line.label: line.values for line in private.lines}
    assert list(lines) == ["individual experts", "merged", "fitted on a", "fitted on b", "fitted on c"]
    for fitted in "abc":
        values = lines[f"fitted on {fitted}"]
        for task in "abc":
            assert values[task] == percent(caches[0], head, task, fitted)
        assert values["elsewhere"] == pytest.approx(fmean(values[task] for task in "abc" if task != fitted))
    assert lines["fitted on a"]["a"] > lines["fitted on b"]["a"]


def test_a_classifier_head_has_no_accuracy_on_other_classes(caches):
    (table,) = [t for t in transfer(caches[0]) if "FT-Classifier" in t.title]
    head, cache = load_head(caches[0] / "heads" / "classifier"), Cache(caches[0])
    for line, fitted in zip(table.lines[2:], "abc", strict=True):
        right = (head.logits(cache.features(fitted), fitted).argmax(-1) == cache.labels(fitted)).double().mean().item()
        assert {column: value for column, value in line.values.items() if value is not None} == {fitted: 100 * right}
    on_other = next(line.values for line in transfer(caches[0], [caches[1]])[-1].lines if "FT-Cl" in line.label)
    assert None not in on_other.values()
    assert on_other["a"] != table.lines[2].values["a"]


def test_a_shared_head_on_a_task_that_it_was_not_fitted_on(caches):
    (table,) = [t for t in transfer(caches[0]) if "shared" in t.title]
    head = load_head(caches[0] / "heads" / "of-two")
    assert table.lines[-1].label == "fitted on a+b"
    assert table.lines[-1].values["c"] == table.lines[-1].values["elsewhere"] == percent(caches[0], head, "c", None)
    assert "transductive" in table.title


def test_on_another_cache_beside_its_own_heads(caches):
    table = transfer(caches[0], [caches[1]])[-1]
    own, other = (load_head(c / "heads" / n) for c, n in zip(caches, ("private", "there"), strict=True))
    lines = {line.label: line.values for line in table.lines}
    for origin, head in (("clean", own), ("noisy", other)):
        values = lines[f"Surgery (r=4, 60 steps), fitted on {origin} (transductive)"]
        assert {t: values[t] for t in "abc"} == {t: percent(caches[1], head, t, t) for t in "abc"}
        assert values["Avg"] == pytest.approx(fmean(values[t] for t in "abc"))
    assert lines["merged"]["a"] == percent(caches[1], lambda z, _: z, "a", None)
    partial = next(values for label, values in lines.items() if "shared" in label)
    assert "Avg" not in partial
    assert "c" not in partial


def test_the_command_and_bad_requests(caches, run, tmp_path):
    status, out, _ = run("transfer", "--cache", caches[0], "--on", caches[1], "--json")
    assert status == 0
    assert len(json.loads(out)) == 4
    assert "fitted on a+b" in run("transfer", "--cache", caches[0])[1]
    empty = write_cache(tmp_path / "empty", {"a": 30})
    refused(run("transfer", "--cache", empty), "no head of", "probsurgery fit")
    refused(run("transfer", "--cache", caches[0], "--on", empty), "has tasks a, but", "heads do not fit it")
    refused(run("transfer", "--cache", caches[0], "--on", tmp_path / "none"), "does not exist")
