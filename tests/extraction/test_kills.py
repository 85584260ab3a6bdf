"""Stage one killed, out of room, and run twice at once: what is whole stays, and the end is as if nothing had been."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

import processes
from probsurgery.pipeline.config import ExtractConfig
from probsurgery.pipeline.errors import InputError
from probsurgery.pipeline.extraction.extract import extract
from probsurgery.pipeline.store import arrays
from probsurgery.pipeline.store.cache import Cache
from probsurgery.pipeline.store.lock import locked
from support import damage

pytestmark = pytest.mark.usefixtures("shards_of_processes")
TASKS = ("digits8", "texture")


def config(path, store, **other):
    return ExtractConfig(**({"arch": "mini", "tasks": TASKS, "out": path, "store": store, "device": "cpu"} | other))


@dataclass
class Undisturbed:
    """What a run gives that nothing happens to."""

    path: Path
    images: int
    seconds: float
    """From taking the lock to the end."""

    @property
    def cache(self):
        return Cache(self.path)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, shards_of_processes):
    found = {}
    for store in ("zarr", "hdf5"):
        path = tmp_path_factory.mktemp(store) / "cache"
        process, outcome = processes.start(config(path, store))
        wait_until_it_writes(path, process)
        begun = time.monotonic()
        told = processes.finish(process, outcome)
        found[store] = Undisturbed(path, told["images"], time.monotonic() - begun)
    assert found["zarr"].cache.content == found["hdf5"].cache.content
    return found


def wait_until_it_writes(path, process):
    """The holder of the lock names itself in a file."""
    while process.is_alive():
        try:
            if f"process {process.pid} on" in (path / ".owner").read_text():
                return
        except OSError:
            time.sleep(0.001)


def whole_shards(cache):
    """Every shard that the manifest counts: its file's inode and time, which another writing would change."""
    return {
        (name, number): (status.st_ino, status.st_mtime_ns)
        for name, spec in cache.manifest.arrays.items()
        for number, sealed in enumerate(spec.shards)
        if sealed and (status := cache.file(name, number).stat())
    }


def lacking_images(reference, whole):
    """Images of the shards that some array lacks."""
    lacking = {
        (name.rpartition("/")[0], number): len(arrays.shard_rows(number, spec.shape[0]))
        for name, spec in reference.manifest.arrays.items()
        if not name.startswith("classifiers/")
        for number in range(len(spec.shards))
        if (name, number) not in whole
    }
    return sum(lacking.values())


def kill_again_and_again(path, store, kills, undisturbed):
    """Gives how many kills met a run at work."""
    reference, moments = undisturbed[store], random.Random(f"{store} {kills}")
    whole, met = {}, 0
    for _ in range(kills):
        process, outcome = processes.start(config(path, store))
        wait_until_it_writes(path, process)
        time.sleep(moments.uniform(0, 1.5 * reference.seconds / kills))
        process.kill()
        processes.finish(process, outcome)
        met += process.exitcode == -signal.SIGKILL
        if (path / "manifest.json").exists():
            assert damage(Cache(path)) == []
            now = whole_shards(Cache(path))
            assert whole.items() <= now.items(), "a whole shard was written again"
            whole = now
    told = processes.finish(*processes.start(config(path, store)))
    assert told["images"] == lacking_images(reference.cache, whole)
    assert whole.items() <= whole_shards(Cache(path)).items()
    assert Cache(path).content == reference.cache.content
    assert damage(Cache(path)) == []
    assert not list(path.rglob("*.partial"))
    return met


def test_three_kills_change_nothing(tmp_path, store, undisturbed):
    assert kill_again_and_again(tmp_path / "cache", store, 3, undisturbed)


@pytest.mark.slow
def test_twenty_kills_change_nothing(tmp_path, store, undisturbed):
    met = kill_again_and_again(tmp_path / "cache", store, 20, undisturbed)
    print(f"{met} of 20 kills met a run at work")
    assert met > 10


@pytest.mark.parametrize(
    ("store", "largest_file"), [("zarr", 300), ("hdf5", 6_000), ("zarr", 12_000), ("zarr", 18_500), ("hdf5", 18_500)]
)
def test_a_write_that_fails_half_way_loses_nothing(tmp_path, store, undisturbed, largest_file):
    """No file may grow beyond so many bytes: the write that would stops there with an error, as on a full disk.

    300 bytes stop what describes the arrays, 6,000 the first shards, more of them the manifest as it grows.
    """
    path, reference = tmp_path / "cache", undisturbed[store]
    told = processes.finish(*processes.start(config(path, store), largest_file=largest_file))
    assert "make room, and run the same command again" in told["error"] or not (path / "manifest.json").exists()
    whole = {}
    if (path / "manifest.json").exists():
        assert damage(Cache(path)) == []
        whole = whole_shards(Cache(path))
    told = processes.finish(*processes.start(config(path, store)))
    assert told["images"] == lacking_images(reference.cache, whole)
    assert whole.items() <= whole_shards(Cache(path)).items()
    assert Cache(path).content == reference.cache.content
    assert not list(path.rglob("*.partial"))


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path, store, undisturbed):
    """A small tmpfs, which fills up in the midst; making one takes the superuser."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if (
        shutil.which("mount") is None
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=640k", "none", disk]).returncode
    ):
        pytest.skip("a file system cannot be mounted here")
    try:
        command = [sys.executable, "-m", "probsurgery", "extract", "--arch", "mini", "--tasks", ",".join(TASKS)]
        done = subprocess.run([*command, "--store", store, "--out", disk / "cache"], capture_output=True, text=True)
        assert done.returncode == 1
        assert done.stderr.splitlines()[-1].startswith("error: ")
        assert "No space left" in done.stderr
        assert "Traceback" not in done.stderr
    finally:
        shutil.copytree(disk, tmp_path / "later", dirs_exist_ok=True)
        subprocess.run(["umount", disk], check=True)
    path = tmp_path / "later" / "cache"
    with pytest.MonkeyPatch.context() as patch:  # the command's own shards
        patch.setattr(arrays, "SHARD_ROWS", 2048)
        patch.setattr(arrays, "CHUNK_ROWS", 256)
        if (path / "manifest.json").exists():
            assert damage(Cache(path)) == []
        extract(config(path, store))
        assert damage(Cache(path)) == []


def test_a_second_run_is_refused_and_told_of_the_first(tmp_path, store):
    """And a lock that a dead process left does not stand in the way."""
    path = tmp_path / "cache"
    first, outcome = processes.start(config(path, store))
    wait_until_it_writes(path, first)
    os.kill(first.pid, signal.SIGSTOP)
    with pytest.raises(InputError, match=rf"another process is writing .*process {first.pid} on .*since 20"):
        extract(config(path, store))
    os.kill(first.pid, signal.SIGKILL)
    processes.finish(first, outcome)
    assert (path / ".owner").exists()
    with locked(path):
        pass
    extract(config(path, store))
    assert damage(Cache(path)) == []
