"""Caches and heads from someone else: nothing in them is run, nothing outside is touched, no size is believed."""

import json
import os
import pickle
import shutil
import textwrap

import h5py
import numpy as np
import pytest

import processes
from probsurgery.pipeline.config import FitConfig, SurgerySettings
from probsurgery.pipeline.errors import DamagedCacheError, InputError
from probsurgery.pipeline.files import seal, write_atomically
from probsurgery.pipeline.fitting.fit import fit
from probsurgery.pipeline.heads.head import load_head
from probsurgery.pipeline.store.arrays import ArraySpec
from probsurgery.pipeline.store.cache import Cache
from probsurgery.pipeline.store.maintenance import check, convert, remove, repair
from support import damage, edit_manifest, identity, opened, refused, write_cache


@pytest.fixture
def cache(tmp_path, store):
    return Cache(write_cache(tmp_path / "inside" / "cache", {"a": 60}, store))


def forge(cache, change):
    edit_manifest(cache.path, change)


def everything(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and "inside" not in p.parts}


def rename_task(name):
    def change(manifest):
        manifest["identity"]["tasks"] = [name]
        manifest["requested"] = [f"test/{name}"]
        manifest["tasks"] = {name: manifest["tasks"].pop("a")}
        manifest["arrays"] = {n.replace("/a", f"/{name}"): spec for n, spec in manifest["arrays"].items()}

    return change


def bias_of(manifest):
    """What a bias of the classifier of a would have in the manifest."""
    return manifest["arrays"]["classifiers/a"] | {"shape": [3]}


def test_a_bias_without_its_file_is_damage(cache):
    forge(cache, lambda m: m["arrays"].update({"biases/a": bias_of(m)}))
    with pytest.raises(DamagedCacheError, match="biases"):
        Cache(cache.path).linear_classifier("a")
    forge(cache, lambda m: m["arrays"]["biases/a"].update(shards=[None]))
    with pytest.raises(DamagedCacheError, match="lacks biases/a"):
        Cache(cache.path).features("a")


@pytest.mark.parametrize(
    "name", ["..", "../../..", "/etc", "a/../../b", ".", "~", "a\x00b", "a\nb", "", "\x1b[2J", "-x"]
)
def test_names_that_lead_out_of_the_folder_are_refused(cache, name):
    forge(cache, rename_task(name))
    with pytest.raises(DamagedCacheError, match="does not have a manifest's form") as caught:
        Cache(cache.path)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["arrays"].update({"../../outside": m["arrays"]["test/a/merged"]}),
        lambda m: m["arrays"].update({"test/a/merged/x": m["arrays"]["test/a/merged"]}),
        lambda m: m["metadata"].update({"../../outside": {"bytes": 1, "sha256": "0" * 64}}),
        lambda m: m["metadata"].update({"/etc/passwd": {"bytes": 1, "sha256": "0" * 64}}),
        lambda m: m.update(store="../../x"),
        lambda m: m.update(arrays=[]),
        lambda m: m.update(tasks=None),
        lambda m: m.update(requested=["test/../x"]),
        lambda m: m["identity"].update(dim=10**12),
        lambda m: m["identity"].update(dim=-1),
        lambda m: m["identity"].update(dtype="object"),
        lambda m: m["identity"].update(merge=None),
        lambda m: m["arrays"]["test/a/merged"].update(dtype="object"),
        lambda m: m["arrays"]["test/a/merged"].update(dtype="V1000000000"),
        lambda m: m["arrays"]["test/a/merged"].update(shape=[60, 10**12]),
        lambda m: m["arrays"]["test/a/merged"].update(shape=[10**15, 16]),
        lambda m: m["arrays"]["test/a/merged"].update(shape=[10**15, 16], shards=[None] * 3),
        lambda m: m["arrays"]["test/a/merged"].update(shape=[60.0, 16]),
        lambda m: m["arrays"]["test/a/merged"].update(shape=[]),
        lambda m: m["arrays"]["test/a/merged"].update(shards=[{"bytes": 1, "sha256": "0" * 64, "values": "0" * 64}]),
        lambda m: m["arrays"]["test/a/merged"].update(shards=[[]]),
        lambda m: m["tasks"]["a"]["splits"]["test"].update(skipped={"99": "x"}),
        lambda m: m["tasks"]["a"]["splits"]["test"].update(skipped={"-1": "x"}),
        lambda m: m["tasks"]["a"]["splits"]["test"].update(rows=10**15),
        lambda m: m["tasks"]["a"]["splits"]["test"].update(labels="no"),
        lambda m: m["tasks"]["a"].update(normalise="no"),
        lambda m: m["tasks"]["a"].update(title="x" * 1001),
        lambda m: m["arrays"].update({"biases/a": bias_of(m) | {"shape": [4]}}),
        lambda m: m["arrays"].update({"biases/a": bias_of(m) | {"shape": [3, 1]}}),
        lambda m: m["arrays"].update({"biases/a": bias_of(m) | {"dtype": "int64"}}),
        lambda m: m["arrays"].update({"biases/b": bias_of(m)}),
        lambda m: m["arrays"].update({"biases/a": bias_of(m)}) or m["arrays"].pop("classifiers/a"),
    ],
)
def test_a_manifest_that_has_not_its_form_is_refused(cache, change):
    forge(cache, change)
    with pytest.raises(DamagedCacheError, match="does not have a manifest's form"):
        Cache(cache.path)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.update(files=[1]),
        lambda m: m.update(files={"a": 1}),
        lambda m: m.update(software=[1]),
        lambda m: m.update(runs=[{}]),
        lambda m: m.update(runs=[{"images": "x"}]),
        lambda m: m.update(runs=[{"images": 1, "taken": [1]}]),
        lambda m: m.update(runs={"a": 1}),
        lambda m: m.update(precision={"a": "x"}),
        lambda m: m.update(merge=[]),
        lambda m: m.update(merge={"files": {"../../x": {"bytes": 1, "sha256": "0" * 64}}}),
        lambda m: m.update(merge={"files": {"merged.safetensors": {"bytes": -1, "sha256": "0" * 64}}}),
        lambda m: m.update(merge={"coefficients": {"a": [0.1], "b": 0.1, "c": [1, 2]}}),
        lambda m: m.update(merge={"coefficients": {"a": ["x"]}}),
        lambda m: m["identity"]["merge"].update(name=[]),
        lambda m: m.update(converted_from=1),
        lambda m: m["tasks"]["a"].update(origins=[1]),
        lambda m: m["tasks"]["a"].update(origins={"test": 1}),
        lambda m: m["tasks"]["a"]["splits"]["test"].update(skipped=["1"]),
        lambda m: m["tasks"]["a"]["splits"]["test"].update(rows=10**400),
    ],
)
def test_what_is_only_shown_has_its_form_too(cache, run, change):
    forge(cache, change)
    for command in (["cache", "info"], ["cache", "verify"], ["fit", "--cache"]):
        refused(run(*command, cache.path), "does not have a manifest's form")


def test_a_name_is_no_markup_and_no_escape(tmp_path, run):
    path = write_cache(tmp_path / "caches" / "[red]x\x1b[31m\n", {"a": 20})

    def change(manifest):
        manifest["identity"] |= {"arch": "[/x]\x1b[31m", "merge": {"method": "[/y]", "settings": {"a": "\x1b"}}}
        manifest["tasks"]["a"]["origins"] = {"test": {"source": "/data/[/z]\x1b"}}

    forge(Cache(path), change)
    for command in (["ls", path.parent], ["info", path]):
        status, out, err = run("cache", *command)
        assert (status, err) == (0, "")
        assert "[/x]" in out
        assert "\x1b" not in out
    assert "[red]x" in run("cache", "ls", path.parent)[1]


def test_a_task_without_a_usable_image_is_refused(cache, run):
    forge(cache, lambda m: m["tasks"]["a"]["splits"]["test"].update(skipped={str(row): "x" for row in range(60)}))
    for head in ("prob", "ridge"):
        refused(run("fit", "--cache", cache.path, "--head", head), "no image of a (test) could be decoded")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="a system without named pipes")
@pytest.mark.parametrize("name", ["manifest.json", "results.jsonl", "heads"])
def test_a_pipe_is_not_waited_on(cache, run, name):
    (cache.path / name).unlink(missing_ok=True)
    os.mkfifo(cache.path / name)
    refused(run("cache", "info", cache.path), "neither a file nor a folder")
    refused(run("report", "--cache", cache.path), "neither a file nor a folder")


def test_a_strangers_index_is_made_anew_before_it_is_added_to(tmp_path):
    """Else a link in it would be followed by plain readers, and sealed as our own."""
    cache = Cache(write_cache(tmp_path / "cache", {"a": 60}, "hdf5", merged=("a", "b")))
    victim = tmp_path / "victim.h5"
    with h5py.File(victim, "w") as file:
        file["kept"] = 1
    before = victim.read_bytes()
    index = cache.path / "features.h5"
    with h5py.File(index, "a") as file:
        file["train"] = h5py.ExternalLink(str(victim), "/")
    forge(cache, lambda m: m["metadata"].update({"features.h5": seal(index).to_json()}))
    with opened(cache.path, cache.identity, "hdf5") as writer:
        writer.declare({"train/a/labels": ArraySpec((5,), "int64")})
        writer.write(0, {"train/a/labels": np.zeros(5, "int64")})
    assert victim.read_bytes() == before
    assert damage(Cache(cache.path)) == []
    with h5py.File(index) as file:
        assert file["train/a/labels"].shape == (5,)


def test_consolidated_metadata_of_a_stranger_is_named(tmp_path):
    """Plain zarr prefers it to an array's own."""
    cache = Cache(write_cache(tmp_path / "cache", {"a": 60}, "zarr"))
    group = cache.path / "features.zarr" / "zarr.json"
    about = json.loads(group.read_text())
    other = json.loads((group.parent / "test" / "a" / "labels" / "zarr.json").read_text())
    consolidated = {"kind": "inline", "must_understand": False, "metadata": {"test/a/merged": other}}
    group.write_text(json.dumps(about | {"consolidated_metadata": consolidated}))
    forge(cache, lambda m: m["metadata"].update({"features.zarr/zarr.json": seal(group).to_json()}))
    assert any("does not describe" in problem for problem in damage(Cache(cache.path)))


@pytest.mark.parametrize("lacking", ["test/a/labels", "test/a/expert", "classifiers/a", "tasks"])
def test_a_manifest_that_lacks_a_part_is_one_line(cache, run, lacking):
    forge(cache, lambda m: m["tasks"].pop("a") if lacking == "tasks" else m["arrays"].pop(lacking))
    refused(run("fit", "--cache", cache.path, "--steps", 5), "lacks")
    for command in (["info"], ["verify"], ["ls"]):
        assert "Traceback" not in run("cache", *command, cache.path)[2]


def test_a_manifest_that_is_huge_or_deep_is_refused(cache):
    file = cache.path / "manifest.json"
    with file.open("wb") as out:
        out.truncate(10 * 2**30)  # a hole: it takes no room
    with pytest.raises(DamagedCacheError, match="more than"):
        Cache(cache.path)
    file.write_text("[" * 200_000)
    with pytest.raises(DamagedCacheError, match="not valid JSON"):
        Cache(cache.path)


def links(cache):
    """Every place in a cache where a link could stand."""
    (cache.path / "heads").mkdir(exist_ok=True)
    names = ["manifest.json", "heads", "results.jsonl", ".lock", ".owner", "journal", "features.zarr", "features.h5"]
    names += ["shards", "manifest.json.partial", "features.h5.partial", "heads/mine"]
    names += [cache.file("test/a/merged", 0).relative_to(cache.path).as_posix()]
    names += [cache.file("test/a/merged", 0).parent.relative_to(cache.path).as_posix()]
    return names


def test_links_are_neither_read_nor_written_through(tmp_path, store):
    path = write_cache(tmp_path / "inside" / "cache", {"a": 60}, store)
    kept = tmp_path / "inside" / "kept"
    outside = tmp_path / "outside"
    outside.mkdir()
    names = links(Cache(path))
    shutil.copytree(path, kept)
    for name in names:
        place = path / name
        target = outside / name.replace("/", "_")
        if place.exists():
            place.rename(target)
        elif name == "journal":
            target.mkdir()
        else:
            target.write_text("mine")
        place.symlink_to(target)
        before = everything(tmp_path)
        works = [
            lambda: fit(FitConfig(path, SurgerySettings(steps=5))),
            lambda: list(check(Cache(path))),
            lambda: repair(path),
            lambda: convert(path, {"zarr": "hdf5", "hdf5": "zarr"}[store]),
            lambda: remove(path),
            lambda: _write_more(path, store),
        ]
        for work in works:
            with pytest.raises(InputError, match="is a link"):
                work()
        assert everything(tmp_path) == before, name
        shutil.rmtree(path)
        shutil.copytree(kept, path)


def _write_more(path, store):
    with opened(path, identity(["a"]), store):
        pass


def test_a_dangling_link_makes_no_file_elsewhere(tmp_path, store):
    path = tmp_path / "cache"
    path.mkdir()
    for name in (".lock", "manifest.json.partial", "features.zarr", "results.jsonl"):
        (path / name).symlink_to(tmp_path / "made")
        with pytest.raises(InputError, match="is a link"):
            _write_more(path, store)
        assert not (tmp_path / "made").exists()
        (path / name).unlink()


def test_a_partial_file_is_replaced_and_not_followed(tmp_path):
    """Should a link appear between the look for links and the writing."""
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "file.partial").symlink_to(tmp_path / "mine")
    write_atomically(tmp_path / "file", "new")
    assert (tmp_path / "mine").read_text() == "mine"
    assert (tmp_path / "file").read_text() == "new"


def replace_shard(cache, write):
    """Put another file in a shard's place, with seals that fit it."""
    file = cache.file("test/a/merged", 0)
    file.unlink()
    write(file)

    def change(manifest):
        manifest["arrays"]["test/a/merged"]["shards"][0] |= seal(file).to_json()

    forge(cache, change)
    return file


@pytest.mark.parametrize("kind", ["external", "virtual", "soft link", "external link", "compressed", "larger", "vlen"])
def test_what_an_hdf5_shard_refers_to_is_not_followed(tmp_path, kind):
    cache = Cache(write_cache(tmp_path / "cache", {"a": 60}, "hdf5"))
    secret = tmp_path / "secret.h5"
    values = np.ones((60, 16), "float32")
    with h5py.File(secret, "w") as file:
        file["data"] = values
    (tmp_path / "raw").write_bytes(values.tobytes())

    def write(path):
        with h5py.File(path, "w", libver="latest") as file:
            if kind == "external":
                file.create_dataset("data", (60, 16), "float32", external=[(str(tmp_path / "raw"), 0, values.nbytes)])
            elif kind == "virtual":
                layout = h5py.VirtualLayout((60, 16), "float32")
                layout[:] = h5py.VirtualSource(str(secret), "data", (60, 16))
                file.create_virtual_dataset("data", layout)
            elif kind == "soft link":
                file["other"] = values
                file["data"] = h5py.SoftLink("/other")
            elif kind == "external link":
                file["data"] = h5py.ExternalLink(str(secret), "data")
            elif kind == "compressed":
                file.create_dataset("data", data=values, chunks=(60, 16), compression="gzip")
            elif kind == "larger":
                file.create_dataset("data", (60, 10**9), "float32", chunks=(60, 16), fletcher32=True)
            else:
                file.create_dataset("data", (60,), h5py.vlen_dtype("float32"))
        with path.open("ab") as file:
            file.write(bytes(values.nbytes))  # large enough for what it should hold

    replace_shard(cache, write)
    with pytest.raises(DamagedCacheError, match="cannot be decoded"):
        Cache(cache.path).features("a")
    assert damage(Cache(cache.path))


def test_an_hdf5_index_that_refers_elsewhere_is_named_and_not_followed(tmp_path):
    cache = Cache(write_cache(tmp_path / "cache", {"a": 60}, "hdf5"))
    index = cache.path / "features.h5"
    with h5py.File(index, "a") as file:
        del file["test/a/merged"]
        layout = h5py.VirtualLayout((60, 16), "float32")
        layout[:] = h5py.VirtualSource("/etc/passwd", "data", (60, 16))
        file.create_virtual_dataset("test/a/merged", layout)
    forge(cache, lambda m: m["metadata"].update({"features.h5": seal(index).to_json()}))
    assert any("does not describe test/a/merged" in problem for problem in damage(Cache(cache.path)))


@pytest.mark.parametrize("codec", ["gzip", "zstd", "huge chunk", "another separator", "huge file"])
def test_no_codec_of_a_strangers_zarr_array_is_run(tmp_path, codec):
    cache = Cache(write_cache(tmp_path / "cache", {"a": 60}, "zarr"))
    file = cache.path / "features.zarr" / "test" / "a" / "merged" / "zarr.json"
    about = json.loads(file.read_text())
    inner = about["codecs"][0]["configuration"]["codecs"]
    if codec in ("gzip", "zstd"):
        inner[-1] = {"name": codec, "configuration": {"level": 1} | ({"checksum": False} if codec == "zstd" else {})}
    elif codec == "huge chunk":
        about["shape"] = [60, 2**40]
        about["chunk_grid"]["configuration"]["chunk_shape"] = [2048, 2**40]
        about["codecs"][0]["configuration"]["chunk_shape"] = [256, 2**40]
    elif codec == "another separator":
        about["chunk_key_encoding"]["configuration"]["separator"] = "."
    file.write_text(json.dumps(about) + (" " * 2**21 if codec == "huge file" else ""))
    forge(cache, lambda m: m["metadata"].update({"features.zarr/test/a/merged/zarr.json": seal(file).to_json()}))
    with pytest.raises(DamagedCacheError):
        Cache(cache.path).features("a")
    assert damage(Cache(cache.path))


def test_a_pickle_in_a_caches_place_is_not_run(tmp_path, store):
    """HDF5 and zarr can hold Python objects, which readers of those would rebuild."""

    class Attack:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    cache = Cache(write_cache(tmp_path / "cache", {"a": 60}, store))
    replace_shard(cache, lambda file: file.write_bytes(pickle.dumps(Attack()).ljust(10_000)))
    with pytest.raises(DamagedCacheError):
        Cache(cache.path).features("a")
    damage(Cache(cache.path))
    assert not (tmp_path / "ran").exists()
    pickle.loads(pickle.dumps(Attack()))
    assert (tmp_path / "ran").exists(), "the attack is none"


def test_a_strangers_journal_is_checked(tmp_path, store):
    """What a rank noted before it was killed is taken over by the next run; it may say nothing that leads outside."""
    for line in (
        '{"part": 0, "shards": {"../../x": {"bytes": 1, "sha256": "0", "values": "0"}}}',
        '{"part": 99, "shards": {"test/a/merged": {}}}',
        '{"part": 0, "shards": {"test/a/merged": {"bytes": 1, "sha256": "0", "values": "0"}}}',
        '{"skipped": {"test/a": {"-5": "x"}}}',
        "[]",
    ):
        path = write_cache(tmp_path / "cache", {"a": 60}, store)
        before = (path / "manifest.json").read_bytes()
        (path / "journal").mkdir()
        (path / "journal" / "1.jsonl").write_text(line + "\n")
        with pytest.raises(DamagedCacheError):
            _write_more(path, store)
        assert (path / "manifest.json").read_bytes() == before
        shutil.rmtree(path)


def claim_more_rows(manifest):
    """Seals of the right form for many shards, of which there is but one."""
    rows, shards = 2**21, 2**10
    manifest["tasks"]["a"]["splits"]["test"]["rows"] = rows
    manifest["identity"]["dim"] = 2**16
    for name, spec in manifest["arrays"].items():
        spec["shape"][1:] = [2**16] * len(spec["shape"][1:])
        if name.startswith("test/"):
            spec["shape"][0] = rows
            spec["shards"] = [{"bytes": 2**30, "sha256": "0" * 64, "values": "0" * 64}] * shards
        else:
            spec["shards"][0]["bytes"] = 2**30


def claim_more_than_the_seals(manifest):
    manifest["tasks"]["a"]["splits"]["test"]["rows"] = 2**34
    for name, spec in manifest["arrays"].items():
        if name.startswith("test/"):
            spec["shape"][0] = 2**34


@pytest.mark.parametrize("lie", [claim_more_rows, claim_more_than_the_seals])
def test_reading_takes_no_more_memory_than_the_files_bear_out(tmp_path, store, lie):
    """Half a terabyte is claimed: it is refused with next to no memory taken."""
    cache = Cache(write_cache(tmp_path / "cache", {"a": 60}, store))
    forge(cache, lie)
    script = textwrap.dedent(
        f"""
        import resource
        from probsurgery.pipeline.store.cache import Cache
        from probsurgery.pipeline.errors import DamagedCacheError
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        resource.setrlimit(resource.RLIMIT_DATA, (2**33, resource.RLIM_INFINITY))
        try:
            Cache({str(cache.path)!r}).features("a")
        except DamagedCacheError as error:
            print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, error)
        """
    )
    done = processes.python(script)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[0]) < 50_000, done.stdout


@pytest.mark.parametrize("lie", ["header length", "offsets", "shape", "settings", "hole"])
def test_a_head_whose_header_lies_is_refused(tmp_path, lie):
    folder = fit(FitConfig(write_cache(tmp_path / "cache", {"a": 60}), SurgerySettings(steps=5, rank=4))).path
    tensors = folder / "head.safetensors"
    content = tensors.read_bytes()
    length = int.from_bytes(content[:8], "little")
    if lie == "header length":
        tensors.write_bytes((2**62).to_bytes(8, "little") + content[8:])
    elif lie in ("offsets", "shape"):
        header = json.loads(content[8 : 8 + length])
        name = next(n for n in header if n != "__metadata__")
        if lie == "offsets":
            header[name]["data_offsets"][1] = 2**50
        header[name]["shape"] = [1, 2**40, 16]
        text = json.dumps(header).encode()
        tensors.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    elif lie == "settings":
        about = json.loads((folder / "head.json").read_text())
        (folder / "head.json").write_text(json.dumps(about | {"dim": 2**60}))
    else:
        with (folder / "head.json").open("wb") as out:
            out.truncate(10 * 2**30)
    with pytest.raises(InputError):
        load_head(folder)


def test_a_head_is_not_read_through_a_link(tmp_path):
    folder = fit(FitConfig(write_cache(tmp_path / "cache", {"a": 60}), SurgerySettings(steps=5, rank=4))).path
    (folder / "head.safetensors").rename(tmp_path / "elsewhere")
    (folder / "head.safetensors").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="is a link"):
        load_head(folder)


@pytest.mark.parametrize("text", ["\ud800", "\x1b[31m"])
def test_text_that_no_terminal_can_show_is_one_line(cache, run, text):
    head = fit(FitConfig(cache.path, SurgerySettings(steps=5, rank=4))).path / "head.json"
    plain = json.loads(head.read_text())
    head.write_text(json.dumps(plain | {"request": {**plain["request"], "protocol": text}}))
    assert text not in refused(run("fit", "--cache", cache.path, "--head", "surgery", "--steps", 5, "--rank", 4))
    edit_manifest(cache.path, lambda m: m.update(store=text))
    assert text not in refused(run("cache", "info", cache.path), "does not have a manifest's form")
