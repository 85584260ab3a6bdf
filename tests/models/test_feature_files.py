"""`import`: features in files become a cache like any other, and whatever else is in the folder is one line."""

import os
import pickle

import numpy as np
import pytest
import torch
from numpy.lib.format import open_memmap
from safetensors.numpy import save_file as save_numpy
from safetensors.torch import save_file

from probsurgery.pipeline.fingerprints import file_digest
from probsurgery.pipeline.models.feature_files import read_folder
from probsurgery.pipeline.store import imports
from probsurgery.pipeline.store.arrays import SHARD_ROWS
from probsurgery.pipeline.store.cache import Cache
from probsurgery.pipeline.store.writer import CacheWriter
from support import damage, pickled_like_task_vectors, refused, synthetic

ROWS, DIM = 50, 16


def task_files(folder, rows=ROWS, seed=0, **changes):
    """A task's folder of .npy files; `changes` replaces arrays, and leaves those out that are None."""
    arrays = {k: v for k, v in (synthetic(rows, DIM, seed=seed) | changes).items() if v is not None}
    folder.mkdir(parents=True, exist_ok=True)
    for name, values in arrays.items():
        np.save(folder / f"{name}.npy", values)
    return arrays


@pytest.fixture
def folder(tmp_path):
    task_files(tmp_path / "in" / "a")
    return tmp_path / "in"


def test_an_imported_cache_is_one_like_any_other(folder, run, tmp_path, store):
    a = synthetic(ROWS, DIM)
    b = task_files(folder / "b", SHARD_ROWS + 7, seed=1, labels=None, classifier=None, pretrained=None)
    train = task_files(folder / "a" / "train", 20, seed=2, classifier=None)
    (folder / "a" / "class_names.txt").write_text("\ufeffx\ny\nz\n", encoding="utf-8")
    for passed_over in (".DS_Store", "notes.txt", "README.md"):
        (folder / "a" / passed_over).write_text("")
    out = tmp_path / "cache"
    status, text, err = run("import", folder, "--out", out, "--store", store, "--name", "my-encoder")
    assert (status, text) == (0, f"{out}: written, 2 tasks, {ROWS + SHARD_ROWS + 7 + 20:,} rows, d={DIM}\n"), err
    cache = Cache(out)
    assert cache.tasks() == ("a", "b")
    for kind in ("merged", "expert", "pretrained"):
        assert np.array_equal(cache.features("a", kind).numpy(), a[kind])
        assert np.array_equal(cache.features("a", kind, "train").numpy(), train[kind])
    assert np.array_equal(cache.labels("a").numpy(), a["labels"])
    assert np.array_equal(cache.features("b", "expert").numpy(), b["expert"])
    assert np.array_equal(cache.classifier("a").numpy(), a["classifier"])
    assert cache.manifest.tasks["a"].class_names == ("x", "y", "z")
    assert not cache.has_labels("b")
    assert damage(cache) == []
    files = cache.manifest.files
    assert files["test/a/merged"].sha256 == file_digest(folder / "a" / "merged.npy")
    assert files["a/class_names"].source.endswith("class_names.txt")
    assert (cache.identity.arch, cache.identity.merge.method) == ("my-encoder", "imported")
    fit = ("fit", "--cache", out, "--head", "ridge", "--device", "cpu")
    assert run(*fit)[0] == 0
    assert run(*fit, "--fit-split", "train", "--tasks", "a")[0] == 0
    assert run("sweep", "--cache", out, "--head", "ridge", "--penalty", "0.1,1")[0] == 0
    report = run("report", "--cache", out)[1]
    assert "my-encoder, transductive" in report
    assert "merged (imported)" in report
    assert run("transfer", "--cache", out)[0] == 0
    assert "imported features of my-encoder" in run("cache", "info", out)[1]
    assert run("cache", "verify", out)[0] == 0
    assert "the same values" in run("cache", "convert", out, "--store", {"zarr": "hdf5", "hdf5": "zarr"}[store])[1]
    words = "holds features that were imported, and no encoder"
    image = folder / "a" / "merged.npy"
    refused(run("export", "--cache", out, "--head", "ridge", "--out", tmp_path / "model"), out, words)
    refused(run("predict", "--cache", out, "--head", "ridge", "--task", "a", image), out, words)


FORMS = {
    "npy": lambda path, values: np.save(f"{path}.npy", values),
    "npz": lambda path, values: np.savez(f"{path}.npz", values),
    "npz of several": lambda path, values: np.savez(f"{path}.npz", other=values[:1], **{path.name: values}),
    "safetensors": lambda path, values: save_numpy({"features": values}, f"{path}.safetensors"),
    "pt": lambda path, values: torch.save(torch.from_numpy(values), f"{path}.pt"),
    "pt of a dictionary": lambda path, values: torch.save({path.name: torch.from_numpy(values)}, f"{path}.pt"),
    "big-endian": lambda path, values: np.save(f"{path}.npy", values.astype(values.dtype.newbyteorder(">"))),
    "Fortran order": lambda path, values: np.save(f"{path}.npy", np.asfortranarray(values)),
    "float64": lambda path, values: np.save(
        f"{path}.npy", values.astype(float) if values.dtype.kind == "f" else values
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_an_array_gives_the_same_values(folder, tmp_path, form):
    expected = synthetic(ROWS, DIM)
    for name, values in expected.items():
        (folder / "a" / f"{name}.npy").unlink()
        FORMS[form](folder / "a" / name, values)
    cache = Cache(imports.write_features(tmp_path / "cache", read_folder(folder)))
    for kind in ("merged", "expert", "pretrained"):
        assert np.array_equal(cache.features("a", kind).numpy(), expected[kind])
    assert np.array_equal(cache.labels("a").numpy(), expected["labels"])
    assert np.array_equal(cache.classifier("a").numpy(), expected["classifier"])


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_half_precision_is_read_exactly(folder, tmp_path, kind):
    halves = torch.from_numpy(synthetic(ROWS, DIM)["merged"]).to(kind)
    (folder / "a" / "merged.npy").unlink()
    save_file({"merged": halves}, folder / "a" / "merged.safetensors")
    assert torch.equal(Cache(imports.write_features(tmp_path / "c", read_folder(folder))).features("a"), halves.float())


@pytest.mark.parametrize("given", ["weight and bias", "normalise", "head", "option"])
def test_classifiers_in_files_say_what_they_take(folder, tmp_path, given):
    weight, path = synthetic(ROWS, DIM)["classifier"], folder / "a" / "classifier"
    bias = np.array([1, -2, 0.5], "float32")
    (folder / "a" / "classifier.npy").unlink()
    if given == "normalise":
        np.savez(path.with_suffix(".npz"), weight=weight, bias=bias, normalise=False)
    elif given == "head":
        pickled_like_task_vectors(path.with_suffix(".pt"), torch.from_numpy(weight))
    else:
        torch.save({"weight": torch.from_numpy(weight), "bias": torch.from_numpy(bias)}, path.with_suffix(".pt"))
    classifier = read_folder(folder, plain_features=given == "option")["a"].classifier
    assert np.array_equal(classifier.weight.numpy(), weight)
    assert classifier.normalise == (given not in ("normalise", "option"))
    assert (classifier.bias is None) if given == "head" else np.array_equal(classifier.bias.numpy(), bias)


def test_a_mapped_file_is_not_read_into_memory(folder):
    values = read_folder(folder)["a"].splits["test"]["merged"].open()
    assert isinstance(values, np.memmap)


def replaced(name, values):
    return lambda task: np.save(task / f"{name}.npy", values)


def text(name, content):
    return lambda task: (task / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def renamed(old, new):
    return lambda task: (task / old).rename(task / new)


def cut(task):
    content = (task / "merged.npy").read_bytes()
    (task / "merged.npy").write_bytes(content[:-10])


def trap(task):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(task / "called"),)

    (task / "merged.npy").write_bytes(pickle.dumps(Trap()))


def huge(task):
    open_memmap(task / "merged.npy", "w+", "float32", (2, 2**16 + 1))


def two_arrays(task):
    (task / "labels.npy").unlink()
    np.savez(task / "labels.npz", x=[1], y=[2])


def only_bias(task):
    (task / "classifier.npy").unlink()
    np.savez(task / "classifier.npz", bias=np.ones(3))


GOOD = synthetic(ROWS, DIM)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (replaced("merged", GOOD["merged"][1:]), ("expert.npy has 50 rows, but", "merged.npy has 49")),
        (replaced("labels", GOOD["labels"][1:]), ("labels.npy has 49 rows, but", "merged.npy has 50")),
        (replaced("expert", GOOD["expert"][:, 1:]), ("expert.npy has d = 15, but", "merged.npy has d = 16")),
        (replaced("classifier", GOOD["classifier"].T), ("d = 16, but the classifier (16, 3) is not (C, d)",)),
        (replaced("classifier", np.ones((3, 16), int)), ("classifier.npy: weight is int64",)),
        (replaced("classifier", GOOD["classifier"] * np.nan), ("rows of its classifier are NaN", "row 0")),
        (replaced("merged", np.where(np.eye(50, 16, -6), np.nan, 1.0)), ("merged.npy is NaN", "row 6")),
        (replaced("expert", np.full((50, 16), np.inf)), ("expert.npy is NaN, infinite", "row 0")),
        (replaced("merged", np.ones((50, 16), int)), ("merged.npy holds int64", "floating-point")),
        (replaced("merged", np.ones((50, 16), complex)), ("merged.npy holds complex128",)),
        (replaced("merged", np.ones((50, 4, 4))), ("merged.npy has shape (50, 4, 4)", "(N, d)")),
        (replaced("merged", np.ones((0, 16))), ("merged.npy", "shape (0, 16)")),
        (replaced("labels", np.ones(50)), ("labels.npy is float64 of shape (50,)", "whole numbers")),
        (replaced("labels", np.eye(50, 3, dtype=int)), ("labels.npy is int64 of shape (50, 3)",)),
        (replaced("labels", np.full(50, 3)), ("label 3 in row 0", "classes from 0 to 2")),
        (replaced("labels", np.arange(50) % 3 - 1), ("label -1 in row 0",)),
        (replaced("merged", np.array([["a"], [{}]], object)), ("merged.npy holds pickled Python objects",)),
        (trap, ("merged.npy holds pickled Python objects", "never read")),
        (cut, ("merged.npy cannot be read as an array: it is cut off",)),
        (huge, ("merged.npy has shape (2, 65537)", "d up to 65,536")),
        (text("merged.npy", ""), ("merged.npy cannot be read as an array",)),
        (text("merged.npy", "1.0, 2.0"), ("merged.npy",)),
        (text("classifier.npy", "PK"), ("classifier.npy",)),
        (only_bias, ("is not a classification head, which has `weight`",)),
        (lambda task: (task / "merged.npy").unlink(), ("a (test) lacks merged features",)),
        (renamed("expert.npy", "experts.npy"), ("experts.npy is none of: merged, expert",)),
        (renamed("expert.npy", "expert.csv"), ("expert.csv is of no format that is read", ".npy, .npz")),
        (text("merged.npz", ""), ("are both merged", "keep one")),
        (two_arrays, ("labels.npz holds 2 arrays (x, y)", "call the right one 'labels'")),
        (text("class_names.txt", "x\ny\nz\nu\n"), ("4 class names for a classifier of 3 classes",)),
        (text("class_names.txt", "x\ny\nx\n"), ("'x' is there twice",)),
        (text("class_names.txt", "x\n\nz\n"), ("the class name ''",)),
        (text("class_names.txt", b"\xff\xfe\x00"), ("class_names.txt cannot be read", "UTF-8")),
        (text("class_names.json", '{"0": "x"}'), ("class_names.json is not a list of texts",)),
        (text("class_names.json", "[1,"), ("class_names.json cannot be read",)),
        (lambda task: task.rename(task.with_name("a b")), ("the task name 'a b' is not allowed",)),
        (lambda task: np.save(task.parent / "merged.npy", GOOD["merged"]), ("merged.npy is of no task",)),
        (lambda task: (task.parent / "b").mkdir(), ("b holds no features",)),
        (lambda task: task_files(task / "train", classifier=None, expert=None), ("a (train) lacks expert",)),
        (lambda task: task_files(task / "train"), ("train/classifier.npy is none of: merged",)),
        (lambda task: os.mkfifo(task / "pretrained.npz") or (task / "pretrained.npy").unlink(), ("is not a file",)),
        (lambda task: task_files(task.parent / "b", merged=np.ones((50, 8))), ("b/merged.npy has d = 8, but",)),
    ],
)  # fmt: skip
def test_what_cannot_be_imported_is_one_line(folder, run, tmp_path, change, words):
    change(folder / "a")
    refused(run("import", folder, "--out", tmp_path / "cache"), *words)
    assert not (tmp_path / "cache").exists()
    assert not (folder / "a" / "called").exists()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("in/a/merged.npy",), "merged.npy is not a folder"),
        (("nothing",), "nothing is not a folder"),
        (("empty",), "empty holds no folder of a task"),
        (("in", "--store", "csv"), "unknown store 'csv'"),
        (("in", "--dtype", "int8"), "unknown dtype 'int8'"),
        (("in", "--name", ""), "must have 1 to 100 characters"),
    ],
)
def test_wrong_requests_are_one_line(folder, run, tmp_path, given, words):
    (tmp_path / "empty").mkdir()
    refused(run("import", tmp_path / given[0], *given[1:], "--out", tmp_path / "cache"), words)


def test_float16_that_would_overflow_is_named(folder, run, tmp_path):
    np.save(folder / "a" / "merged.npy", GOOD["merged"] * 1e5)
    command = ("import", folder, "--out", tmp_path / "cache")
    refused(run(*command, "--dtype", "float16"), "merged.npy is NaN, infinite", "(as float16)")
    assert run(*command)[0] == 0


def test_an_existing_cache_stays_unless_it_is_replaced(folder, run, tmp_path):
    command = ("import", folder, "--out", tmp_path / "cache")
    assert run(*command)[0] == 0
    refused(run(*command), "is a cache already", "--fresh")
    np.save(folder / "a" / "merged.npy", GOOD["merged"] + 1)
    np.save(folder / "a" / "expert.npy", GOOD["expert"] * np.nan)
    refused(run(*command, "--fresh"), "expert.npy is NaN")
    assert np.array_equal(Cache(tmp_path / "cache").features("a").numpy(), GOOD["merged"])
    np.save(folder / "a" / "expert.npy", GOOD["expert"])
    assert run(*command, "--fresh")[0] == 0
    assert np.array_equal(Cache(tmp_path / "cache").features("a").numpy(), GOOD["merged"] + 1)
    refused(run("import", folder, "--out", folder), f"{folder} exists and is not a cache (it holds a)")
    assert run("import", folder, "--out", folder / "cache")[0] == 0
    assert run("import", folder, "--out", tmp_path / "again")[1].startswith(f"{tmp_path}/again: written, 1 task")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("mine")
    refused(run("import", folder, "--out", tmp_path / "other", "--fresh"), "is not a cache")


def test_an_interrupted_import_is_no_cache_and_goes_on(folder, run, tmp_path, monkeypatch):
    command, out = ("import", folder, "--out", tmp_path / "cache"), tmp_path / "cache"
    write, calls = CacheWriter.write, []

    def interrupted(self, *arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        write(self, *arguments)

    monkeypatch.setattr(CacheWriter, "write", interrupted)
    assert run(*command)[0] == 130
    refused(run("fit", "--cache", out), "is unfinished", "run the same `probsurgery import` again")
    assert run(*command)[0] == 0
    assert len(calls) == 3 + 3  # of five arrays two were there
    assert damage(Cache(out)) == []
    assert run("fit", "--cache", out, "--head", "ridge")[0] == 0
    monkeypatch.undo()
    calls.clear()
    np.save(folder / "a" / "merged.npy", GOOD["merged"] + 1)
    refused(run(*command), "is a cache already")
