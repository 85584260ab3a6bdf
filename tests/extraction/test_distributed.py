"""Stage one on several ranks: the same digest as on one, also when a rank is killed; the others are told."""

import json
import os
import signal
import socket
import time

import pytest

import processes
from probsurgery.pipeline.config import ExtractConfig
from probsurgery.pipeline.extraction import distributed
from probsurgery.pipeline.store.cache import Cache
from support import damage

pytestmark = pytest.mark.usefixtures("shards_of_processes")
TASKS = ("digits8", "texture", "street")


def config(path, store="zarr", **other):
    return ExtractConfig(**({"arch": "mini", "tasks": TASKS, "out": path, "store": store, "device": "cpu"} | other))


def launch(requests):
    """Start a rank for each request, as torchrun does: it tells each who it is, and where they meet."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": str(len(requests)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    common |= {"LOCAL_WORLD_SIZE": str(len(requests))}
    return [
        processes.start(request, common | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank, request in enumerate(requests)
    ]


def finish(requests):
    return [processes.finish(*started) for started in launch(requests)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory, shards_of_processes):
    """What one process makes of it."""
    path = tmp_path_factory.mktemp("alone") / "cache"
    told = processes.finish(*processes.start(config(path)))
    return Cache(path).content, told["images"]


def wait_for(path, process):
    while not path.exists() and process.is_alive():
        time.sleep(0.001)


@pytest.mark.parametrize(("size", "store"), [(2, "zarr"), (3, "hdf5")])
def test_several_ranks_write_what_one_does(tmp_path, store, alone, size):
    path = tmp_path / "cache"
    told = finish([config(path, store)] * size)
    assert told[0]["images"] == alone[1]
    assert told[0]["passes"] == 3 * alone[1]
    assert Cache(path).content == alone[0]
    assert damage(Cache(path)) == []
    assert not (path / "journal").exists()
    assert Cache(path).manifest.runs[-1].ranks == size


def test_what_a_merge_learns_is_learned_once_for_all_ranks(tmp_path):
    learns = {"merges": ("lw-adamerging",), "merge_args": {"steps": 3, "batch_size": 4}, "limit": 200}
    (one,) = finish([config(tmp_path / "a" / "one", **learns)])
    told = finish([config(tmp_path / "b" / "two", **learns)] * 2)
    assert told[0]["passes"] == one["passes"]
    assert Cache(tmp_path / "b" / "two").content == Cache(tmp_path / "a" / "one").content
    assert Cache(tmp_path / "b" / "two").identity == Cache(tmp_path / "a" / "one").identity
    assert damage(Cache(tmp_path / "b" / "two")) == []


@pytest.mark.parametrize(("victim", "store"), [(0, "hdf5"), (1, "zarr")])
def test_a_killed_rank_ends_the_run_and_the_next_goes_on(tmp_path, store, alone, victim):
    path = tmp_path / "cache"
    started = launch([config(path, store)] * 2)
    journal = path / "journal" / "1.jsonl"
    wait_for(journal, started[1][0])
    os.kill(started[victim][0].pid, signal.SIGKILL)
    told = [processes.finish(*one) for one in started]
    assert told[victim] == {}
    assert "another rank has ended" in told[1 - victim]["error"]
    assert damage(Cache(path)) == []
    rest = finish([config(path, store)] * 2)
    assert 0 < rest[0]["images"] < alone[1]
    assert Cache(path).content == alone[0]
    assert damage(Cache(path)) == []


def test_what_a_killed_leader_had_not_taken_over_is_not_done_again(tmp_path, alone):
    """Rank 0 stands still while rank 1 works, and is killed then; the next run finds rank 1's shards in the journal."""
    path = tmp_path / "cache"
    started = launch([config(path)] * 2)
    journal = path / "journal" / "1.jsonl"
    wait_for(journal, started[1][0])
    os.kill(started[0][0].pid, signal.SIGSTOP)
    size = -1
    while journal.stat().st_size != size:  # rank 1 comes to its end
        size = journal.stat().st_size
        time.sleep(1)
    os.kill(started[0][0].pid, signal.SIGKILL)
    for one in started:
        processes.finish(*one)
    entries = list(map(json.loads, journal.read_text().splitlines()))
    files = [Cache(path).file(name, entry["part"]) for entry in entries for name in entry["shards"]]
    before = [file.stat().st_ino for file in files]
    assert len(files) > 8
    finish([config(path)] * 2)
    assert [file.stat().st_ino for file in files] == before
    assert Cache(path).content == alone[0]


def test_bad_input_is_rank_0s_to_say(tmp_path):
    told = finish([config(tmp_path / "cache", merges=("none",))] * 2)
    assert "unknown merge 'none'" in told[0]["error"]
    assert told[1] == {}
    assert not (tmp_path / "cache").exists()


def test_ranks_that_would_write_different_features_are_refused(tmp_path):
    told = finish([config(tmp_path / "cache"), config(tmp_path / "cache", dtype="float16")])
    assert "rank 1 would write other features" in told[1]["error"]
    assert "dtype: float32 / float16" in told[1]["error"]
    assert "another rank has ended" in told[0]["error"]


def test_a_second_merge_takes_features_on_ranks_too(tmp_path):
    finish([config(None, root=tmp_path)] * 2)
    told = finish([config(None, root=tmp_path, merges=("ties",))] * 2)
    assert sum(told[0]["taken"].values()) == 2 * told[0]["passes"]


def test_torchrun_runs_the_command(tmp_path, alone):
    """The command itself: one line of output and one progress, whatever the number of ranks."""
    command = ["-m", "probsurgery", "extract", "--arch", "mini", "--tasks", "digits8,texture", "--out", tmp_path / "c"]
    torchrun = "from torch.distributed.run import main; main()"
    done = processes.python(torchrun, "--standalone", "--nproc-per-node", 2, *command)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path / 'c'}: written\n"
    assert done.stderr.count("1,165 images, 2 ranks") == 1


@pytest.mark.parametrize("rank", [0, 1])
def test_other_commands_run_as_one_process(run, monkeypatch, rank):
    for name, value in {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    for command in ("fit", "sweep", "report", "cache"):
        status, out, err = run(command)
        expected = "" if rank else f"error: {command} runs as one process; start it without torchrun\n"
        assert (status, out, err) == (2, "", expected)


def test_a_process_of_its_own_is_no_rank(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert distributed.launched_rank() == (0, 1)
    monkeypatch.setenv("WORLD_SIZE", "8")  # as some job scripts set it for their own use
    assert distributed.launched_rank() == (0, 1)
    with distributed.joined() as one:
        assert one.leads
        assert one.lead(lambda: 7, then=lambda: 8) == 7
