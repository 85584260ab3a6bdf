"""Stage two: what a fit reads, writes and refuses."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from msgspec.structs import replace
from safetensors.torch import load_file

from probsurgery.pipeline import device
from probsurgery.pipeline.analysis.report import report
from probsurgery.pipeline.config import (
    AffineSettings,
    ClassifierSettings,
    ExtractConfig,
    FitConfig,
    OrthogonalSettings,
    ProbSettings,
    RidgeSettings,
    SurgerySettings,
    SweepConfig,
    changed_settings,
)
from probsurgery.pipeline.errors import InputError
from probsurgery.pipeline.fitting import fit as fit_module
from probsurgery.pipeline.fitting import splits
from probsurgery.pipeline.fitting.fit import fit
from probsurgery.pipeline.fitting.splits import split_rows
from probsurgery.pipeline.heads.head import load_head
from probsurgery.pipeline.heads.metrics import accuracy, representation_bias
from probsurgery.pipeline.store.cache import Cache
from probsurgery.pipeline.store.manifest import write_manifest
from probsurgery.pipeline.store.results import read_results
from probsurgery.pipeline.training.batches import Job, Rows
from probsurgery.pipeline.training.plan import fit_heads
from support import damage, identity, opened, refused, write_cache

PROB = ProbSettings(hidden=8, steps=60)
SURGERY = SurgerySettings(rank=4, steps=60)


def head_bytes(result):
    return (result.path / "head.safetensors").read_bytes()


@pytest.mark.parametrize("settings", [PROB, SURGERY, RidgeSettings(), AffineSettings(), OrthogonalSettings()])
def test_a_fit_writes_its_head_and_one_row_for_each_task(small_cache, settings):
    result = fit(FitConfig(small_cache.path, settings))
    assert load_head(result.path).tasks == ("a", "b")
    rows = read_results(small_cache.path)
    assert rows == result.rows
    assert [row.task for row in rows] == ["a", "b"]
    head = load_head(result.path)
    for row in rows:
        task = row.task
        merged, expert = small_cache.features(task), small_cache.features(task, "expert")
        corrected = head(merged, task)
        classifier, labels = small_cache.classifier(task), small_cache.labels(task)
        assert row.accuracy.head == accuracy(corrected, classifier, labels)
        assert row.accuracy.merged == accuracy(merged, classifier, labels)
        assert row.accuracy.individual == accuracy(expert, classifier, labels)
        assert row.bias.before == representation_bias(merged, expert)
        assert row.bias.after == representation_bias(corrected, expert)
        assert row.bias.after < row.bias.before
        assert row.cache == small_cache.task_fingerprint(task)
        assert row.fit_rows == row.eval_rows == len(merged)
        assert row.protocol == "transductive"


def test_a_classifier_head_is_the_task_s_classifier(small_cache):
    """Its accuracy is that of merged features under the new classifier, and it has no bias."""
    result = fit(FitConfig(small_cache.path, ClassifierSettings(steps=60)))
    assert read_results(small_cache.path) == result.rows
    lines = [json.loads(line) for line in (small_cache.path / "results.jsonl").read_text().splitlines()]
    assert [line["bias"]["after"] for line in lines] == [None, None]
    head = load_head(result.path)
    for row in result.rows:
        task, labels = row.task, small_cache.labels(row.task)
        merged, old = small_cache.features(task), small_cache.classifier(task)
        assert torch.equal(head(merged, task), merged)
        assert row.accuracy.head == (head.logits(merged, task).argmax(-1) == labels).double().mean().item()
        assert row.accuracy.merged == accuracy(merged, old, labels)
        assert row.bias.before == representation_bias(merged, small_cache.features(task, "expert"))
        assert row.parameters == 3 * (16 + 1)
        assert row.plan.kernel == "torch"
        assert head.classifiers[task].normalise
    assert fit(FitConfig(small_cache.path, ClassifierSettings(steps=60))).repeated


def test_a_classifier_head_needs_a_classifier(tmp_path, run):
    def without(task, arrays):
        return {kind: values for kind, values in arrays.items() if (task, kind) != ("b", "classifier")}

    path = write_cache(tmp_path / "cache", {"a": 40, "b": 30}, change=without)
    before = sorted(path.rglob("*"))
    words = "holds no classifier of b, at which a classifier head starts; leave it out with --tasks"
    refused(run("fit", "--cache", path, "--head", "classifier"), words)
    assert sorted(path.rglob("*")) == before
    assert run("fit", "--cache", path, "--head", "classifier", "--tasks", "a", "--steps", 5)[0] == 0


def test_a_classifier_of_plain_features_and_a_bias_stays_one(tmp_path):
    def plain(task, arrays):
        return arrays | {"bias": np.array([1.0, 0.0, -1.0], "float32"), "normalise": False}

    path = write_cache(tmp_path / "cache", {"a": 90}, change=plain)
    (row,) = (result := fit(FitConfig(path, ClassifierSettings(steps=200), holdout=0.2))).rows
    assert result.head.classifiers["a"].normalise is False
    assert row.accuracy.head > row.accuracy.merged
    (online,) = fit(FitConfig(path, ClassifierSettings(), online=True, fraction=0.5)).rows
    assert (online.fit_rows, online.settings["batch_size"]) == (45, 1)


def test_both_stores_give_the_same_head(tmp_path):
    paths = [write_cache(tmp_path / store, {"a": 60, "b": 11}, store) for store in ("zarr", "hdf5")]
    first, second = (fit(FitConfig(path, PROB)) for path in paths)
    assert head_bytes(first) == head_bytes(second)


def test_labels_change_the_accuracy_and_nothing_of_the_fit(tmp_path):
    def permute(task, arrays):
        return arrays | {"labels": np.random.default_rng(1).permutation(arrays["labels"])}

    straight = write_cache(tmp_path / "straight", {"a": 200, "b": 80})
    permuted = write_cache(tmp_path / "permuted", {"a": 200, "b": 80}, change=permute)
    closed = (RidgeSettings(), AffineSettings(), OrthogonalSettings())
    for settings in (PROB, SURGERY, *closed, ClassifierSettings(steps=60)):
        for other in ({}, {"holdout": 0.25, "fraction": 0.5}):
            first, second = (fit(FitConfig(path, settings, **other)) for path in (straight, permuted))
            assert head_bytes(first) == head_bytes(second)
            assert [r.bias for r in first.rows] == [r.bias for r in second.rows]
            assert [r.accuracy for r in first.rows] != [r.accuracy for r in second.rows]


def test_results_of_other_data_are_not_reused(tmp_path):
    """Two caches of the same identity, whose classifiers differ, share a folder of results."""
    paths = [write_cache(tmp_path / name, {"a": 60}) for name in ("first", "second")]
    manifest = Cache(paths[1]).manifest
    changed = replace(manifest.tasks["a"], classifier="another")
    write_manifest(paths[1], replace(manifest, tasks={"a": changed}))
    fit(FitConfig(paths[0], PROB, results=tmp_path / "results"))
    with pytest.raises(InputError, match="exists with other settings"):
        fit(FitConfig(paths[1], PROB, results=tmp_path / "results"))
    with pytest.raises(InputError, match="no results of this cache"):
        report(paths[1], tmp_path / "results")


def test_the_same_request_is_a_no_op_and_gives_the_same_bytes_elsewhere(small_cache, tmp_path):
    config = FitConfig(small_cache.path, PROB)
    first = fit(config)
    before = (small_cache.path / "results.jsonl").read_bytes()
    again = fit(config)
    assert again.repeated
    assert not first.repeated
    assert again.rows == first.rows
    assert (small_cache.path / "results.jsonl").read_bytes() == before
    elsewhere = fit(FitConfig(small_cache.path, PROB, results=tmp_path / "elsewhere"))
    assert not elsewhere.repeated
    assert head_bytes(elsewhere) == head_bytes(first)
    assert elsewhere.path == tmp_path / "elsewhere" / "heads" / "prob-h8-steps60"
    other_seed = fit(FitConfig(small_cache.path, PROB, seed=1))
    assert other_seed.path.name == "prob-h8-steps60-seed1"
    assert head_bytes(other_seed) != head_bytes(first)


def test_a_task_gets_the_same_head_whatever_is_fitted_beside_it(small_cache):
    both, alone = fit(FitConfig(small_cache.path, PROB)), fit(FitConfig(small_cache.path, PROB, tasks=("b",)))
    assert alone.path.name == "prob-h8-steps60-b"
    for name, tensor in both.head.params_of("b").items():
        assert torch.allclose(tensor, alone.head.params_of("b")[name], atol=1e-5)


def test_a_name_is_not_used_twice_for_different_settings(small_cache):
    fit(FitConfig(small_cache.path, PROB, name="mine"))
    before = (small_cache.path / "results.jsonl").read_bytes()
    with pytest.raises(InputError, match=r"exists with other settings .*settings\.hidden: 8 / 9"):
        fit(FitConfig(small_cache.path, ProbSettings(hidden=9, steps=60), name="mine"))
    assert (small_cache.path / "results.jsonl").read_bytes() == before
    assert [p.name for p in (small_cache.path / "heads").iterdir()] == ["mine"]


@pytest.mark.parametrize("left", ["nothing", "a torn line", "all but the last line"])
def test_results_survive_a_kill(small_cache, left):
    result = fit(FitConfig(small_cache.path, PROB))
    file = small_cache.path / "results.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text({"nothing": "", "a torn line": lines[0] + lines[1][:40], "all but the last line": lines[0]}[left])
    assert fit(FitConfig(small_cache.path, PROB)).repeated
    fit(FitConfig(small_cache.path, SURGERY))
    rows = read_results(small_cache.path)
    assert sorted((r.head, r.task) for r in rows) == sorted(
        (head, task) for head in (result.path.name, "surgery-r4-steps60") for task in ("a", "b")
    )


def test_lines_of_something_else_do_not_stop_a_report(small_cache):
    fit(FitConfig(small_cache.path, PROB))
    with (small_cache.path / "results.jsonl").open("ab") as file:
        file.write(b'\xff\xfe\n{"task": "a"}\n[1]\nnull\n' + b"[" * 100_000 + b"\n")
    assert len(read_results(small_cache.path)) == 2
    assert len(report(small_cache.path)) == 1


@pytest.mark.parametrize(
    "damage", [{"request": None}, {"results": [{}]}, {"results": None}, {"results": []}, {"tasks": [None, None]}]
)
def test_a_damaged_head_is_refused(small_cache, damage):
    path = fit(FitConfig(small_cache.path, PROB)).path / "head.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | damage))
    with pytest.raises(InputError, match="is damaged"):
        fit(FitConfig(small_cache.path, PROB))


def test_of_two_equal_fits_at_once_the_later_returns_the_earlier_head(small_cache, tmp_path, monkeypatch):
    real = fit_module.execute

    def meanwhile(*arguments):
        monkeypatch.setattr(fit_module, "execute", real)
        fit(FitConfig(small_cache.path, PROB))
        return real(*arguments)

    monkeypatch.setattr(fit_module, "execute", meanwhile)
    assert fit(FitConfig(small_cache.path, PROB)).repeated
    assert len(read_results(small_cache.path)) == 2
    assert [p.name for p in (small_cache.path / "heads").iterdir()] == ["prob-h8-steps60"]


def test_heads_of_the_tasks_so_far_do_not_bar_those_of_all(tmp_path):
    with opened(tmp_path / "cache", identity(["a", "b"]), "zarr"):
        pass
    path = write_cache(tmp_path / "cache", {"a": 60}, merged=["a", "b"])
    assert fit(FitConfig(path, PROB)).path.name == "prob-h8-steps60-a"
    write_cache(tmp_path / "cache", {"b": 60}, merged=["a", "b"])
    assert fit(FitConfig(path, PROB)).path.name == "prob-h8-steps60"


def test_an_interrupted_fit_leaves_nothing(small_cache):
    before = sorted(small_cache.path.rglob("*"))

    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(FitConfig(small_cache.path, PROB), interrupt)
    assert sorted(small_cache.path.rglob("*")) == before


def test_a_shared_head_is_one_head_that_takes_its_steps_for_each_task(small_cache):
    counted = []
    result = fit(FitConfig(small_cache.path, PROB, shared=True), lambda done, total: counted.append((done, total)))
    assert counted[-1] == (120, 120)
    assert load_file(result.path / "head.safetensors")["mu"].shape[0] == 1
    assert result.path.name == "prob-h8-steps60-shared"
    head, z = load_head(result.path), small_cache.features("a")
    assert torch.equal(head(z, "a"), head(z, "b"))
    assert len(result.rows) == 2


def test_held_out_rows_are_never_fitted(tmp_path):
    """Spoiling the rows that are held out changes what is reported and not the head."""
    seen, held_out = split_rows(FitConfig(tmp_path, holdout=0.25), "a", 200)
    assert sorted([*seen.tolist(), *held_out.tolist()]) == list(range(200))
    assert len(held_out) == 50

    def spoil(task, arrays):
        arrays["merged"][held_out.numpy()] += 3
        return arrays

    results = [
        fit(FitConfig(write_cache(tmp_path / name, {"a": 200}, change=change), PROB, holdout=0.25))
        for name, change in (("clean", lambda task, arrays: arrays), ("spoilt", spoil))
    ]
    assert head_bytes(results[0]) == head_bytes(results[1])
    assert results[0].rows[0].bias != results[1].rows[0].bias
    assert results[0].rows[0].fit_rows == 150
    assert results[0].rows[0].eval_rows == 50
    assert results[0].rows[0].protocol == "holdout 0.25"
    assert results[0].path.name == "prob-h8-steps60-holdout0.25"


def test_fitting_on_train_images_evaluates_on_test_images(tmp_path):
    path = write_cache(tmp_path / "cache", {"a": 200}, splits=("test", "train"))
    on_train, on_test = (fit(FitConfig(path, PROB, fit_split=split)) for split in ("train", "test"))
    assert head_bytes(on_train) != head_bytes(on_test)
    assert on_train.rows[0].protocol == "train"
    assert on_train.rows[0].bias.before == on_test.rows[0].bias.before
    half = fit(FitConfig(path, PROB, fit_split="train", fraction=0.5))
    assert half.rows[0].fit_rows == 100
    assert half.rows[0].protocol == "train, fraction 0.5"


def test_the_loss_goes_down_and_is_recorded(tmp_path):
    path = write_cache(tmp_path / "cache", {"a": 300})
    result = fit(FitConfig(path, SurgerySettings(rank=8, steps=500)))
    (training,) = json.loads((result.path / "head.json").read_text())["fits"]
    assert training["loss_curve"][-1][0] == 500
    assert training["loss_curve"][-1][1] < 0.8 * training["loss_curve"][0][1]
    assert training["plan"].keys() == {"stack", "workers", "graph", "precision", "kernel"}
    ridge = fit(FitConfig(path, RidgeSettings()))
    assert json.loads((ridge.path / "head.json").read_text())["fits"][0]["penalty"] > 0


def test_bad_requests_leave_nothing_behind(tmp_path, small_cache):
    before = sorted(small_cache.path.rglob("*"))
    for change, words in [
        ({"tasks": ("c",)}, "unknown task 'c'; choose from: a, b"),
        ({"tasks": ()}, "no task was named"),
        ({"fit_split": "train"}, r"does not hold a \(train\)"),
        ({"holdout": 0.01}, "leaves none to evaluate on"),
        ({"holdout": 0.99}, "leaves none to fit"),
        ({"device": "cuda:99"}, "CUDA devices"),
        ({"results": small_cache.path / "manifest.json"}, "is among the files of the cache"),
    ]:
        with pytest.raises(InputError, match=words):
            fit(FitConfig(small_cache.path, PROB, **change))
    with pytest.raises(InputError, match="does not exist"):
        fit(FitConfig(tmp_path / "nothing", PROB))
    assert sorted(small_cache.path.rglob("*")) == before


def test_nan_in_a_cache_is_named_by_task_and_row(tmp_path):
    def spoil(task, arrays):
        if task == "b":
            arrays["merged"][4, 0] = np.nan
        return arrays

    path = write_cache(tmp_path / "cache", {"a": 20, "b": 20}, change=spoil)
    with pytest.raises(InputError, match="1 rows of test/b/merged are NaN.*row 4"):
        fit(FitConfig(path, PROB))
    assert not (path / "heads").exists()
    (problem,) = damage(Cache(path))
    assert "test/b/merged" in problem
    assert "has 1 rows that are NaN" in problem


def test_default_names_tell_settings_apart():
    configs = [
        FitConfig(cache=None),
        FitConfig(cache=None, head=SurgerySettings()),
        FitConfig(cache=None, head=SurgerySettings(rank=128, steps=5_000)),
        FitConfig(cache=None, head=SurgerySettings(optimizer="joint")),
        FitConfig(cache=None, head=RidgeSettings()),
        FitConfig(cache=None, head=RidgeSettings(penalty=0.5)),
        FitConfig(cache=None, head=OrthogonalSettings()),
        FitConfig(cache=None, head=ClassifierSettings(lr=0.001)),
        FitConfig(cache=None, head=ProbSettings(kl_weight=0, lr=1e-4), seed=2, shared=True, holdout=0.2, fraction=0.1),
    ]
    assert [c.default_name() for c in configs] == [
        "prob-h128",
        "surgery-r16",
        "surgery-r128-steps5000",
        "surgery-r16-joint",
        "ridge",
        "ridge-penalty0.5",
        "orthogonal",
        "classifier-lr0.001",
        "prob-h128-lr0.0001-kl0-shared-holdout0.2-fraction0.1-seed2",
    ]


def test_the_tasks_of_a_joint_optimizer_are_those_of_the_cache(small_cache, tmp_path):
    """Whichever of them are fitted: the head of task b takes the steps that it takes beside task a's."""
    joint = changed_settings(PROB, optimizer="joint")
    both = fit(FitConfig(small_cache.path, joint, results=tmp_path / "both"))
    alone = fit(FitConfig(small_cache.path, joint, tasks=("b",), results=tmp_path / "b"))
    separate = fit(FitConfig(small_cache.path, PROB, tasks=("b",), results=tmp_path / "separate"))
    of_b = [load_head(result.path).params_of("b") for result in (both, alone, separate)]
    data = [
        Rows(task, small_cache.features(task), small_cache.features(task, "expert"))
        for task in small_cache.tasks("test")
    ]
    places = [Job((rows,), joint, place=place, tasks_in_round=len(data)) for place, rows in enumerate(data)]
    of_b.append(fit_heads(places)[1].params)
    for name, weight in of_b[0].items():
        assert torch.equal(weight, of_b[1][name])
        assert torch.equal(weight, of_b[3][name])
        assert not torch.allclose(weight, of_b[2][name], atol=1e-4)
    assert json.loads((both.path / "head.json").read_text())["settings"]["optimizer"] == "joint"
    assert "optimizer" not in json.loads((separate.path / "head.json").read_text())["settings"]


def test_paths_may_be_text(small_cache, tmp_path):
    result = fit(FitConfig(str(small_cache.path), PROB, results=str(tmp_path / "results")))
    assert result.path == tmp_path / "results" / "heads" / "prob-h8-steps60"
    sweep = SweepConfig("cache/c", results="r")
    assert (sweep.cache, sweep.results, sweep.expand()[0].cache) == (Path("cache/c"), Path("r"), Path("cache/c"))
    extract = ExtractConfig("mini", root="r", coefficients="c.json")
    assert (extract.root, extract.coefficients, extract.out) == (Path("r"), Path("c.json"), None)


def test_few_rows_are_evaluated_on_one_thread(small_cache, monkeypatch):
    """A second one gains nothing, and spins while it waits for a core of a busy machine."""
    threads = []
    measured = splits.accuracy
    monkeypatch.setattr(splits, "accuracy", lambda *a: threads.append(torch.get_num_threads()) or measured(*a))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        fit(FitConfig(small_cache.path, SurgerySettings(rank=4, steps=5), tasks=("a",)))
        assert torch.get_num_threads() == 2
        few, threads[:] = set(threads), []
        monkeypatch.setattr(device, "SMALL", 100)
        fit(FitConfig(small_cache.path, SurgerySettings(rank=4, steps=6), tasks=("a",)))
    finally:
        torch.set_num_threads(before)
    assert (few, set(threads)) == ({1}, {2})
