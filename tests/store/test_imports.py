"""`write_cache`: features in memory become a cache, or one line says why not."""

import numpy as np
import pytest
import torch

import probsurgery
from probsurgery.pipeline.classifier import Classifier
from probsurgery.pipeline.config import FitConfig, RidgeSettings
from probsurgery.pipeline.errors import InputError
from probsurgery.pipeline.fitting.fit import fit
from support import DIM, damage, synthetic

GOOD = synthetic(40)
BIAS = np.array([1, 2, 3], "float32")


@pytest.mark.parametrize("form", ["arrays", "tensors"])
def test_arrays_and_tensors_become_a_cache(tmp_path, store, form):
    convert = torch.from_numpy if form == "tensors" else np.asarray
    arrays = {name: convert(values) for name, values in GOOD.items()}
    train = {kind: arrays[kind][:20] for kind in ("merged", "expert")}
    plain = {"weight": arrays["classifier"], "bias": convert(BIAS), "normalise": False}
    tasks = {
        "a": arrays | {"class_names": np.array(["x", "y", "z"]), "train": train},
        "b": {"merged": arrays["merged"], "expert": arrays["expert"], "labels": arrays["labels"], "classifier": plain},
        "c": {"merged": arrays["merged"], "expert": arrays["expert"], "classifier": Classifier(torch.ones(2, DIM))},
    }
    path = probsurgery.write_cache(tmp_path / "cache", tasks, store=store, name="mine")
    cache = probsurgery.open_cache(path)
    assert cache.tasks() == ("a", "b", "c")
    assert cache.tasks("train") == ("a",)
    assert np.array_equal(cache.features("a", "pretrained").numpy(), GOOD["pretrained"])
    assert len(cache.features("a", "expert", "train")) == 20
    assert np.array_equal(cache.linear_classifier("b").bias.numpy(), BIAS)
    assert (cache.linear_classifier("b").normalise, cache.linear_classifier("c").normalise) == (False, True)
    assert damage(cache) == []
    rows = fit(FitConfig(path, RidgeSettings(), device="cpu")).rows
    right = (GOOD["merged"] @ GOOD["classifier"].T + BIAS).argmax(-1) == GOOD["labels"]
    assert rows[1].accuracy.merged == right.mean()
    assert rows[2].accuracy.merged is None


def test_tasks_may_be_called_as_arrays_are(tmp_path, store):
    names = ("labels", "merged", "classifiers", "biases", "train")
    cache = probsurgery.open_cache(probsurgery.write_cache(tmp_path / "cache", dict.fromkeys(names, GOOD), store=store))
    assert damage(cache) == []
    for name in names:
        assert np.array_equal(cache.classifier(name).numpy(), GOOD["classifier"])
        assert np.array_equal(cache.labels(name).numpy(), GOOD["labels"])
    assert len(fit(FitConfig(cache.path, RidgeSettings(), device="cpu")).rows) == len(names)


def test_other_values_are_another_identity(tmp_path):
    of = {name: probsurgery.write_cache(tmp_path / name, {"a": GOOD | change}) for name, change in CHANGES.items()}
    caches = {name: probsurgery.open_cache(path) for name, path in of.items()}
    fingerprints = {name: cache.task_fingerprint("a") for name, cache in caches.items()}
    assert fingerprints.pop("again") == fingerprints["same"]
    assert len(set(fingerprints.values())) == len(fingerprints)


CHANGES = {
    "same": {},
    "again": {},
    "merged": {"merged": GOOD["merged"] + 1},
    "expert": {"expert": GOOD["expert"] + 1},
    "labels": {"labels": GOOD["labels"][::-1].copy()},
    "bias": {"classifier": {"weight": GOOD["classifier"], "bias": BIAS}},
    "plain": {"classifier": {"weight": GOOD["classifier"], "normalise": False}},
}


@pytest.mark.parametrize(
    ("tasks", "words"),
    [
        ({}, "no task to import"),
        ([GOOD], "tasks are a list; give a dictionary"),
        ({"a": GOOD["merged"]}, "a: give a dictionary of its arrays, and not a ndarray"),
        ({"a": {"merged": GOOD["merged"]}}, "a \\(test\\) lacks expert features"),
        ({"a": GOOD | {"experts": 1}}, "unknown part of a \\(test\\) 'experts'.*choose from: merged, expert"),
        ({"a": GOOD | {"train": {"classifier": 1}}}, "unknown part of a \\(train\\) 'classifier'"),
        ({"a": GOOD | {"classifier": {"bias": BIAS}}}, "a: a classifier is an array \\(C, d\\), or has weight"),
        ({"a": GOOD | {"classifier": BIAS}}, "a: a classifier's weight is of shape \\(C, d\\)"),
        ({"a": GOOD | {"merged": [[1.0], [1.0, 2.0]]}}, "a: merged \\(test\\) is no array"),
        ({"a": GOOD | {"merged": "merged.npy"}}, "a: merged \\(test\\) holds <U10"),
        ({"a": GOOD | {"class_names": ["x"] * 3}}, "a: the class name 'x' is there twice"),
        ({"a": GOOD | {"class_names": ["x", "y", 3]}}, "a: the class name '3' is no text"),
        ({"a": GOOD | {"class_names": "xyz"}}, "a: class_names are a str; give a list"),
        ({"a": GOOD | {"class_names": {0: "x"}}}, "a: class_names are a dict"),
        ({"a": GOOD | {"classifier": {"weight": None}}}, "a: a classifier is an array"),
        ({"a": GOOD | {"classifier": {"weight": GOOD["classifier"], "normalise": "no"}}}, "normalise is True or False"),
        ({"a": GOOD | {"classifier": np.array(["x"])}}, "a: a classifier's weight is <U1"),
        ({"a": GOOD | {"merged": np.ma.masked_array(GOOD["merged"])}}, "is a masked array"),
        ({"a": GOOD | {"merged": torch.zeros(2, 2).to_sparse()}}, "is a sparse tensor"),
        ({"a": GOOD, "A": GOOD}, "the task name 'a' is there in two spellings"),
        ({"AVG": GOOD}, "a task cannot be called 'AVG', as tables and manifests use Avg"),
        ({"bias": GOOD}, "a task cannot be called 'bias'"),
        ({"elsewhere": GOOD}, "a task cannot be called 'elsewhere'"),
        ({"../a": GOOD}, "the task name '../a' is not allowed"),
        ({"a": GOOD | {"labels": GOOD["labels"] + 2**40, "classifier": None}}, "labels are classes from 0"),
    ],
)
def test_what_is_no_cache_is_refused_before_anything_is_written(tmp_path, tasks, words):
    with pytest.raises(InputError, match=words):
        probsurgery.write_cache(tmp_path / "cache", tasks)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("kind", [">f8", "reversed", "linear", "longdouble", "with a bool of numpy"])
def test_classifiers_come_in_any_form(tmp_path, kind):
    weight = np.arange(GOOD["classifier"].size, dtype=np.float32).reshape(GOOD["classifier"].shape) + 1
    forms = {"reversed": weight[::-1].copy()[::-1], "longdouble": weight.astype(np.longdouble)}
    given = forms.get(kind, weight.astype(">f8"))
    if kind == "linear":
        given = torch.nn.Linear(weight.shape[1], weight.shape[0])
        weight = given.weight.detach().numpy()
    if kind == "with a bool of numpy":
        given = {"weight": weight, "normalise": np.bool_(False)}
    cache = probsurgery.open_cache(probsurgery.write_cache(tmp_path / "cache", {"a": GOOD | {"classifier": given}}))
    assert np.array_equal(cache.classifier("a").numpy(), weight)
    assert cache.linear_classifier("a").normalise == (kind != "with a bool of numpy")
