"""The loop of stage one: images of one task and split -> features of the encoders that lack some -> shards."""

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from operator import attrgetter

import numpy as np
import torch
from torch import Tensor, nn

from probsurgery.pipeline.datasets.tasks import Images
from probsurgery.pipeline.errors import ProbsurgeryError
from probsurgery.pipeline.extraction.loading import read_batches, refuse_undecoded
from probsurgery.pipeline.extraction.run_plan import RunPlan
from probsurgery.pipeline.store.arrays import bad_rows, shard_rows
from probsurgery.pipeline.store.writer import CacheWriter, JournalEntry

TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_MOST_DIFFERENCE = 0.1


@dataclass(frozen=True)
class Target:
    """One array to be filled: by which encoder, and which of its shards are missing."""

    writer: CacheWriter
    array: str
    encoder: str
    """Name of a tower, or `labels`."""
    shards: set[int]


@dataclass
class Tally:
    """How much was done, and where the time went."""

    images: int = 0
    """Images that were encoded; 0 if everything was there already."""
    passes: int = 0
    """Forward passes of a single image through a single encoder."""
    seconds: dict[str, float] = field(
        default_factory=lambda: {"prepare": 0.0, "merge": 0.0, "read": 0.0, "encode": 0.0, "write": 0.0}
    )
    """Wall time of the main thread: `prepare` (checkpoints, data sets), `merge`, `read` (waiting for decoded images),
    `encode`, `write` (waiting for the writing thread), and with several ranks `wait` (for the others)."""

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the time of a block to a phase."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start


def shards_of(targets: Sequence[Target]) -> list[int]:
    """Numbers of the shards that some target lacks."""
    return sorted(set().union(*(target.shards for target in targets)))


def _batch_rows(shards: Sequence[int], rows: int, size: int) -> list[range]:
    """Rows of each batch; none crosses a shard."""
    windows = [shard_rows(number, rows) for number in shards]
    return [window[i : i + size] for window in windows for i in range(0, len(window), size)]


def fill(
    plan: RunPlan,
    images: Images,
    targets: Sequence[Target],
    towers: Mapping[str, nn.Module],
    tally: Tally,
    progress: Callable[[], None],
) -> None:
    """Encode the missing shards of one task and split, and write them one by one.

    A shard is written by a thread while the next is encoded, so that an encoder waits for a slow disk only if the disk
    is slower than it.
    """
    config, shards = plan.config, shards_of(targets)
    batch_rows = _batch_rows(shards, len(images), config.batch_size)
    towers = _in_precision(plan, images, batch_rows[:1], targets, towers)
    batches = read_batches(images, plan.encoder, batch_rows, plan.workers, plan.device)
    with ThreadPoolExecutor(max_workers=1) as thread:
        writing: Future[None] | None = None
        for number in shards:
            here = [target for target in targets if number in target.shards]
            names = {target.encoder for target in here} - {"labels"}
            encoded: dict[str, list[Tensor]] = {name: [] for name in names}
            rows = shard_rows(number, len(images))
            undecoded: dict[int, str] = {}
            for _ in range(0, len(rows), config.batch_size):
                with tally.timed("read"):
                    batch, problems = next(batches)
                if not config.skip_bad:
                    refuse_undecoded(problems, here[0].array.rpartition("/")[0])
                undecoded |= problems
                with tally.timed("encode"):
                    for name in names:
                        encoded[name].append(encode(towers[name], batch))
                tally.images += len(batch)
                tally.passes += len(batch) * len(names)
                progress()
            with tally.timed("encode"):
                values = {name: torch.cat(blocks).cpu().numpy() for name, blocks in encoded.items()}
            values["labels"] = images.labels[rows.start : rows.stop]
            with tally.timed("write"):
                if writing is not None:
                    writing.result()
            writing = thread.submit(_write, config.dtype, here, number, rows, values, undecoded)
        with tally.timed("write"):
            if writing is not None:
                writing.result()


def _write(
    dtype: str,
    targets: Sequence[Target],
    number: int,
    rows: range,
    values: Mapping[str, np.ndarray],
    undecoded: Mapping[int, str],
) -> None:
    """Write the shards of one number. In rows of undecoded images features are NaN, and labels -1."""
    omitted = [row - rows.start for row in undecoded]
    skipped = {targets[0].array.rpartition("/")[0]: {str(row): problem for row, problem in undecoded.items()}}
    for writer, own_targets in groupby(targets, attrgetter("writer")):
        stored = {}
        for target in own_targets:
            array, is_labels = values[target.encoder], target.encoder == "labels"
            array = array.copy() if is_labels else _as_stored(array, target, dtype, rows.start)
            array[omitted] = -1 if is_labels else np.nan
            stored[target.array] = array
        writer.write(number, stored, skipped)


def _as_stored(features: np.ndarray, target: Target, dtype: str, first_row: int) -> np.ndarray:
    """Features in the cache's type. Raises `ProbsurgeryError` if `bad_rows` finds that no head could use one."""
    with np.errstate(over="ignore"):
        stored = features.astype(dtype)
    bad, wrong = bad_rows(target.array, stored, 0)
    if len(bad):
        raise ProbsurgeryError(
            f"features {target.array} are {wrong} in row {first_row + bad[0]}; "
            "try --precision fp32 and --dtype float32, and check that checkpoint"
        )
    return stored


def _in_precision(
    plan: RunPlan, images: Images, first: list[range], targets: Sequence[Target], towers: Mapping[str, nn.Module]
) -> Mapping[str, nn.Module]:
    """The towers in the run's type. The relative difference |z - z32| / |z32| of the first batch goes to the manifests.

    Raises `ProbsurgeryError` if an encoder's is above `_MOST_DIFFERENCE`, which rounding alone does not cause.
    """
    precision = plan.config.precision
    if precision == "fp32":
        return towers
    batch, _ = next(read_batches(images, plan.encoder, first, 0, plan.device))
    used = {}
    for target in targets:
        if target.encoder == "labels":
            continue
        exact, used[target.encoder] = towers[target.encoder], cast(towers[target.encoder], precision)
        features = encode(exact, batch)
        difference = ((encode(used[target.encoder], batch) - features).norm() / features.norm()).item()
        if not difference <= _MOST_DIFFERENCE:
            change = f"changes the first features of {target.array} by {difference:.1%} of their length"
            raise ProbsurgeryError(f"{precision} {change}; use --precision fp32")
        target.writer.note(JournalEntry(precision={target.array: difference}))
    return used


def cast(tower: nn.Module, precision: str) -> nn.Module:
    """A copy of a tower with weights in another type: cast once, where autocast would cast them in every pass.

    Layer norms are not kept in fp32: torch sums in fp32 within each anyway, and features do not come nearer to fp32's.
    """
    return copy.deepcopy(tower).to(TYPES[precision])


@torch.inference_mode()
def encode(tower: nn.Module, images: Tensor) -> Tensor:
    """Images (B, 3, size, size) -> features (B, d) in float32, not normalised, computed in the type of the weights."""
    # Otherwise cuDNN would compute the patch embedding in TF32.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        return tower(images.to(next(tower.parameters()).dtype)).float()
