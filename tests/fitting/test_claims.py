"""Several processes at once: none does another's work, and none brings back what another has removed."""

import os
import shutil
import signal
import threading
from contextlib import contextmanager

import pytest

from probsurgery.pipeline.config import FitConfig, ProbSettings, SurgerySettings, SweepConfig
from probsurgery.pipeline.errors import InputError, ProbsurgeryError
from probsurgery.pipeline.fitting import fit as fit_module
from probsurgery.pipeline.fitting.fit import fit
from probsurgery.pipeline.fitting.sweep import sweep
from probsurgery.pipeline.store.claims import CLAIMS, held_open
from probsurgery.pipeline.store.maintenance import remove
from probsurgery.pipeline.store.results import read_results
from support import refused

SHORT = {"steps": (20,)}


@contextmanager
def another_process(action):
    """Run `action(waiting)` in another process until it calls `waiting`, where it stays until the end."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:

        def waiting(*_, **__):
            os.write(writing, b"1")
            signal.pause()

        try:
            action(waiting)
        finally:
            os._exit(1)
    os.close(writing)
    try:
        assert os.read(reading, 1) == b"1"
        yield child
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reading)


def fitting(small_cache, keep_heads, *configs):
    """Another process that has begun to fit these."""

    def action(waiting):
        fit_module._train = waiting
        fit_module.fit_all(configs, keep_heads=keep_heads)

    return another_process(action)


def test_of_two_equal_sweeps_at_once_the_second_is_refused(small_cache, run):
    grid = SweepConfig(small_cache.path, head=("surgery",), values=SHORT | {"rank": (2, 3)})
    command = ("sweep", "--cache", small_cache.path, "--head", "surgery", "--steps", 20)
    with fitting(small_cache, False, *grid.expand()):
        words = ("another process is fitting surgery-r3-steps20 of a into", "wait for it", "--results")
        refused(run(*command, "--rank", "3,4"), *words)
        assert read_results(small_cache.path) == []
        assert run(*command, "--rank", "4,5")[0] == 0  # other heads are fitted beside it
    assert run(*command, "--rank", "2,3")[0] == 0  # a killed process has no claim
    assert len(read_results(small_cache.path)) == 2 * 4
    assert not (small_cache.path / CLAIMS).exists()


def test_of_two_fits_of_one_name_and_other_settings_the_second_writes_nothing(small_cache, run):
    before = sorted(small_cache.path.rglob("*"))
    command = ("fit", "--cache", small_cache.path, "--name", "mine", "--steps", 20, "--head", "surgery")
    with fitting(small_cache, True, FitConfig(small_cache.path, ProbSettings(hidden=4, steps=20), name="mine")):
        refused(run(*command), "another process is fitting the head mine into")
    (small_cache.path / CLAIMS).unlink()
    assert sorted(small_cache.path.rglob("*")) == before


def test_claims_are_made_in_a_new_folder_of_results_too(small_cache, run, tmp_path):
    config = FitConfig(small_cache.path, SurgerySettings(rank=2, steps=20), results=tmp_path / "new")
    command = ("fit", "--cache", small_cache.path, "--head", "surgery", "--rank", 2, "--steps", 20)
    with fitting(small_cache, True, config):
        refused(run(*command, "--results", tmp_path / "new"), "another process is fitting")


def test_what_another_process_has_finished_meanwhile_is_not_fitted_again(small_cache, monkeypatch):
    config, real = FitConfig(small_cache.path, SurgerySettings(rank=2, steps=20)), fit_module.claimed

    def late(folder, labels):
        monkeypatch.setattr(fit_module, "claimed", real)
        fit(config)
        return real(folder, labels)

    monkeypatch.setattr(fit_module, "claimed", late)
    assert fit(config).repeated
    assert len(read_results(small_cache.path)) == 2


@pytest.mark.parametrize("gone", [remove, shutil.rmtree])
@pytest.mark.parametrize("keep_heads", [False, True])
def test_a_sweep_does_not_bring_back_a_cache_that_was_removed(small_cache, gone, keep_heads):
    grid = SweepConfig(small_cache.path, head=("surgery",), values=SHORT | {"rank": (2, 3)}, keep_heads=keep_heads)

    def removing(done, *_, **__):
        if done and small_cache.path.exists():
            gone(small_cache.path)

    with pytest.raises(ProbsurgeryError, match="small was removed while heads were fitted into it") as caught:
        sweep(grid, removing)
    assert caught.value.exit_status == 1
    assert not small_cache.path.exists()


def test_a_removed_folder_of_results_does_not_come_back_either(small_cache, tmp_path):
    grid = SweepConfig(small_cache.path, head=("surgery",), values=SHORT | {"rank": (2, 3)}, results=tmp_path / "r")

    def removing(done, *_, **__):
        if done:
            shutil.rmtree(tmp_path / "r", ignore_errors=True)

    with pytest.raises(ProbsurgeryError, match="was removed while heads were fitted into it"):
        sweep(grid, removing)
    assert not (tmp_path / "r").exists()


def test_a_removal_waits_for_a_row_that_is_being_written(small_cache):
    removal = threading.Thread(target=remove, args=(small_cache.path,))
    with held_open(small_cache.path):
        removal.start()
        removal.join(0.3)
        assert (small_cache.path / "manifest.json").exists()
    removal.join()
    assert not small_cache.path.exists()


def test_a_folder_without_locks_is_fitted_into_all_the_same(small_cache, monkeypatch):
    import fcntl

    def none(*arguments):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", none)
    monkeypatch.setattr(fcntl, "flock", none)
    assert len(fit(FitConfig(small_cache.path, SurgerySettings(rank=2, steps=20))).rows) == 2
    with pytest.raises(InputError, match="without locks"):
        remove(small_cache.path)
