"""Fixtures. Shapes in annotations are checked by jaxtyping's plugin (`--jaxtyping-packages` in pyproject.toml)."""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache

import numpy as np
import pytest
import torch

import processes
from probsurgery import cli
from probsurgery.pipeline import mini
from probsurgery.pipeline.fitting import fit
from probsurgery.pipeline.models import architectures
from probsurgery.pipeline.store import arrays
from probsurgery.pipeline.store.cache import Cache
from probsurgery.pipeline.training import plan
from probsurgery.pipeline.training.kernel import TORCH, VARIABLE
from probsurgery.pipeline.training.workers import Pool
from support import TINY, write_cache

# The tests' tensors are tiny: a second thread gains nothing and waits for its core on a busy machine.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    np.random.seed(0)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _own_user_cache(tmp_path_factory, monkeypatch):
    """Classifiers made from text are kept for each test alone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("user_cache")))


@pytest.fixture(autouse=True, scope="session")
def _images_of_the_mini_suite_are_read_once():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mini, "load", cache(mini.load))
        yield


@pytest.fixture
def tiny(monkeypatch):
    """An architecture of the papers' suite that is small enough to make checkpoints of here."""
    monkeypatch.setitem(architectures.ARCHS, "tiny", TINY)


@pytest.fixture(params=["zarr", "hdf5"])
def store(request):
    return request.param


@pytest.fixture(scope="module")
def shards_of_processes():
    """Cut arrays here as the extractions of `processes` do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arrays, "SHARD_ROWS", processes.SHARD)
        patch.setattr(arrays, "CHUNK_ROWS", processes.CHUNK)
        yield


@pytest.fixture(scope="module")
def shared_workers():
    """Two workers that are started once, for all fits and sweeps of a module."""
    with Pool(2) as pool, pytest.MonkeyPatch.context() as patch:
        for module in (fit, plan):
            patch.setattr(module, "Pool", lambda workers: nullcontext(pool))
        yield


@pytest.fixture
def torch_trains(monkeypatch):
    """Heads are trained by torch, also where a kernel was compiled; so stacks go to worker processes."""
    monkeypatch.setenv(VARIABLE, TORCH)


@pytest.fixture
def small_cache(tmp_path) -> Cache:
    """Two tasks, a of 60 rows and b of 11, which is fewer than a batch."""
    return Cache(write_cache(tmp_path / "small", {"a": 60, "b": 11}))


@pytest.fixture
def run(capsys):
    """Run the command; gives (exit status, standard output, standard error)."""

    def call(*arguments):
        with pytest.raises(SystemExit) as ended:
            cli.main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        return ended.value.code or 0, out, err

    return call
