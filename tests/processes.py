"""Extractions and commands in processes of their own, started by a fork server that has imported everything."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from functools import cache
from multiprocessing import forkserver
from pathlib import Path

import pytest

from probsurgery.pipeline.config import ExtractConfig
from probsurgery.pipeline.errors import ProbsurgeryError
from probsurgery.pipeline.store import arrays

SHARD, CHUNK = 64, 32
"""Rows, so that the mini suite has many shards."""


@cache
def _context():
    """Starts the server where it finds `preload`: Python 3.11 does not pass it `sys.path`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["preload"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        forkserver.ensure_running()
    return context


def small_shards():
    """Cut arrays into small shards from here on."""
    arrays.SHARD_ROWS, arrays.CHUNK_ROWS = SHARD, CHUNK


def start(config: ExtractConfig, environment: dict[str, str] | None = None, largest_file: int | None = None):
    """Start an extraction; gives its process, and a pipe on which its outcome comes."""
    ours, theirs = _context().Pipe(duplex=False)
    process = _context().Process(target=_extract, args=(config, environment or {}, largest_file, theirs), daemon=True)
    process.start()
    theirs.close()
    return process, ours


def finish(process, outcome) -> dict:
    """Wait for an extraction and give what it counted, or its error."""
    try:
        told = outcome.recv()
    except EOFError:
        told = {}
    process.join(120)
    return told


def _extract(config, environment, largest_file, outcome):
    import torch

    from probsurgery.pipeline.extraction.extract import extract

    torch.set_num_threads(1)
    small_shards()
    os.environ.update(environment)
    if largest_file is not None:
        import resource

        # A write beyond it stops half-way with an error, as on a full disk.
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, resource.RLIM_INFINITY))
    try:
        result = extract(config)
    except (ProbsurgeryError, OSError) as error:
        outcome.send({"error": str(error), "type": type(error).__name__})
    else:
        outcome.send({"images": result.images, "passes": result.passes, "taken": result.taken, "notes": result.notes})


def python(script: str, *arguments, cwd=None, environment=None, closed=()) -> subprocess.CompletedProcess:
    """What `python -c script arguments` does, without the seconds in which it imports torch and open_clip.

    `environment` is added to this process's; `closed` names streams that are closed before the start.
    """
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder) / name for name in ("stdout", "stderr")]
        given = (script, [str(a) for a in arguments], str(cwd or Path.cwd()), os.environ | (environment or {}))
        process = _context().Process(target=_python, args=(*given, outputs, closed))
        process.start()
        process.join(300)
        if process.exitcode is None:
            process.kill()
            raise TimeoutError(f"{arguments} ran for more than five minutes")
        out, err = (path.read_text() for path in outputs)
    return subprocess.CompletedProcess(arguments, process.exitcode, out, err)


def command(*arguments, **where) -> subprocess.CompletedProcess:
    """What `python -m probsurgery arguments` does; see `python`."""
    return python("from probsurgery.__main__ import main; main()", *arguments, **where)


def _python(script, arguments, cwd, environment, outputs, closed):
    for name, path in zip(("stdout", "stderr"), outputs, strict=True):
        file = os.open(path, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, getattr(sys, name).fileno())
        os.close(file)
    for name in closed:
        os.close({"stdin": 0, "stdout": 1, "stderr": 2}[name])
        setattr(sys, name, None)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    for name in list(sys.modules):  # they read the environment when they are imported
        if name.partition(".")[0] in ("huggingface_hub", "datasets"):
            del sys.modules[name]
    multiprocessing.set_start_method(None, force=True)  # the default of a new interpreter, not that of this server
    sys.argv = ["-c", *arguments]
    exec(script, {"__name__": "__main__"})
