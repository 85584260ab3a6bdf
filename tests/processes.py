"""Extractions in processes of their own, to be killed: started by a fork server, which has imported everything."""

from __future__ import annotations

import multiprocessing
import os
import signal

from probsurgery.pipeline.config import ExtractConfig
from probsurgery.pipeline.errors import ProbsurgeryError
from probsurgery.pipeline.store import arrays

SHARD, CHUNK = 64, 32
"""Rows, so that the mini suite has many shards."""

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["processes", "probsurgery.pipeline.extraction.extract", "open_clip"])


def small_shards():
    """Cut arrays into small shards from here on."""
    arrays.SHARD_ROWS, arrays.CHUNK_ROWS = SHARD, CHUNK


def start(config: ExtractConfig, environment: dict[str, str] | None = None, largest_file: int | None = None):
    """Start an extraction; gives its process, and a pipe on which its outcome comes."""
    ours, theirs = _CONTEXT.Pipe(duplex=False)
    process = _CONTEXT.Process(target=_extract, args=(config, environment or {}, largest_file, theirs), daemon=True)
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
