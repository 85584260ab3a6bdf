"""The format on disk: today's caches, kept as files, are read by tomorrow's code, and the page describes them."""

import json
from pathlib import Path

import h5py
import numpy as np
import pytest
import zarr
from make_golden import folder, values, values_2

from probsurgery.pipeline.config import ExtractConfig, FitConfig, RidgeSettings
from probsurgery.pipeline.errors import InputError
from probsurgery.pipeline.extraction.extract import extract
from probsurgery.pipeline.fitting.fit import fit
from probsurgery.pipeline.store import manifest
from probsurgery.pipeline.store.cache import Cache
from probsurgery.pipeline.store.maintenance import convert
from support import damage, refused

GOLDEN = Path(__file__).parents[1] / "golden"
PAGE = (Path(__file__).parents[2] / "docs" / "cache-format.md").read_text()
CONTENTS = {
    1: "c942311c278d1040395cb97c7e409e0b644c8f97528e2fd83d41ad10f029e54f",
    2: "e585316b41e92fdba4ba0f4c2c9caee8b54de636960a414cb273365c4e7a115b",
}


@pytest.mark.parametrize("version", [1, 2])
def test_a_golden_cache_is_read(store, version, tmp_path):
    path = folder(store, version)
    cache = Cache(path)
    assert cache.manifest.schema == version
    expected = values()
    for kind in ("merged", "expert", "pretrained"):
        assert np.array_equal(cache.features("a", kind).numpy(), expected[f"test/a/{kind}"])
    assert np.array_equal(cache.labels("a").numpy(), expected["test/a/labels"])
    assert np.array_equal(cache.classifier("a").numpy(), expected["classifiers/a"])
    assert damage(cache) == []
    assert cache.content == CONTENTS[version]
    rows = fit(FitConfig(path, RidgeSettings(), results=tmp_path)).rows
    assert [row.eval_rows for row in rows] == [5] * version
    other = convert(path, {"zarr": "hdf5", "hdf5": "zarr"}[store], out=tmp_path / "converted")
    assert Cache(other).content == CONTENTS[version]
    assert Cache(other).manifest.schema == version


def test_version_2_has_biases_plain_features_and_tasks_without_labels(store):
    cache = Cache(folder(store, 2))
    classifier = cache.linear_classifier("a")
    assert np.array_equal(classifier.bias.numpy(), values_2()["biases/a"])
    assert not classifier.normalise
    assert cache.titles == {"a": "Letter A"}
    assert cache.linear_classifier("b") is None
    assert not cache.has_labels("b")
    for what in (cache.classifier, cache.labels):
        with pytest.raises(InputError, match=f"{cache.path} holds no .* of b"):
            what("b")
    old = Cache(folder(store, 1)).linear_classifier("a")
    assert (old.bias, old.normalise) == (None, True)


def test_golden_caches_are_read_by_their_own_libraries():
    group = zarr.open(str(GOLDEN / "zarr" / "features.zarr"), mode="r")
    with h5py.File(GOLDEN / "hdf5" / "features.h5", "r") as file:
        for name, expected in values().items():
            assert np.array_equal(group[name][:], expected)
            assert np.array_equal(file[name][:], expected)


def test_the_next_version_is_refused_in_one_line(run, tmp_path):
    about = json.loads((GOLDEN / "zarr" / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(about | {"schema": 3, "arrays": "something new"}))
    for command in (["fit", "--cache"], ["sweep", "--cache"], ["cache", "info"], ["cache", "verify"]):
        words = f"schema 3, this one reads up to {manifest.SCHEMA}"
        refused(run(*command, tmp_path), "newer version", words, "update probsurgery")


def test_the_page_names_every_key(tmp_path):
    config = ExtractConfig(arch="mini", tasks=("digits8",), limit=20, root=tmp_path, device="cpu", precision="bf16")
    (path,) = extract(config).caches
    new = convert(path, "hdf5")
    about = json.loads((new / "manifest.json").read_text())
    task = about["tasks"]["digits8"]
    keys = [*about, *about["identity"], *about["identity"]["merge"], *task, *task["splits"]["test"]]
    keys += [*about["arrays"]["test/digits8/merged"], *about["arrays"]["test/digits8/merged"]["shards"][0]]
    assert len(keys) > 30
    missing = [key for key in keys if f"`{key}`" not in PAGE]
    assert not missing, missing
    assert f"version {manifest.SCHEMA}" in PAGE.splitlines()[0]
