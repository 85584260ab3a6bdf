"""Corrections against plain formulas; saving and loading."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from probsurgery.pipeline.classifier import Classifier
from probsurgery.pipeline.config import (
    HEAD_SETTINGS,
    ClassifierSettings,
    ProbSettings,
    RidgeSettings,
    SurgerySettings,
    head_settings,
)
from probsurgery.pipeline.errors import InputError
from probsurgery.pipeline.heads.head import FitRecord, Head, load_head
from probsurgery.pipeline.heads.kinds import HEADS, initial_params, parameter_count
from probsurgery.pipeline.training.batches import generator

DIM = 12
FITS = {"tasks": ["a"], "penalty": None, "loss_curve": [[64, 0.5]]}


def random_head(settings, tasks=("a", "b")):
    shapes = HEADS[settings.kind].shapes(settings, DIM)
    params = {name: torch.randn(len(tasks), *shape) for name, shape in shapes.items()}
    own = {}
    if not settings.corrects_features:  # tasks of other numbers of classes, and one without a bias
        own = {task: Classifier(torch.randn(3 + n, DIM), torch.randn(3 + n) * n, n < 1) for n, task in enumerate(tasks)}
    return Head(settings, tasks, DIM, params, record=FitRecord(request={"seed": 0}), classifiers=own)


def test_surgery_is_the_papers_formula():
    head, z = random_head(SurgerySettings(rank=3)), torch.randn(5, DIM)
    down, up = head.params["down"][1], head.params["up"][1]
    assert torch.allclose(head(z, "b"), z - (up @ torch.relu(down @ z.T)).T, atol=1e-5)


def test_prob_subtracts_the_mean_alone():
    head, z = random_head(ProbSettings(hidden=6)), torch.randn(5, DIM)
    hidden, mu = head.params["hidden"][0], head.params["mu"][0]
    assert torch.allclose(head(z, "a"), z - (mu @ torch.relu(hidden @ z.T)).T, atol=1e-5)
    head.params["log_var"].mul_(100)
    assert torch.allclose(head(z, "a"), z - (mu @ torch.relu(hidden @ z.T)).T, atol=1e-5)


def test_ridge_is_an_affine_map():
    head, z = random_head(RidgeSettings()), torch.randn(5, DIM)
    weight, bias = head.params["weight"][0], head.params["bias"][0]
    assert torch.allclose(head(z, "a"), z @ weight.T + bias, atol=1e-5)


def test_a_classifier_head_leaves_features_and_has_logits_of_its_own():
    head, z = random_head(ClassifierSettings()), torch.randn(5, DIM)
    assert torch.equal(head(z, "a"), z)
    own = head.classifiers["a"]
    assert torch.allclose(head.logits(z, "a"), torch.nn.functional.normalize(z, dim=-1) @ own.weight.T, atol=1e-5)
    own = head.classifiers["b"]
    assert torch.allclose(head.logits(z, "b"), z @ own.weight.T + own.bias, atol=1e-5)
    with pytest.raises(InputError, match="no head for task 'c'"):
        head.logits(z, "c")
    with pytest.raises(InputError, match="surgery heads have no classifier; correct the features"):
        random_head(SurgerySettings()).logits(z, "a")


def test_damaged_classifier_heads_are_refused(tmp_path):
    random_head(ClassifierSettings()).save(tmp_path)
    tensors, plain = load_file(tmp_path / "head.safetensors"), json.loads((tmp_path / "head.json").read_text())
    assert plain["classes"] == {"a": 3, "b": 4}
    for bad, words in (
        ({"classes": {"a": 3}}, "how many classes each of its tasks has"),
        ({"classes": {"a": 3, "b": 4, "c": 5}}, "how many classes each of its tasks has"),
        ({"shared": True}, "how many classes each of its tasks has"),
        ({"classes": {"a": 3, "b": 0}}, "classes"),
        ({"classes": {"a": 4, "b": 3}}, "its settings ask for"),
        ({"classes": {"a": 3, "b": 2**31}}, "but its settings ask for"),
    ):
        (tmp_path / "head.json").write_text(json.dumps(plain | bad))
        with pytest.raises(InputError, match=words):
            load_head(tmp_path)
    (tmp_path / "head.json").write_text(json.dumps(plain))
    save_file({n: t for n, t in tensors.items() if n != "bias/b"}, tmp_path / "head.safetensors")
    with pytest.raises(InputError, match="its settings ask for"):
        load_head(tmp_path)


@pytest.mark.parametrize("name", ["surgery", "prob"])
def test_a_new_head_changes_nothing_and_starts_within_kaimings_bound(name):
    settings = head_settings(name)
    params = initial_params(settings, DIM, generator("a", 0, "init"))
    z = torch.randn(1, 5, DIM)
    assert HEADS[name].correction({n: p[None] for n, p in params.items()}, z).abs().max() == 0
    compressing = params["down" if name == "surgery" else "hidden"]
    bound = 1 / math.sqrt(DIM)  # sqrt(6 / ((1 + 5) * fan_in))
    assert 0.8 * bound < compressing.abs().max() <= bound


def test_parameter_counts_are_the_protocols():
    assert parameter_count(ProbSettings(), 512) == 196_608
    assert parameter_count(ProbSettings(), 768) == 294_912
    assert parameter_count(SurgerySettings(), 512) == 16_384
    assert parameter_count(SurgerySettings(), 768) == 24_576
    assert parameter_count(ClassifierSettings(), 512, classes=10) == 5_130


@pytest.mark.parametrize("settings", [kind() for kind in HEAD_SETTINGS.values()])
def test_saved_and_loaded_heads_give_the_same_output(tmp_path, settings):
    head, z = random_head(settings), torch.randn(5, DIM)
    head.save(tmp_path)
    again = load_head(tmp_path)
    assert again.settings == settings
    assert again.record == head.record
    assert {task: c.digest for task, c in again.classifiers.items()} == {
        t: c.digest for t, c in head.classifiers.items()
    }
    for task in head.tasks:
        assert torch.equal(again(z, task), head(z, task))
    assert torch.equal(load_head(tmp_path / "head.safetensors")(z, "a"), head(z, "a"))


def test_heads_without_a_record_and_with_keys_of_other_versions_are_read(tmp_path):
    head = random_head(SurgerySettings(rank=3))
    head.save(tmp_path)
    file = tmp_path / "head.json"
    plain = json.loads(file.read_text())
    assert list(plain) == ["schema", "head", "settings", "tasks", "shared", "dim", "request"]
    file.write_text(json.dumps(plain | {"threads": 2, "fits": [FITS | {"threads": 2}]}))
    (fit,) = load_head(tmp_path).record.fits
    assert (fit.penalty, fit.loss_curve, fit.plan) == (None, ((64, 0.5),), None)
    del plain["request"]
    file.write_text(json.dumps(plain))
    assert load_head(tmp_path).record is None


def test_a_single_head_needs_no_task():
    head, z = random_head(SurgerySettings(), tasks=("a",)), torch.randn(2, DIM)
    assert torch.equal(head(z), head(z, "a"))


def test_bad_use_is_refused():
    head = random_head(SurgerySettings())
    with pytest.raises(InputError, match="no head for task 'c'; this file has heads for: a, b"):
        head(torch.randn(2, DIM), "c")
    with pytest.raises(InputError, match="no task was named"):
        head(torch.randn(2, DIM))
    with pytest.raises(InputError, match=r"takes \(N, 12\)"):
        head(torch.randn(2, DIM + 1), "a")


def test_damaged_heads_are_refused(tmp_path):
    with pytest.raises(InputError, match="no head at"):
        load_head(tmp_path / "nothing")
    random_head(SurgerySettings()).save(tmp_path)
    tensors, plain = load_file(tmp_path / "head.safetensors"), json.loads((tmp_path / "head.json").read_text())

    save_file({"down": tensors["down"]}, tmp_path / "head.safetensors")
    with pytest.raises(InputError, match="its settings ask for"):
        load_head(tmp_path)
    (tmp_path / "head.safetensors").write_bytes(b"torn")
    with pytest.raises(InputError, match="damaged"):
        load_head(tmp_path)
    save_file({name: tensor * float("nan") for name, tensor in tensors.items()}, tmp_path / "head.safetensors")
    with pytest.raises(InputError, match="NaN or infinite weights"):
        load_head(tmp_path)
    save_file(tensors, tmp_path / "head.safetensors")

    (tmp_path / "head.json").write_text(json.dumps(plain | {"schema": 99}))
    with pytest.raises(InputError, match="schema 99"):
        load_head(tmp_path)
    (tmp_path / "head.json").write_text(json.dumps({k: v for k, v in plain.items() if k != "tasks"}))
    with pytest.raises(InputError, match="tasks"):
        load_head(tmp_path)
    for bad in (
        {"dim": 0},
        {"dim": 2**60},
        {"tasks": []},
        {"tasks": [None]},
        {"settings": {"lr": "x"}},
        {"fits": [{}]},
    ):
        (tmp_path / "head.json").write_text(json.dumps(plain | bad))
        with pytest.raises(InputError, match="is damaged|of a wrong type"):
            load_head(tmp_path)
    (tmp_path / "head.json").write_text("{")
    with pytest.raises(InputError, match="damaged"):
        load_head(tmp_path)
