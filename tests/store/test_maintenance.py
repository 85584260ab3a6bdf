"""Looking after caches: damage of every kind is found and mended, values survive a conversion, removal asks."""

import contextlib
import json
import os
import random
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from probsurgery import cli
from probsurgery.pipeline.config import ExtractConfig, FitConfig, SurgerySettings
from probsurgery.pipeline.errors import DamagedCacheError, InputError, ProbsurgeryError
from probsurgery.pipeline.extraction.extract import extract
from probsurgery.pipeline.files import seal
from probsurgery.pipeline.fitting.fit import fit
from probsurgery.pipeline.store import arrays, maintenance
from probsurgery.pipeline.store.cache import Cache
from probsurgery.pipeline.store.lock import locked
from support import damage, drop_seal, edit_manifest, identity, opened, refused, write_cache

TASKS = ("digits8", "texture")


@pytest.fixture(autouse=True, scope="module")
def _small_shards():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arrays, "SHARD_ROWS", 32)
        patch.setattr(arrays, "CHUNK_ROWS", 16)
        yield


def config(out, store, **other):
    base = {"arch": "mini", "tasks": TASKS, "limit": 70, "device": "cpu", "pretrained": False}
    return ExtractConfig(**(base | {"out": out, "store": store} | other))


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    """Caches of the mini suite, to be copied."""
    folder = tmp_path_factory.mktemp("caches")
    return {store: extract(config(folder / store / "cache", store)).caches[0] for store in ("zarr", "hdf5")}


@pytest.fixture
def extracted(caches, tmp_path, store):
    """A cache of the mini suite, and how to extract it again."""
    path = tmp_path / "cache"
    shutil.copytree(caches[store], path)
    return path, lambda: extract(config(path, store))


def files_of(path):
    """What a cache's arrays are made of: shards and what describes them."""
    return sorted(p for p in path.rglob("*") if p.is_file() and p.name not in ("manifest.json", ".lock"))


def flip(file, random_):
    content = bytearray(file.read_bytes())
    content[random_.randrange(len(content))] ^= 1 << random_.randrange(8)
    file.write_bytes(content)


def truncate(file, random_):
    file.write_bytes(file.read_bytes()[: random_.randrange(file.stat().st_size)])


def delete(file, random_):
    file.unlink()


def swap(file, random_):
    """Put another file of the same kind and size, if there is one, in this one's place, and this one in its."""
    others = [p for p in files_of(file.parents[5] if "features.zarr" in str(file) else file.parents[3]) if p != file]
    others = [p for p in others if p.suffix == file.suffix and p.read_bytes() != file.read_bytes()]
    other = max(others, key=lambda p: (p.stat().st_size == file.stat().st_size, random_.random()))
    ours, theirs = file.read_bytes(), other.read_bytes()
    file.write_bytes(theirs)
    other.write_bytes(ours)


def zero(file, random_):
    file.write_bytes(bytes(file.stat().st_size))


@pytest.mark.parametrize("harm", [flip, truncate, delete, swap, zero])
def test_no_damage_goes_unnoticed_and_all_is_mended(extracted, run, harm):
    """Every file of the cache is damaged in turn; `verify` names it, `--repair` and `extract` make it as it was."""
    path, again = extracted
    kept, content, random_ = path.with_name("kept"), Cache(path).content, random.Random(harm.__name__)
    shutil.copytree(path, kept)
    shards = [f for f in files_of(path) if f.name != "zarr.json" and f.name != "features.h5"]
    if harm is swap:
        files = [f for f in shards if "test" in f.parts]
    else:
        files = files_of(path)
    assert len(files) > 15
    for file in files:
        harm(file, random_)
        found = damage(Cache(path))
        assert any(str(file) in problem for problem in found), file
        shutil.rmtree(path)
        shutil.copytree(kept, path)
    for file in random_.sample(files, 3):
        harm(file, random_)
    status, out, err = run("cache", "verify", path, "--repair")
    assert (status, err) == (1, "")
    assert "dropped; run the same `probsurgery extract` again" in out
    assert damage(Cache(path)) == []
    result = again()
    assert result.images <= 6 * 32
    assert run("cache", "verify", path)[0] == 0
    assert Cache(path).content == content


@pytest.mark.parametrize("task", TASKS)
def test_a_fit_refuses_a_damaged_array_by_name(extracted, run, task):
    path, _ = extracted
    for kind in ("merged", "expert", "labels"):
        file = Cache(path).file(f"test/{task}/{kind}", 1)
        content = file.read_bytes()
        flip(file, random.Random(0))
        for command in (["fit", "--steps", 5], ["sweep", "--steps", 5]):
            refused(run(*command, "--cache", path), str(file), f"--repair {path}")
        file.write_bytes(content)
    assert run("fit", "--cache", path, "--steps", 5)[0] == 0


def test_verify_prints_a_line_for_each_array_with_its_digest(extracted, run):
    path, _ = extracted
    out = run("cache", "verify", path)[1].splitlines()
    arrays = Cache(path).manifest.arrays
    assert [line.split()[0] for line in out[:-1]] == list(arrays)
    assert all(line.endswith(" ok") for line in out[:-1])
    assert f"{len(arrays)} arrays, " in out[-1]
    about = json.loads(run("cache", "verify", path, "--json")[1])
    assert about["damage"] == []
    assert about["content"] == Cache(path).content
    assert len({array["digest"] for array in about["arrays"].values()}) == len(arrays)


def test_a_digest_is_of_the_values_alone(tmp_path):
    """The same in both stores, another for one changed value."""

    def change(task, arrays):
        arrays["expert"][3, 1] += 1
        return arrays

    paths = [write_cache(tmp_path / s, {"a": 50}, s) for s in ("zarr", "hdf5")]
    paths.append(write_cache(tmp_path / "changed", {"a": 50}, change=change))
    digests = [{one.name: one.digest for one in maintenance.check(Cache(path))} for path in paths]
    assert digests[0] == digests[1]
    assert {name for name in digests[0] if digests[0][name] != digests[2][name]} == {"test/a/expert"}
    assert Cache(paths[0]).content == Cache(paths[1]).content != Cache(paths[2]).content


def test_wrong_labels_and_features_that_are_no_numbers_are_found(tmp_path, store):
    def spoil(task, arrays):
        arrays["labels"][40] = 7
        arrays["merged"][5, 1] = np.nan
        return arrays

    found = damage(Cache(write_cache(tmp_path / "cache", {"a": 50}, store, change=spoil)))
    assert len(found) == 2
    assert any("has 1 rows that are not classes (0 to 2)" in problem for problem in found)
    assert any("has 1 rows that are NaN" in problem for problem in found)


def test_what_plain_readers_are_shown_is_compared(extracted, store):
    """A description that is whole, sealed, and of another array."""
    path, _ = extracted
    if store == "hdf5":
        import h5py

        with h5py.File(path / "features.h5", "a") as file:
            del file["test/texture/merged"]
            file["test/texture/merged"] = file["test/digits8/merged"]
        changed = path / "features.h5"
    else:
        changed = path / "features.zarr" / "test" / "texture" / "merged" / "zarr.json"
        changed.write_text(
            changed.read_text().replace('"NaN"', '"NaN"').replace('"separator": "/"', '"separator": "."')
        )
    sealed = seal(changed).to_json()
    edit_manifest(path, lambda m: m["metadata"].update({changed.relative_to(path).as_posix(): sealed}))
    assert any("does not describe test/texture/merged" in problem for problem in damage(Cache(path)))


def test_repair_waits_for_nobody(extracted, run):
    path, _ = extracted
    with locked(path):
        refused(run("cache", "verify", path, "--repair"), "another process is writing")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_conversion_keeps_the_values_and_is_a_cache_like_any(extracted, store, dtype, tmp_path):
    path, _ = extracted
    other = {"zarr": "hdf5", "hdf5": "zarr"}[store]
    new = maintenance.convert(path, other, dtype)
    assert new == tmp_path / ("cache_" + (other if dtype == "float32" else f"{other}_{dtype}"))
    assert damage(Cache(new)) == []
    fresh = config(tmp_path / "fresh" / "c", other, dtype=dtype)
    extract(fresh)
    assert Cache(new).content == Cache(fresh.out).content
    assert Cache(new).identity == Cache(fresh.out).identity
    assert (Cache(new).content == Cache(path).content) == (dtype == "float32")
    rows = [fit(FitConfig(each, SurgerySettings(steps=20))).rows for each in (new, fresh.out)]
    assert [row.accuracy for row in rows[0]] == [row.accuracy for row in rows[1]]
    assert extract(config(new, other, dtype=dtype)).images == 0


def test_an_interrupted_conversion_goes_on(extracted, store, tmp_path):
    path, _ = extracted
    other = {"zarr": "hdf5", "hdf5": "zarr"}[store]

    def interrupt(done, total, what=""):
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        maintenance.convert(path, other, progress=interrupt)
    counted = []
    new = maintenance.convert(path, other, progress=lambda done, total, what="": counted.append(total))
    assert Cache(new).content == Cache(path).content
    assert counted[-1] == sum(len(spec.shards) for spec in Cache(path).manifest.arrays.values()) - 4


def test_a_conversion_of_what_has_changed_is_refused(extracted, store, tmp_path):
    """Else arrays of then would stand under a manifest of now."""
    path, _ = extracted
    other = {"zarr": "hdf5", "hdf5": "zarr"}[store]
    new = maintenance.convert(path, other)
    content = Cache(new).content
    assert maintenance.convert(path, other) == new
    edit_manifest(path, lambda m: m["tasks"]["texture"]["splits"]["test"].update(fingerprint="of other images"))
    with pytest.raises(InputError, match=r"was not made from .* as it is now; remove it with `probsurgery cache rm`"):
        maintenance.convert(path, other)
    assert Cache(new).content == content
    assert Cache(new).manifest.tasks != Cache(path).manifest.tasks


def test_a_conversion_goes_beside_the_cache_wherever_one_stands(extracted, monkeypatch):
    path, _ = extracted
    (path / "heads").mkdir()
    for folder, name in ((path, "."), (path / "heads", "..")):
        monkeypatch.chdir(folder)
        new = maintenance.convert(Path(name), dtype="float16")
        assert new.resolve() == path.with_name("cache_float16")


def test_bad_conversions(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_cache(tmp_path / "one", {"a": 40})
    write_cache(tmp_path / "half", {"a": 40}, dtype="float16")
    for arguments, words in [
        (["one"], ["zarr and float32 already", "--store or --dtype"]),
        (["one", "--store", "zarr"], ["zarr and float32 already"]),
        (["one", "--store", "csv"], ["'csv'", "zarr, hdf5"]),
        (["one", "--dtype", "int8"], ["'int8'", "float32, float16"]),
        (["half", "--dtype", "float32"], ["would not bring back", "extract it again"]),
        (["one", "--store", "hdf5", "--out", "one"], ["is the cache itself"]),
        (["one", "--store", "hdf5", "--out", "half"], ["other settings", "store: zarr / hdf5"]),
        (["nothing", "--store", "hdf5"], ["does not exist"]),
    ]:
        refused(run("cache", "convert", *arguments), *words)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["half", "one"]


def test_a_conversion_beyond_the_types_range_is_refused(tmp_path):
    def large(task, arrays):
        arrays["merged"][7, 0] = 1e6
        return arrays

    path = write_cache(tmp_path / "large", {"a": 40}, change=large)
    with pytest.raises(ProbsurgeryError, match=r"test/a/merged has values beyond float16's range; keep float32"):
        maintenance.convert(path, dtype="float16")


def test_a_damaged_cache_is_not_converted(tmp_path, store):
    path = write_cache(tmp_path / "cache", {"a": 40}, store)
    flip(Cache(path).file("test/a/merged", 1), random.Random(0))
    with pytest.raises(DamagedCacheError, match="was changed"):
        maintenance.convert(path, {"zarr": "hdf5", "hdf5": "zarr"}[store])


def test_ls_lists_what_is_there(tmp_path, run, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(run("cache", "ls"), "no folder cache")
    (tmp_path / "cache").mkdir()
    assert run("cache", "ls")[1].startswith("0 caches in cache, 0 bytes")
    write_cache(tmp_path / "cache" / "one", {"a": 40, "b": 20})
    path = write_cache(tmp_path / "cache" / "two", {"a": 40}, "hdf5")
    fit(FitConfig(path, SurgerySettings(steps=5)))
    write_cache(tmp_path / "cache" / "bad", {"a": 40})
    (tmp_path / "cache" / "bad" / "manifest.json").write_text("{\x1b[31m")
    (tmp_path / "cache" / "thesis").mkdir()
    out = run("cache", "ls")[1]
    lines = {line.split()[0]: line for line in out.splitlines() if line.split()}
    assert "zarr" in lines["one"]
    assert "complete" in lines["one"]
    assert "hdf5" in lines["two"]
    assert "not valid JSON" in lines["bad"] or "not valid JSON" in out
    assert "thesis" not in out
    assert "\x1b" not in out
    assert " kB" in lines["one"]
    about = {Path(one["path"]).name: one for one in json.loads(run("cache", "ls", "--json")[1])}
    assert (about["one"]["rows"], about["two"]["heads"], about["one"]["missing"]) == (60, 1, 0)
    assert "problem" in about["bad"]
    assert json.loads(run("cache", "ls", "cache/two", "--json")[1])[0]["tasks"] == ["a"]


def test_info_says_what_a_cache_is_made_from(extracted, run):
    path, _ = extracted
    out = run("cache", "info", path)[1]
    for words in ("mini, merged by ta scale=0.3", "texture.safetensors", "packages", "complete", " kB", "torch "):
        assert words in out
    about = json.loads(run("cache", "info", path, "--json")[1])
    assert about["bytes"] == sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
    assert about["content"] == Cache(path).content
    assert about["arrays"]["test/texture/merged"]["shards"] == 3
    assert about["runs"][0]["passes"] == 2 * 2 * 70
    Cache(path).file("test/texture/merged", 0).unlink()
    drop_seal(path, "test/texture/merged", 0)
    assert "1 of 9 shards missing" in run("cache", "info", path)[1]


def test_rm_asks_and_removes_what_is_its_own(tmp_path, run, monkeypatch):
    path = write_cache(tmp_path / "cache", {"a": 40})
    fit(FitConfig(path, SurgerySettings(steps=5)))
    refused(run("cache", "rm", path), "no terminal", "--yes")
    answers = iter([False, True])
    monkeypatch.setattr(sys, "stdin", type("Terminal", (), {"isatty": lambda self: True})())
    asked = []
    monkeypatch.setattr(cli.typer, "confirm", lambda text, err: (asked.append(text), next(answers))[1])
    status, _, err = run("cache", "rm", path)
    assert (status, err) == (0, f"{path} is kept\n")
    assert "1 head and their results" in asked[0]
    assert path.exists()
    (path / "notes.txt").write_text("mine")
    assert "files in it that are no part" in run("cache", "rm", path)[1]
    assert [p.name for p in path.rglob("*")] == ["notes.txt"]


def test_what_a_killed_removal_leaves_can_be_removed_and_replaced(tmp_path, run, monkeypatch, store):
    """Killed between any two of its steps: `rm` again ends it, and `--fresh` begins anew without the old heads."""
    kept = write_cache(tmp_path / "kept", {"a": 40}, store)
    fit(FitConfig(kept, SurgerySettings(steps=5)))
    (kept / ".lock").touch()
    path, steps = tmp_path / "cache", 0

    def kill(self, *arguments, inner, **named):
        nonlocal steps
        if path in (Path(self), *Path(self).parents) and Path(self).name != ".owner":
            steps -= 1
            if steps < 0:
                raise KeyboardInterrupt
        return inner(self, *arguments, **named)

    for after in range(12):
        for again in ("rm", "fresh"):
            shutil.copytree(kept, path)
            steps = after
            with pytest.MonkeyPatch.context() as patch:
                for owner, name in ((Path, "unlink"), (shutil, "rmtree")):
                    inner = getattr(owner, name)
                    patch.setattr(owner, name, lambda p, *a, inner=inner, **k: kill(p, *a, inner=inner, **k))
                with contextlib.suppress(KeyboardInterrupt):
                    maintenance.remove(path)
            if path.exists() and again == "rm":
                assert len(json.loads(run("cache", "ls", tmp_path, "--json")[1])) == 2
                assert run("cache", "rm", "--yes", path)[0] == 0
            elif path.exists():
                with opened(path, identity(["a"]), store, fresh=True):
                    pass
                assert not (path / "heads").exists()
                maintenance.remove(path)
            assert not path.exists()


def test_one_cache_named_twice_is_removed_once(tmp_path, run):
    path = write_cache(tmp_path / "cache", {"a": 40})
    (path / "notes.txt").write_text("mine")
    assert run("cache", "rm", "--yes", path, path)[0] == 0
    assert [p.name for p in path.iterdir()] == ["notes.txt"]


def test_a_check_beside_an_extraction_finds_no_damage(tmp_path, store):
    path = write_cache(tmp_path / "cache", {"a": 40}, store, merged=("a", "b"))
    opened_before = Cache(path)
    with opened(path, opened_before.identity, store) as writer:
        writer.declare({"train/a/labels": arrays.ArraySpec((5,), "int64")})
    assert damage(opened_before) == []


def test_rm_of_what_is_no_cache(tmp_path, run):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.tex").write_text("mine")
    path = write_cache(tmp_path / "cache", {"a": 40})
    refused(run("cache", "rm", "--yes", path, tmp_path / "folder"), "not a cache")
    refused(run("cache", "rm", "--yes", tmp_path / "nothing"), "does not exist")
    (tmp_path / "link").symlink_to(path)
    refused(run("cache", "rm", "--yes", tmp_path / "link"), "is a link")
    with locked(path):
        refused(run("cache", "rm", "--yes", path), "another process is writing", f"process {os.getpid()}")
    assert damage(Cache(path)) == []
    (path / "manifest.json").write_text("{")
    assert run("cache", "rm", "--yes", path)[0] == 0
    assert not path.exists()


def test_a_checked_cache_with_missing_shards_is_no_damaged_one(tmp_path, run):
    path = write_cache(tmp_path / "cache", {"a": 40})
    drop_seal(path, "test/a/expert", 1)
    status, out, _ = run("cache", "verify", path)
    assert status == 0
    assert "1 missing" in out
    with pytest.raises(InputError, match="unfinished"):
        Cache(path).features("a")
