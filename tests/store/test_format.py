"""The format on disk: today's caches, kept as files, are read by tomorrow's code, and the page describes them."""

import json
from pathlib import Path

import h5py
import numpy as np
import pytest
import zarr
from make_golden import values

from probsurgery.pipeline.config import ExtractConfig, FitConfig, RidgeSettings
from probsurgery.pipeline.extraction.extract import extract
from probsurgery.pipeline.fitting.fit import fit
from probsurgery.pipeline.store import manifest
from probsurgery.pipeline.store.cache import Cache
from probsurgery.pipeline.store.maintenance import convert
from support import damage, refused

GOLDEN = Path(__file__).parents[1] / "golden"
PAGE = (Path(__file__).parents[2] / "docs" / "cache-format.md").read_text()
CONTENT = "c942311c278d1040395cb97c7e409e0b644c8f97528e2fd83d41ad10f029e54f"


@pytest.mark.parametrize("version", [1])
def test_a_golden_cache_is_read(store, version, tmp_path):
    cache = Cache(GOLDEN / store)
    assert cache.manifest.schema == version
    expected = values()
    for kind in ("merged", "expert", "pretrained"):
        assert np.array_equal(cache.features("a", kind).numpy(), expected[f"test/a/{kind}"])
    assert np.array_equal(cache.labels("a").numpy(), expected["test/a/labels"])
    assert np.array_equal(cache.classifier("a").numpy(), expected["classifiers/a"])
    assert damage(cache) == []
    assert cache.content == CONTENT
    (row,) = fit(FitConfig(GOLDEN / store, RidgeSettings(), results=tmp_path)).rows
    assert row.eval_rows == 5
    other = convert(GOLDEN / store, {"zarr": "hdf5", "hdf5": "zarr"}[store], out=tmp_path / "converted")
    assert Cache(other).content == CONTENT


def test_golden_caches_are_read_by_their_own_libraries():
    group = zarr.open(str(GOLDEN / "zarr" / "features.zarr"), mode="r")
    with h5py.File(GOLDEN / "hdf5" / "features.h5", "r") as file:
        for name, expected in values().items():
            assert np.array_equal(group[name][:], expected)
            assert np.array_equal(file[name][:], expected)


def test_the_next_version_is_refused_in_one_line(run, tmp_path):
    about = json.loads((GOLDEN / "zarr" / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(about | {"schema": 2, "arrays": "something new"}))
    for command in (["fit", "--cache"], ["sweep", "--cache"], ["cache", "info"], ["cache", "verify"]):
        words = f"schema 2, this one reads up to {manifest.SCHEMA}"
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
