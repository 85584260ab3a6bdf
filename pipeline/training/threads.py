"""Threads of this process that train stacks with a compiled kernel, which needs no lock of Python's while it runs."""

from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from threading import Event

import torch

from probsurgery.pipeline.training.batches import Job
from probsurgery.pipeline.training.loop import Outcome, train_stack


class _StoppedError(Exception):
    """The results of a stack are not wanted any more."""


def run_in_threads(
    stacks: Sequence[Sequence[Job]], threads: int, kernel: str, advance: Callable[[int], None] | None = None
) -> Generator[tuple[int, list[Outcome]], None, None]:
    """Train every stack. Yields (number of the stack, outcomes of its heads) as stacks finish.

    `advance` is called by the caller's thread. If the caller stops early, threads end with their block of steps.
    """
    news: SimpleQueue[int | tuple[int, list[Outcome]] | BaseException] = SimpleQueue()
    stopped = Event()

    def report(head_steps: int) -> None:
        if stopped.is_set():
            raise _StoppedError
        news.put(head_steps)

    def train(number: int) -> None:
        try:
            news.put((number, train_stack(stacks[number], kernel=kernel, advance=report)))
        except BaseException as error:
            news.put(error)

    # One thread of torch's in each: what it does here, gathering rows, is too small for more.
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    try:
        for number in range(len(stacks)):
            pool.submit(train, number)
        unfinished = len(stacks)
        while unfinished:
            message = news.get()
            if isinstance(message, BaseException):
                raise message
            if isinstance(message, tuple):
                unfinished -= 1
                yield message
            elif advance is not None:
                advance(message)
    finally:
        stopped.set()
        pool.shutdown(cancel_futures=True)
