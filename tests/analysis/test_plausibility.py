"""Caches whose figures cannot be right: refused, passed over or doubted, in one line."""

import json

import numpy as np
import pytest

from support import refused, write_cache

FEW = ("--steps", "20", "--hidden", "8")


def spoiled(path, **changes):
    """A cache of one task, with some of its arrays changed."""
    return write_cache(
        path, {"a": 300}, change=lambda task, arrays: arrays | {k: f(arrays[k]) for k, f in changes.items()}
    )


def with_row(value):
    def change(array):
        array[5] = value
        return array

    return change


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"classifier": lambda c: c * 0}, ("3 rows of classifiers/a", "or zero")),
        ({"classifier": lambda c: c * np.nan}, ("3 rows of classifiers/a", "NaN")),
        ({"classifier": lambda c: c * np.float32(1e30)}, ("3 rows of classifiers/a", "beyond 1e+10")),
        ({"merged": lambda z: z * np.float32(1e30)}, ("300 rows of test/a/merged", "beyond 1e+10")),
        ({"expert": with_row(3e38)}, ("1 rows of test/a/expert", "row 5")),
        ({"pretrained": with_row(np.inf)}, ("1 rows of test/a/pretrained", "row 5")),
        ({"labels": with_row(3)}, ("1 rows of test/a/labels", "not classes (0 to 2)", "row 5")),
        ({"labels": with_row(-1)}, ("1 rows of test/a/labels", "row 5")),
    ],
)
@pytest.mark.parametrize("head", ["prob", "ridge"])
def test_what_cannot_be_computed_with_is_refused_by_fit_and_found_by_verify(run, tmp_path, changes, words, head):
    cache = spoiled(tmp_path / "cache", **changes)
    steps = FEW if head == "prob" else ()
    refused(run("fit", "--cache", cache, "--head", head, *steps), *words, "--fresh")
    assert not (cache / "heads").exists()
    assert not (cache / "results.jsonl").exists()
    status, out, _ = run("cache", "verify", cache)
    assert status == 1
    assert words[0].partition(" of ")[0] in out


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("changes", [{"merged": lambda z: z * 0}, {"expert": lambda z: z * 0}, {}])
@pytest.mark.parametrize("rows", [1, 300])
def test_constants_are_reported_as_nothing(run, tmp_path, changes, rows):
    kinds = {name: lambda values: values[:rows] for name in ("merged", "expert", "pretrained", "labels")}
    shaped = kinds | {name: lambda values, f=f: f(values)[:rows] for name, f in changes.items()}
    cache = write_cache(
        tmp_path / "cache", {"a": rows}, change=lambda task, a: a | {name: f(a[name]) for name, f in shaped.items()}
    )
    assert run("fit", "--cache", cache, *FEW)[0] == 0
    assert run("fit", "--cache", cache, "--head", "ridge")[0] == 0
    outputs = ("--html", tmp_path / "page.html", "--plots", tmp_path / "plots")
    status, out, err = run("report", "--cache", cache, "--uncertainty", "--json", *outputs)
    assert status == 0, err
    assert "arning" not in err
    json.loads(out, parse_constant=lambda constant: pytest.fail(f"{constant} is not JSON"))
    assert "nan" not in run("report", "--cache", cache, "--uncertainty")[1]


def test_labels_in_another_order_are_doubted(run, tmp_path):
    permuted = spoiled(tmp_path / "permuted", labels=lambda y: (y + 1) % 3)
    (doubt,) = run("fit", "--cache", permuted, *FEW)[2].splitlines()
    assert doubt.startswith("experts not above chance: a (")
    assert "same order" in doubt
    assert doubt in run("report", "--cache", permuted)[1].replace("\n", " ")
    swapped = write_cache(
        tmp_path / "swapped", {"a": 300}, change=lambda task, a: a | {"merged": a["expert"], "expert": a["merged"]}
    )
    (doubt,) = run("fit", "--cache", swapped, *FEW)[2].splitlines()
    assert doubt.startswith("experts below the merged model: a (")
    right = write_cache(tmp_path / "right", {"a": 300})
    assert run("fit", "--cache", right, *FEW)[2] == ""
