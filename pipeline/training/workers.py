"""Worker processes of one thread each that train stacks: many small problems use the cores better than one large one.

A worker is a new interpreter and not a fork: a forked child inherits the locks of torch's threads and of the progress
bar. It does not import the caller's script either. It is started once, receives stacks of jobs, and maps their features
from disk.
"""

import os
import pickle
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any, Self

import torch

from probsurgery.pipeline.errors import ProbsurgeryError, first_line
from probsurgery.pipeline.training.batches import Job
from probsurgery.pipeline.training.loop import Outcome, train_stack

READY = "ready"
SUPPORTED = os.name == "posix"
"""Whether a pipe can be passed to a child process by its number."""
_CLOSED = (EOFError, ConnectionError)
"""Raised by a pipe whose other end is closed."""
_CUT_OFF = (EOFError, OSError)
"""Raised when a pipe is read and its other end is closed, in the middle of a message too."""


class Pool:
    """Workers that wait for stacks. Use it as a context manager, which ends them."""

    def __init__(self, workers: int) -> None:
        self._workers: list[_Worker] = []
        try:
            for _ in range(workers):
                self._workers.append(_Worker())
        except BaseException:  # those that have started must not outlive this
            self.__exit__()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.stop()

    def run(
        self, stacks: Sequence[Sequence[Job]], advance: Callable[[int], None] | None = None
    ) -> Generator[tuple[int, list[Outcome]], None, None]:
        """Train every stack. Yields (number of the stack, outcomes of its heads) as stacks finish.

        The rows of the jobs must be on disk (`Rows.spilled`). If a worker dies, the heads that it was training become
        errors, and a new worker replaces it. Raises `ProbsurgeryError` if a worker cannot start.
        """
        waiting, unfinished = deque(enumerate(stacks)), len(stacks)
        for worker in self._workers:  # those that are ready since an earlier run
            if worker.is_idle and waiting:
                worker.train(*waiting.popleft())
        while unfinished:
            busy = {worker.connection: worker for worker in self._workers if not worker.is_idle}
            for worker in [busy[connection] for connection in wait(busy) if isinstance(connection, Connection)]:
                finished = None
                try:
                    message = _receive(worker.connection)
                except _CUT_OFF:
                    message = self._replace(worker)
                if message == READY:
                    worker.ready = True
                elif not isinstance(message, int):
                    outcomes = [message] * worker.heads if isinstance(message, ProbsurgeryError) else message
                    assert worker.stack is not None, "only a worker that trains sends outcomes"
                    finished, worker.stack = (worker.stack, outcomes), None
                elif advance is not None:
                    advance(message)
                if worker.is_idle and waiting:  # before the caller evaluates the outcomes, which takes time
                    worker.train(*waiting.popleft())
                if finished is not None:
                    unfinished -= 1
                    yield finished

    def _replace(self, worker: "_Worker") -> ProbsurgeryError:
        """Replace a dead worker by a new one; returns the error for the heads that it was training."""
        status = worker.process.wait()
        how = signal.Signals(-status).name if status < 0 else f"exit status {status}"
        if not worker.ready:
            raise ProbsurgeryError(f"a worker process did not start ({how}); try --workers 0")
        self._workers[self._workers.index(worker)] = _Worker()
        worker.ready = False
        worker.connection.close()
        return ProbsurgeryError(f"the worker that trained it died ({how}); if memory ran out, use fewer --workers")


class _Worker:
    """One worker process, and the parent's end of the pipe to it."""

    def __init__(self) -> None:
        self.connection, child_end = Pipe()
        self.ready = False
        self.stack: int | None = None
        self.heads = 0
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", __name__, str(child_end.fileno())],
                pass_fds=[child_end.fileno()],
                env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # so that Ctrl-C reaches the parent only
            )
        except OSError as error:
            raise ProbsurgeryError(
                f"a worker process did not start ({error.strerror or first_line(error)}); use fewer --workers (0: none)"
            ) from None
        finally:
            child_end.close()

    @property
    def is_idle(self) -> bool:
        return self.ready and self.stack is None

    def train(self, stack: int, jobs: Sequence[Job]) -> None:
        self.stack, self.heads = stack, len(jobs)
        with suppress(*_CLOSED):  # `run` learns of the worker's death when it reads the pipe
            _send(self.connection, jobs)

    def stop(self) -> None:
        self.connection.close()
        self.process.kill()
        self.process.wait()


def _send(connection: Connection, message: object) -> None:
    # Not `connection.send`: torch would pass tensors as file handles instead of copying them.
    connection.send_bytes(pickle.dumps(message))


def _receive(connection: Connection) -> Any:
    return pickle.loads(connection.recv_bytes())


def _serve(connection: Connection) -> None:
    """A worker's main loop: train each stack that arrives, until the pipe is closed."""
    torch.set_num_threads(1)
    with suppress(*_CLOSED):
        _send(connection, READY)
        while True:
            outcomes: list[Outcome] | ProbsurgeryError
            try:
                outcomes = train_stack(_receive(connection), advance=lambda head_steps: _send(connection, head_steps))
            except _CLOSED:
                raise
            except Exception as error:
                outcomes = ProbsurgeryError(f"the worker failed: {first_line(error)}")
            _send(connection, outcomes)


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])))
