"""Nothing twice: what a cache beside holds is taken, if it is the same, and each cache stands alone afterwards."""

import errno
import json
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from probsurgery.pipeline.config import ExtractConfig, FitConfig, SurgerySettings
from probsurgery.pipeline.datasets.tasks import open_images
from probsurgery.pipeline.extraction import encode, run_plan
from probsurgery.pipeline.extraction.extract import extract as run_extract
from probsurgery.pipeline.files import broken_seal
from probsurgery.pipeline.fitting.fit import fit
from probsurgery.pipeline.models.architectures import MINI
from probsurgery.pipeline.store import arrays, manifest, writer
from probsurgery.pipeline.store import cache as store_module
from probsurgery.pipeline.store.cache import Cache
from probsurgery.pipeline.store.maintenance import remove
from support import damage, drop_seal

TASKS = ("digits8", "texture")
LIMIT = 90
ROWS = LIMIT * len(TASKS)


@pytest.fixture(autouse=True, scope="module")
def _small_shards():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arrays, "SHARD_ROWS", 32)
        patch.setattr(arrays, "CHUNK_ROWS", 16)
        yield


def config(root, merge="ta", **other):
    base = {"arch": "mini", "tasks": TASKS, "limit": LIMIT, "root": root, "device": "cpu", "merges": (merge,)}
    return ExtractConfig(**(base | other))


@pytest.fixture(scope="module")
def extracted(tmp_path_factory):
    """A cache in each store, of the first merge."""
    roots = {store: tmp_path_factory.mktemp(store) for store in ("zarr", "hdf5")}
    return {store: run_extract(config(root, store=store)).caches[0] for store, root in roots.items()}


@pytest.fixture
def first(extracted, tmp_path):
    """The folder of a cache of the first merge; the tests look for what is taken from it."""
    return copied(extracted["zarr"], tmp_path)


@pytest.fixture
def first_in_store(extracted, tmp_path, store):
    return copied(extracted[store], tmp_path)


def copied(cache, root):
    return shutil.copytree(cache, root / cache.name)


@pytest.fixture
def counted(monkeypatch):
    """Images that each encoder really sees."""
    seen = []

    def counting(tower, images, inner=encode.encode):
        seen.append(len(images))
        return inner(tower, images)

    monkeypatch.setattr(encode, "encode", counting)
    return seen


def test_a_second_merge_runs_the_encoder_once_for_each_image(tmp_path, store, counted):
    first = run_extract(config(tmp_path, store=store))
    assert (first.passes, sum(counted), first.taken) == (3 * ROWS, 3 * ROWS, {})
    counted.clear()
    second = run_extract(config(tmp_path, "ties", store=store))
    assert (second.passes, sum(counted)) == (ROWS, ROWS)
    assert second.taken == {first.caches[0].name: 2 * ROWS}
    (alone,) = run_extract(config(tmp_path / "alone", "ties", store=store)).caches
    assert Cache(second.caches[0]).content == Cache(alone).content
    assert Cache(second.caches[0]).manifest.runs[0].taken == second.taken


def test_merges_of_one_run_save_a_pass_once(first, tmp_path, counted):
    counted.clear()
    both = run_extract(config(tmp_path, merges=("ties", "wa")))
    assert both.passes == sum(counted) == 2 * ROWS
    assert both.taken == {first.name: 2 * ROWS}


def test_features_are_linked_and_outlive_the_cache_they_came_from(first_in_store, tmp_path, store):
    (second,) = run_extract(config(tmp_path, "ties", store=store)).caches
    files = [Cache(path).file("test/texture/expert", 1) for path in (first_in_store, second)]
    assert files[0].samefile(files[1])
    content = Cache(second).content
    remove(first_in_store)
    assert not first_in_store.exists()
    moved = second.rename(tmp_path / "elsewhere")
    assert damage(Cache(moved)) == []
    assert Cache(moved).content == content
    assert fit(FitConfig(moved, SurgerySettings(steps=20))).rows


def test_writing_one_cache_anew_leaves_the_other_as_it_is(first_in_store, tmp_path, store):
    (second,) = run_extract(config(tmp_path, "ties", store=store)).caches
    before = Cache(first_in_store).content
    run_extract(config(tmp_path, "ties", store=store, fresh=True, dtype="float16"))
    assert damage(Cache(first_in_store)) == []
    assert Cache(first_in_store).content == before
    assert Cache(second).identity.dtype == "float16"


def test_without_hard_links_features_are_copied(first_in_store, tmp_path, store, monkeypatch):
    def link(*paths, **named):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(writer, "os", type("os", (), vars(os) | {"link": staticmethod(link)}))
    second = run_extract(config(tmp_path, "ties", store=store))
    assert second.taken
    files = [Cache(path).file("test/texture/expert", 1) for path in (first_in_store, second.caches[0])]
    assert not files[0].samefile(files[1])
    assert files[0].read_bytes() == files[1].read_bytes()
    assert damage(Cache(second.caches[0])) == []


def test_features_in_another_store_are_written_anew_and_not_encoded(first, tmp_path):
    second = run_extract(config(tmp_path, "ties", store="hdf5"))
    assert second.passes == ROWS
    (alone,) = run_extract(config(tmp_path / "alone", "ties")).caches
    assert Cache(second.caches[0]).content == Cache(alone).content
    assert damage(Cache(second.caches[0])) == []


def test_a_merge_of_other_tasks_shares_the_experts_that_both_have(first, tmp_path):
    again = run_extract(config(tmp_path, tasks=("texture",)))
    assert again.passes == LIMIT
    assert sum(again.taken.values()) == 2 * LIMIT


@pytest.mark.parametrize(
    "change",
    [{"limit": LIMIT - 1}, {"dtype": "float16"}, {"precision": "bf16"}, {"split": "train"}],
    ids=lambda change: next(iter(change)),
)
def test_other_features_are_not_taken(first, tmp_path, change):
    assert run_extract(config(tmp_path, "ties", **change)).taken == {}


def test_another_experts_features_are_not_taken(first, tmp_path):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for name in ("pretrained", "classifiers", *TASKS):
        state = load_file(MINI / "weights" / f"{name}.safetensors")
        if name == "texture":
            state["proj"] *= 1.01
        save_file(state, folder / f"{name}.safetensors")
    second = run_extract(config(tmp_path, "ties", checkpoints=str(folder)))
    assert sum(second.taken.values()) == ROWS + LIMIT  # pre-trained of both tasks, and the expert that is the same
    (alone,) = run_extract(config(tmp_path / "alone", "ties", checkpoints=str(folder))).caches
    assert Cache(second.caches[0]).content == Cache(alone).content


def test_a_damaged_shard_is_encoded_anew_and_said(first_in_store, tmp_path, store):
    file = Cache(first_in_store).file("test/texture/expert", 1)
    content = bytearray(file.read_bytes())
    content[50] ^= 1
    file.write_bytes(content)
    second = run_extract(config(tmp_path, "ties", store=store))
    assert any(str(file) in note and "encoded again" in note for note in second.notes)
    assert second.passes == ROWS + 32
    assert damage(Cache(second.caches[0])) == []
    (alone,) = run_extract(config(tmp_path / "alone", "ties", store=store)).caches
    assert Cache(second.caches[0]).content == Cache(alone).content


def test_a_cache_that_cannot_be_read_is_passed_by(first, tmp_path):
    (first / "manifest.json").write_text("{")
    (tmp_path / "stranger").mkdir()
    (tmp_path / "stranger" / "manifest.json").write_text(json.dumps({"schema": 7}))
    assert run_extract(config(tmp_path, "ties")).taken == {}


def test_an_unfinished_cache_gives_what_it_has(tmp_path):
    def interrupt(done, total, what="", unit=None):
        if unit is None and done > LIMIT:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_extract(config(tmp_path), interrupt)
    second = run_extract(config(tmp_path, "ties"))
    assert 0 < sum(second.taken.values()) < 2 * ROWS
    assert damage(Cache(second.caches[0])) == []


def test_images_that_were_left_out_are_left_out_again(tmp_path, monkeypatch):
    """Their parts are taken by a run that leaves images out too, and by no other."""

    def some_broken(task, *rest, **named):
        images = open_images(task, *rest, **named)

        def decode(row):
            if task.name == "texture" and row == 40:
                raise Image.DecompressionBombError("too large")
            return images.decode(row)

        return replace(images, decode=decode)

    monkeypatch.setattr(run_plan, "open_images", some_broken)
    run_extract(config(tmp_path, skip_bad=True))
    with pytest.raises(Exception, match="image 40 of test/texture cannot be decoded"):
        run_extract(config(tmp_path, "wa"))
    second = run_extract(config(tmp_path, "ties", skip_bad=True))
    assert second.passes == ROWS
    cache = Cache(second.caches[0])
    assert cache.skipped("texture") == {40: "too large"}
    assert cache.rows("texture") == LIMIT - 1
    assert damage(cache) == []
    assert np.isfinite(cache.features("texture", "expert").numpy()).all()


def test_a_shard_that_a_killed_run_had_linked_already_is_taken_again(first_in_store, tmp_path, store):
    (second,) = run_extract(config(tmp_path, "ties", store=store)).caches
    drop_seal(second, "test/texture/expert", 1)
    assert run_extract(config(tmp_path, "ties", store=store)).taken == {first_in_store.name: 32}
    assert damage(Cache(second)) == []
    assert not list(second.rglob("*.partial"))


def test_what_may_not_be_read_is_passed_by(first, tmp_path, monkeypatch):
    """The superuser may read anything, so the answer of the system is set here."""
    (tmp_path / "locked").mkdir()
    forbidden = Cache(first).file("test/texture/expert", 1)

    def refuse(path, inner):
        if path.parent.name == "locked" or path == forbidden:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return inner(path)

    monkeypatch.setattr(manifest, "os", type("os", (), {"path": type("path", (), {"lexists": lambda path: True})}))
    monkeypatch.setattr(manifest, "refuse_links", lambda path: refuse(path / "x", lambda path: None))
    monkeypatch.setattr(
        store_module, "broken_seal", lambda path, sealed: refuse(path, lambda p: broken_seal(p, sealed))
    )
    second = run_extract(config(tmp_path, "ties"))
    assert second.passes == ROWS + 32
    assert any(str(forbidden) in note and "cannot be read" in note for note in second.notes)


def test_a_link_in_a_sibling_is_not_followed(first, tmp_path):
    file = Cache(first).file("test/texture/expert", 1)
    shutil.move(file, tmp_path / "outside")
    file.symlink_to(tmp_path / "outside")
    assert run_extract(config(tmp_path, "ties")).taken == {}
