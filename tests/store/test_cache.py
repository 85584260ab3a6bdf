"""Caches on disk: one set of tests over both stores, damage included."""

import json

import h5py
import numpy as np
import pytest
import zarr

from probsurgery.pipeline.errors import DamagedCacheError, InputError
from probsurgery.pipeline.files import write_atomically
from probsurgery.pipeline.store.arrays import SHARD_ROWS, ArraySpec
from probsurgery.pipeline.store.cache import Cache
from probsurgery.pipeline.store.manifest import MergeIdentity
from probsurgery.pipeline.store.target import check_target
from support import DIM, damage, identity, opened, synthetic, write_cache

ROWS = 2 * SHARD_ROWS + 100


@pytest.fixture
def cache(tmp_path, store):
    return Cache(write_cache(tmp_path / "cache", {"a": ROWS, "b": 30}, store))


def shard(cache, name="test/a/merged", number=1):
    return cache.file(name, number)


def test_what_is_written_is_read(cache):
    expected = synthetic(ROWS, seed=0)
    for kind in ("merged", "expert", "pretrained"):
        values = cache.features("a", kind)
        assert values.dtype.is_floating_point
        assert np.array_equal(values.numpy(), expected[kind])
    assert np.array_equal(cache.labels("a").numpy(), expected["labels"])
    assert np.array_equal(cache.classifier("a").numpy(), expected["classifier"])
    assert cache.tasks() == ("a", "b")
    assert cache.rows("a") == ROWS
    assert damage(cache) == []


def test_float16_is_kept_as_such_and_read_as_float32(tmp_path, store):
    cache = Cache(write_cache(tmp_path / "half", {"a": 50}, store, dtype="float16"))
    assert cache.manifest.arrays["test/a/merged"].dtype == "float16"
    values = cache.features("a").numpy()
    assert values.dtype == np.float32
    assert np.array_equal(values, synthetic(50)["merged"].astype("float16").astype("float32"))


def plain(cache, name):
    """The array as a user of plain zarr or h5py reads it."""
    if cache.manifest.store == "zarr":
        return zarr.open(str(cache.path / "features.zarr"))[name][:]
    with h5py.File(cache.path / "features.h5") as file:
        return file[name][:]


def test_plain_zarr_and_h5py_read_it_wherever_it_is_moved(cache, tmp_path):
    moved = Cache(cache.path.rename(tmp_path / "moved"))
    expected = synthetic(ROWS, seed=0)
    assert np.array_equal(plain(moved, "test/a/merged"), expected["merged"])
    assert np.array_equal(plain(moved, "test/a/labels"), expected["labels"])
    assert np.array_equal(plain(moved, "classifiers/a"), expected["classifier"])


@pytest.mark.parametrize("position", [100, 5_000, -40])
def test_a_flipped_byte_is_found_and_named(cache, position):
    path = shard(cache)
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)
    with pytest.raises(DamagedCacheError, match="was changed") as caught:
        cache.features("a")
    assert str(path) in str(caught.value)
    assert len(damage(cache)) == 1
    assert str(path) in damage(cache)[0]
    assert cache.features("a", "expert").shape == (ROWS, DIM)


def test_the_formats_own_checksum_stops_plain_readers(cache):
    path = shard(cache)
    content = bytearray(path.read_bytes())
    at = content.find(synthetic(ROWS, seed=0)["merged"][SHARD_ROWS + 7].tobytes())
    assert at > 0
    content[at + 5] ^= 0x10
    path.write_bytes(content)
    with pytest.raises((OSError, ValueError)):
        plain(cache, "test/a/merged")


def test_a_deleted_shard_is_found_and_plain_readers_see_no_zeros(cache):
    shard(cache).unlink()
    with pytest.raises(DamagedCacheError, match="is missing"):
        cache.features("a")
    assert "is missing" in damage(cache)[0]
    assert np.isnan(plain(cache, "test/a/merged")[SHARD_ROWS : 2 * SHARD_ROWS]).all()
    shard(cache, "test/a/labels").unlink()
    assert (plain(cache, "test/a/labels")[SHARD_ROWS : 2 * SHARD_ROWS] == -1).all()


def test_a_truncated_shard_is_found(cache):
    path = shard(cache)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(DamagedCacheError, match="bytes instead of"):
        cache.features("a")


def test_a_shard_in_anothers_place_is_found(cache):
    shard(cache, number=1).write_bytes(shard(cache, number=0).read_bytes())
    with pytest.raises(DamagedCacheError, match="was changed"):
        cache.features("a")


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_a_constant_chunk_is_written_and_its_loss_noticed(tmp_path, store, value):
    def blank(task, arrays):
        arrays["merged"][:] = value
        return arrays

    cache = Cache(write_cache(tmp_path / "blank", {"a": 300}, store, change=blank))
    assert shard(cache, number=0).stat().st_size > 300 * DIM * 4
    if value == 0:
        assert cache.features("a").abs().sum() == 0
    shard(cache, number=0).unlink()
    with pytest.raises(DamagedCacheError, match="is missing"):
        cache.features("a")


def test_nan_features_are_named_by_task_and_row(tmp_path, store):
    def spoil(task, arrays):
        arrays["expert"][SHARD_ROWS + 3, 2] = np.inf
        return arrays

    cache = Cache(write_cache(tmp_path / "nan", {"a": ROWS}, store, change=spoil))
    with pytest.raises(InputError, match=f"1 rows of test/a/expert are NaN.*, the first is row {SHARD_ROWS + 3}"):
        cache.features("a", "expert")


def test_a_cache_of_other_settings_is_refused_with_the_difference(cache, store):
    def times():  # not the lock's: some releases of filelock touch its file, which holds nothing
        return {p: p.stat().st_mtime_ns for p in cache.path.rglob("*") if p.name != ".lock"}

    before = times()
    for change, words in [
        ({"dtype": "float16"}, "dtype: float32 / float16"),
        ({"dim": 32}, "dim: 16 / 32"),
        ({"merge": MergeIdentity("wa", {}, digest="0")}, "merge.method: ta / wa"),
    ]:
        other = identity(["a", "b"], **change)
        with pytest.raises(InputError, match=words), opened(cache.path, other, store):
            pass
    other_store = {"zarr": "hdf5", "hdf5": "zarr"}[store]
    with pytest.raises(InputError, match="store: "), opened(cache.path, cache.identity, other_store):
        pass
    assert times() == before


def test_fresh_replaces_a_cache_and_its_heads(cache, store):
    (cache.path / "heads").mkdir()
    (cache.path / "results.jsonl").write_text("{}\n")
    with opened(cache.path, identity(["c"]), store, fresh=True):
        pass
    again = Cache(cache.path)
    assert again.identity.tasks == ("c",)
    assert not again.manifest.arrays
    assert not (cache.path / "heads").exists()
    assert not (cache.path / "results.jsonl").exists()


def test_no_folder_but_a_cache_is_written_into(tmp_path, store):
    (tmp_path / "thesis.tex").write_text("mine")
    for fresh in (False, True):
        with (
            pytest.raises(InputError, match="not a cache"),
            opened(tmp_path, identity(["a"]), store, fresh=fresh),
        ):
            pass
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]
    with (
        pytest.raises(InputError, match="is a file"),
        opened(tmp_path / "thesis.tex" / "cache", identity(["a"]), store),
    ):
        pass


@pytest.mark.parametrize("fresh", [True, False])
def test_a_folder_whose_files_happen_to_have_our_names_is_spared(tmp_path, store, fresh):
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "train-000.tar").write_text("precious")
    for lock in (None, "of another program"):
        if lock:
            (tmp_path / ".lock").write_text(lock)
        with pytest.raises(InputError, match="is not a cache"):
            check_target(tmp_path, identity(["a"]), store, fresh=fresh)
    assert (tmp_path / "shards" / "train-000.tar").read_text() == "precious"


def test_fresh_spares_another_programs_files(tmp_path, store):
    (tmp_path / "heads").mkdir()
    (tmp_path / "draft.partial").write_text("mine")
    (tmp_path / "manifest.json").write_text('{"manifest_version": 3, "schema": 1, "name": "a web extension"}')
    for fresh in (True, False):
        with (
            pytest.raises(InputError, match="not a cache's manifest"),
            opened(tmp_path, identity(["a"]), store, fresh=fresh),
        ):
            pass
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "draft.partial", "heads", "manifest.json"]


@pytest.mark.parametrize("name", ["merged", "labels"])
def test_a_changed_byte_order_is_not_read_as_data(tmp_path, name):
    """It lies outside the shard's file, so the file's own digest does not see it."""
    cache = Cache(write_cache(tmp_path / "cache", {"a": 30}))
    described = cache.path / "features.zarr" / "test" / "a" / name / "zarr.json"
    described.write_text(described.read_text().replace('"little"', '"big"', 1))
    with pytest.raises(DamagedCacheError):
        cache.labels("a") if name == "labels" else cache.features("a")
    assert len(damage(cache)) == 1


def test_places_that_cannot_be_written_are_refused(tmp_path, store):
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name in ("dangling", "loop", "x" * 300):
        with pytest.raises(InputError, match="cannot write to"), opened(tmp_path / name, identity(["a"]), store):
            pass


def test_two_writers_do_not_meet(cache, store):
    with (
        opened(cache.path, cache.identity, store),
        pytest.raises(InputError, match="another process is writing"),
        opened(cache.path, cache.identity, store),
    ):
        pass


def test_an_unfinished_cache_says_what_is_missing(tmp_path, store):
    path = tmp_path / "cache"
    with opened(path, identity(["a", "b"]), store) as writer:
        writer.request(["test/a", "test/b"])
        writer.declare({"test/a/merged": ArraySpec((ROWS, DIM), "float32")})
        writer.write(0, {"test/a/merged": np.zeros((SHARD_ROWS, DIM), "float32")})
    cache = Cache(path)
    with pytest.raises(InputError, match="unfinished: a .*2 of 3 shards are missing"):
        cache.tasks()
    with pytest.raises(InputError, match="unfinished: b .*not begun"):
        cache.features("b")
    assert np.isnan(plain(cache, "test/a/merged")[SHARD_ROWS:]).all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m | {"schema": 99}, "newer version"),
        (lambda m: m | {"schema": "one"}, "not a cache's manifest"),
        (lambda m: {k: v for k, v in m.items() if k != "arrays"}, "was changed since it was written"),
        (lambda m: m | {"store": "csv"}, "was changed since it was written"),
        (lambda m: m | {"identity": {}}, "was changed since it was written"),
        (lambda m: [m], "not a cache's manifest"),
    ],
)
def test_strange_manifests_are_refused(cache, change, words):
    write_atomically(cache.path / "manifest.json", json.dumps(change(cache.manifest.to_json())))
    with pytest.raises(InputError, match=words):
        Cache(cache.path)


def test_places_without_a_cache_are_refused(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        Cache(tmp_path / "nothing")
    with pytest.raises(InputError, match=r"no manifest\.json"):
        Cache(tmp_path)
    (tmp_path / "manifest.json").write_text('{"schema": 1, "arr')
    with pytest.raises(DamagedCacheError, match="not valid JSON"):
        Cache(tmp_path)


def test_lost_metadata_is_found_and_made_again(cache, store):
    lost = {"zarr": "features.zarr/test/a/merged/zarr.json", "hdf5": "features.h5"}[store]
    (cache.path / lost).unlink()
    assert any("which describes" in problem and "is missing" in problem for problem in damage(cache))
    with opened(cache.path, cache.identity, store) as writer:
        for number in writer.missing("test/a/merged"):
            values = synthetic(ROWS, seed=0)["merged"][number * SHARD_ROWS : (number + 1) * SHARD_ROWS]
            writer.write(number, {"test/a/merged": values})
    assert damage(Cache(cache.path)) == []
    assert np.array_equal(plain(cache, "test/a/merged"), synthetic(ROWS, seed=0)["merged"])


def test_malformed_metadata_is_damage(cache, store):
    malformed = {"zarr": "features.zarr/test/a/merged/zarr.json", "hdf5": "shards/test/a/merged-00001.h5"}[store]
    (cache.path / malformed).write_text("[1]")
    with pytest.raises(DamagedCacheError):
        cache.features("a")
    assert damage(cache)


@pytest.mark.parametrize("left", [["manifest.json.partial"], ["features.zarr", "shards", "heads"], []])
@pytest.mark.parametrize("fresh", [True, False])
def test_a_kill_before_the_first_manifest_does_not_bar_the_next_run(tmp_path, store, left, fresh):
    path = tmp_path / "cache"
    path.mkdir()
    (path / ".lock").touch()
    for name in left:
        (path / name).touch() if name.endswith("partial") else (path / name / "old").mkdir(parents=True)
    with opened(path, identity(["a"]), store, fresh=fresh):
        pass
    assert Cache(path).identity.tasks == ("a",)
    assert (path / "heads").exists() == ("heads" in left)
    assert not (path / "features.zarr" / "old").exists()
