"""Processes of one thread each that train stacks: several small problems use many cores better than one large one.

A worker is a fresh interpreter rather than a fork: a forked child inherits the threads' locks of torch and of the
progress bar. It does not import the caller's script either. It is started once, is sent stacks of jobs, and maps their
features from disk.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, Pipe, wait

import torch

from probsurgery.pipeline.errors import ProbsurgeryError, first_line
from probsurgery.pipeline.training.loop import Job, Outcome, Progress, train_stack

READY = "ready"
SUPPORTED = os.name == "posix"
"""Pipes are handed over by number, which other systems do not do."""
_GONE = (EOFError, ConnectionError)
"""What a pipe raises whose other end has gone."""
_TORN = (EOFError, OSError)
"""The same for a reader, when it went in the middle of a message."""


class Pool:
    """Workers that wait for stacks; use it as a context manager, which ends them."""

    def __init__(self, workers: int) -> None:
        self._workers = [_Worker() for _ in range(workers)]

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.stop()

    def run(self, stacks: Sequence[Sequence[Job]], progress: Progress) -> Iterator[tuple[int, list[Outcome]]]:
        """Train every stack; gives its number and outcomes as it finishes.

        The rows of the jobs lie on disk (`Rows.spilled`). A worker that dies makes errors of the heads it was training,
        and another takes its place. Raises `ProbsurgeryError` if a worker cannot start.
        """
        waiting, left = deque(enumerate(stacks)), len(stacks)
        for worker in self._workers:  # those that another run has started
            if worker.is_idle and waiting:
                worker.train(*waiting.popleft())
        while left:
            for connection in wait([worker.connection for worker in self._workers if not worker.is_idle]):
                worker = next(w for w in self._workers if w.connection is connection)
                try:
                    message = _receive(connection)
                except _TORN:
                    message = self._replace(worker)
                finished = None
                if message == READY:
                    worker.ready = True
                elif isinstance(message, int):
                    progress(message)
                else:
                    finished, worker.stack = worker.stack, None
                if worker.is_idle and waiting:  # before its outcomes are looked into, which takes a while
                    worker.train(*waiting.popleft())
                if finished is not None:
                    left -= 1
                    yield finished, message

    def _replace(self, worker: _Worker) -> list[Outcome]:
        """Start another worker in the place of a dead one; gives the outcomes of what it was training."""
        status = worker.process.wait()
        how = signal.Signals(-status).name if status < 0 else f"exit status {status}"
        if not worker.ready:
            raise ProbsurgeryError(f"a worker process did not start ({how}); try --workers 0")
        self._workers[self._workers.index(worker)] = _Worker()
        worker.ready = False
        worker.connection.close()
        error = f"the worker that trained it died ({how}); if memory ran out, use fewer --workers"
        return [ProbsurgeryError(error) for _ in range(worker.heads)]


class _Worker:
    """One process, and the parent's end of its pipe."""

    def __init__(self) -> None:
        self.connection, theirs = Pipe()
        self.ready = False
        self.stack: int | None = None
        self.heads = 0
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", __name__, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the parent to handle
        )
        theirs.close()

    @property
    def is_idle(self) -> bool:
        return self.ready and self.stack is None

    def train(self, stack: int, jobs: Sequence[Job]) -> None:
        self.stack, self.heads = stack, len(jobs)
        with suppress(*_GONE):  # of a death we hear from the pipe when it is read
            _send(self.connection, (len(jobs), pickle.dumps(list(jobs))))

    def stop(self) -> None:
        self.connection.close()
        self.process.kill()
        self.process.wait()


def _send(connection: Connection, message: object) -> None:
    # Not `connection.send`: torch would share its tensors through file handles instead of copying them.
    connection.send_bytes(pickle.dumps(message))


def _receive(connection: Connection) -> object:
    return pickle.loads(connection.recv_bytes())


def _serve(connection: Connection) -> None:
    """A worker's life: train what comes until the pipe is closed."""
    torch.set_num_threads(1)
    with suppress(*_GONE):
        _send(connection, READY)
        while True:
            heads, message = _receive(connection)
            try:
                outcomes = train_stack(pickle.loads(message), progress=lambda head_steps: _send(connection, head_steps))
            except _GONE:
                raise
            except Exception as error:
                outcomes = [ProbsurgeryError(f"its worker failed: {first_line(error)}")] * heads
            _send(connection, outcomes)


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])))
