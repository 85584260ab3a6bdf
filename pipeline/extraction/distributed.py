"""Several processes as one run, over torch.distributed: what torchrun starts, on one machine or many.

Only `extract` uses it. Ranks exchange next to nothing (who may go on, and counts at the end), over gloo, whatever
device they encode on; features go to the file system that they share.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

from probsurgery.pipeline.errors import ProbsurgeryError, first_line

T = TypeVar("T")
_LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_LONGEST_WAIT = timedelta(days=2)
"""For a rank that is still encoding. One that dies is noticed at once, when its connection closes."""


def launched_rank() -> tuple[int, int]:
    """This process's rank and how many there are, as torchrun tells them; (0, 1) for a process of its own."""
    if not all(name in os.environ for name in _LAUNCHED):
        return 0, 1
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


@dataclass(frozen=True)
class Ranks:
    """The processes of one run. Rank 0 leads: it alone checks, locks, keeps manifests and reports."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Rank among those on this machine."""
    local_size: int = 1
    group: object = None
    """torch.distributed's group, if it is not the default one."""

    @property
    def leads(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def lead(self, action: Callable[[], T], *, all_follow: bool = False) -> T | None:
        """Rank 0 acts, and the others wait; then they act too, if `all_follow`.

        An error in rank 0 is rank 0's to report: the others leave with its exit status, in silence.
        """
        if self.size == 1:
            return action()
        if self.leads:
            try:
                result = action()
            except BaseException as error:
                self._tell(getattr(error, "exit_status", 1))
                raise
            self._tell(0)
            return result
        status = self._tell(None)
        if status:
            sys.exit(status)
        return action() if all_follow else None

    def _tell(self, status: int | None) -> int:
        import torch.distributed as dist

        told = [status]
        with _lost_ranks():
            dist.broadcast_object_list(told, src=0, group=self.group)
        return told[0]

    def total(self, counts: list[int], meanwhile: Callable[[], None]) -> list[int]:
        """Sums over the ranks, when all are there; rank 0 does something again and again until then."""
        import torch
        import torch.distributed as dist

        sums = torch.tensor(counts)
        with _lost_ranks():
            waiting = dist.all_reduce(sums, group=self.group, async_op=True)
            while self.leads and not waiting.is_completed():
                meanwhile()
                time.sleep(0.2)
            waiting.wait()
        return sums.tolist()


@contextmanager
def _lost_ranks() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise ProbsurgeryError(
            f"another rank has gone ({first_line(error)[:120]}); what was written is kept: run the same command again"
        ) from None


@contextmanager
def joined() -> Iterator[Ranks]:
    """This process as one of the ranks that torchrun started; a process of its own leads none."""
    rank, size = launched_rank()
    if size == 1:
        yield Ranks()
        return
    import torch.distributed as dist

    here = not dist.is_initialized()
    if here:
        with _lost_ranks():
            dist.init_process_group("gloo", timeout=_LONGEST_WAIT)
    local = (int(os.environ.get(name, default)) for name, default in (("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)))
    try:
        yield Ranks(rank, size, *local, group=None if here else dist.new_group(backend="gloo"))
    finally:
        if here:
            dist.destroy_process_group()
