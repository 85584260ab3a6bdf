"""Stage two on more features than memory holds, and how it measures available memory."""

import json
import textwrap

import pytest
import torch

import processes
from probsurgery.pipeline import device
from probsurgery.pipeline.config import FitConfig, ProbSettings, RidgeSettings, SurgerySettings, SweepConfig
from probsurgery.pipeline.device import available_memory
from probsurgery.pipeline.fitting import fit, sweep
from probsurgery.pipeline.training.kernel import TORCH, VARIABLE
from support import write_cache

ROWS, DIM = 75_000, 128
MEBIBYTE = 2**20
ROOM = 104 * MEBIBYTE
"""Memory for a fit; one task's merged, expert and pre-trained features have 110 MiB, both tasks' twice as much."""

SCRIPT = textwrap.dedent(
    """
    import json, os, sys
    import psutil, resource, torch
    from probsurgery.pipeline.fitting import fit
    from probsurgery.pipeline.config import (FitConfig, head_settings)
    from probsurgery.pipeline.errors import ProbsurgeryError

    cache, room, believed, requests = sys.argv[1], int(sys.argv[2]), sys.argv[3], json.loads(sys.argv[4])
    torch.set_num_threads(1)
    torch.linalg.eigh(torch.eye(300, dtype=torch.float64) @ torch.eye(300, dtype=torch.float64))  # libraries load
    if room:
        data = psutil.Process().memory_info().data
        resource.setrlimit(resource.RLIMIT_DATA, (data + room, resource.RLIM_INFINITY))
    if believed == "all":
        fit.available_memory = lambda device: 2**50
    rows = []
    for number, (kind, settings) in enumerate(requests):
        config = FitConfig(cache, head_settings(kind, **settings), workers=0, results=f"{sys.argv[5]}/{number}")
        rows.append(fit.fit(config).rows)
    print(json.dumps([[row.to_json() for row in result] for result in rows]))
    """
)
REQUESTS = [
    ("surgery", {"rank": 4, "steps": 40}),
    ("prob", {"hidden": 4, "steps": 40}),
    ("ridge", {}),
]


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    return write_cache(tmp_path_factory.mktemp("large") / "cache", {"a": ROWS, "b": ROWS}, "hdf5", dim=DIM)


def run(cache, folder, room=0, believed="limit", requests=REQUESTS):
    arguments = [str(cache), str(room), believed, json.dumps(requests), str(folder)]
    return processes.python(SCRIPT, *arguments)


def figures(results):
    return [[(row["task"], row["accuracy"], row["bias"], row["fit_rows"]) for row in result] for result in results]


def test_features_beyond_memory_give_the_results_of_the_run_in_memory(large, tmp_path):
    """Under a limit of the operating system that one task alone would exceed."""
    free = run(large, tmp_path / "free")
    assert free.returncode == 0, free.stderr
    limited = run(large, tmp_path / "limited", ROOM)
    assert limited.returncode == 0, limited.stderr[-2000:]
    assert figures(json.loads(limited.stdout)) == figures(json.loads(free.stdout))
    control = run(large, tmp_path / "control", ROOM, "all", REQUESTS[:1])
    assert control.returncode != 0, "the limit does not bind"


@pytest.mark.parametrize(("kernel", "workers"), [("", 0), ("", 2), (TORCH, 2)])
def test_one_task_at_a_time_gives_the_same_heads(tmp_path, monkeypatch, shared_workers, kernel, workers):
    """For whole grids, whatever is trained together."""
    monkeypatch.setenv(VARIABLE, kernel)
    path = write_cache(tmp_path / "cache", {"a": 300, "b": 200, "c": 11}, splits=("test", "train"))
    settings = {"rank": (2, 4), "hidden": (4,), "steps": (60,)}
    grids = [
        SweepConfig(path, ("surgery", "prob"), settings, seed=(0, 1), workers=workers, **other)
        for other in ({}, {"shared": True}, {"fit_split": "train"})
    ]
    grids.append(SweepConfig(path, ("ridge",), {}, fraction=(0.5, 1.0), holdout=0.2, workers=workers))
    loaded = []

    def count(cache, tasks, *rest, inner=fit.LoadedTasks):
        loaded.append(tasks)
        return inner(cache, tasks, *rest)

    monkeypatch.setattr(fit, "LoadedTasks", count)
    lines = []
    for free in (2**50, 10_000):
        loaded.clear()
        monkeypatch.setattr(fit, "available_memory", lambda device, free=free: free)
        for number, grid in enumerate(grids):
            results = tmp_path / f"{free} {number}"
            lines.append(sweep.sweep(SweepConfig(**(vars(grid) | {"results": results}))).lines)
        together, apart = [("a", "b", "c")], [("a",), ("b",), ("c",)]
        assert loaded == (4 * together if free > 10_000 else apart + together + apart + apart)
    for whole, parts in zip(lines[:4], lines[4:], strict=True):
        for line, other in zip(whole, parts, strict=True):
            assert line.setting == other.setting
            assert line.average_bias.mean == pytest.approx(other.average_bias.mean, abs=1e-5)
            assert line.average_accuracy.mean == pytest.approx(other.average_accuracy.mean, abs=0.5)


def test_heads_are_kept_one_task_at_a_time_too(tmp_path, monkeypatch):
    path = write_cache(tmp_path / "cache", {"a": 60, "b": 30})
    monkeypatch.setattr(fit, "available_memory", lambda device: 100)
    for settings in (ProbSettings(hidden=4, steps=20), SurgerySettings(steps=20), RidgeSettings()):
        result = fit.fit(FitConfig(path, settings))
        assert result.head.tasks == ("a", "b")
        assert [row.task for row in result.rows] == ["a", "b"]


def test_a_full_scratch_folder_is_one_line(tmp_path, monkeypatch):
    from probsurgery.pipeline.errors import ProbsurgeryError

    path = write_cache(tmp_path / "cache", {"a": 60})
    monkeypatch.setattr(fit, "available_memory", lambda device: 100)

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("probsurgery.pipeline.store.memmap.np.lib.format.write_array_header_1_0", full)
    with pytest.raises(ProbsurgeryError, match="No space left on device; point TMPDIR to a folder with room"):
        fit.fit(FitConfig(path, SurgerySettings(steps=20)))


def test_the_limits_of_a_process_and_its_control_group_count(tmp_path, monkeypatch):
    cpu = torch.device("cpu")
    free = available_memory(cpu)
    versions = {1: ("memory.limit_in_bytes", "memory.usage_in_bytes"), 2: ("memory.max", "memory.current")}
    for version, names in versions.items():
        group = tmp_path / str(version)
        group.mkdir()
        (group / names[0]).write_text(f"{100 * MEBIBYTE}\n")
        (group / names[1]).write_text(f"{70 * MEBIBYTE}\n")
        (group / "memory.stat").write_text(f"anon 5\n{'total_' if version == 1 else ''}inactive_file {20 * MEBIBYTE}\n")
        monkeypatch.setattr(device, "_control_groups", lambda: [(group, *names)])  # noqa: B023
        assert available_memory(cpu) == 50 * MEBIBYTE
        (group / names[0]).write_text("max\n")
        assert available_memory(cpu) > free / 2
    monkeypatch.setattr(device, "_control_groups", lambda: [])
    script = (
        "import resource, torch; from probsurgery.pipeline.device import available_memory\n"
        f"resource.setrlimit(resource.RLIMIT_DATA, ({2**32}, {2**32})); print(available_memory(torch.device('cpu')))"
    )
    assert 0 < int(processes.python(script).stdout) < 2**32
