"""Several processes as one run, started by torchrun, on one machine or many.

Only `extract` uses it. Ranks exchange little (who may continue, and counts at the end), over gloo, whatever device they
encode on; features go to the file system that they share.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar, cast

from probsurgery.pipeline.errors import ProbsurgeryError, first_line

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

T = TypeVar("T")
_LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_LONGEST_WAIT = timedelta(days=2)
"""For a rank that is still encoding. A rank that dies is noticed at once, when its connection closes."""


def launched_rank() -> tuple[int, int]:
    """This process's rank and the number of ranks, as torchrun sets them; (0, 1) without torchrun."""
    if not all(name in os.environ for name in _LAUNCHED):
        return 0, 1
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


@dataclass(frozen=True)
class Ranks:
    """The processes of one run. Rank 0 leads: it alone checks, locks, writes manifests and reports."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Rank among those on this machine."""
    local_size: int = 1
    group: "ProcessGroup | None" = None
    """None: torch.distributed's default one."""

    @property
    def leads(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def lead(self, action: Callable[[], T], then: Callable[[], T]) -> T:
        """Rank 0 acts, and the others wait for it; `then` is what they do after it.

        Rank 0 reports its own error: the others exit with its status, and print nothing.
        """
        if self.size == 1:
            return action()
        if self.leads:
            try:
                result = action()
            except BaseException as error:
                self._broadcast(getattr(error, "exit_status", 1))
                raise
            self._broadcast(0)
            return result
        status = self._broadcast(None)
        if status:
            sys.exit(status)
        return then()

    def _broadcast(self, status: int | None) -> int:
        import torch.distributed as dist

        statuses = [status]
        with _lost_ranks():
            dist.broadcast_object_list(statuses, src=0, group=self.group)
        return statuses[0] or 0

    def total(self, counts: list[int], meanwhile: Callable[[], None]) -> list[int]:
        """Sums over the ranks, once all have called this; rank 0 calls `meanwhile` repeatedly until then."""
        import torch
        import torch.distributed as dist

        sums = torch.tensor(counts)
        with _lost_ranks():
            waiting = dist.all_reduce(sums, group=self.group, async_op=True)
            assert waiting is not None, "every rank is in the group"
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
            f"another rank has ended ({first_line(error)[:120]}); what was written stays: run the same command again"
        ) from None


@contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """Standard output is for results; until torch 2.10, gloo's C++ prints a line there when it connects."""
    stdout = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)


@contextmanager
def joined() -> Iterator[Ranks]:
    """This process as one of the ranks that torchrun started; without torchrun, the only one."""
    rank, size = launched_rank()
    if size == 1:
        yield Ranks()
        return
    import torch.distributed as dist

    is_own_group, group = not dist.is_initialized(), None
    if is_own_group:
        with _lost_ranks(), _stdout_to_stderr():
            dist.init_process_group("gloo", timeout=_LONGEST_WAIT)
    else:
        group = cast("ProcessGroup", dist.new_group(backend="gloo"))  # -100 for processes outside it; every rank is in
    local_rank, local_size = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    try:
        yield Ranks(rank, size, local_rank, local_size, group)
    finally:
        if is_own_group:
            dist.destroy_process_group()
