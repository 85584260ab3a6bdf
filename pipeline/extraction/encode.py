"""The loop of stage one: images of one task and split -> features of the encoders that lack some -> shards."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from probsurgery.pipeline.config import ExtractConfig
from probsurgery.pipeline.datasets.tasks import Images
from probsurgery.pipeline.errors import ProbsurgeryError
from probsurgery.pipeline.extraction.loading import read_batches, refuse
from probsurgery.pipeline.store.formats import part_range
from probsurgery.pipeline.store.writer import CacheWriter

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
_MOST_DIFFERENCE = 0.1


@dataclass(frozen=True)
class Target:
    """One array to be filled: which encoder's features, and which of its parts are lacking."""

    writer: CacheWriter
    array: str
    encoder: str
    """Name of a tower, or `labels`."""
    parts: set[int]


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
    """Wall time spent on checkpoints and opening data sets; merging; waiting for images; encoding; waiting for the
    writer; and, of several ranks, rank 0's time with `wait`ing for the others. What the main thread waits for images
    is what reading costs beyond what the workers do meanwhile."""

    @contextmanager
    def timed(self, phase: str):
        """Count the time of a block to a phase."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start


def parts_of(targets: Sequence[Target]) -> list[int]:
    """Parts that some target lacks."""
    return sorted(set().union(*(target.parts for target in targets)))


def _batches(parts: Sequence[int], rows: int, size: int) -> list[range]:
    """Rows of each batch; none crosses a part."""
    windows = [part_range(part, rows) for part in parts]
    return [window[i : i + size] for window in windows for i in range(0, len(window), size)]


def fill(
    config: ExtractConfig,
    images: Images,
    targets: Sequence[Target],
    towers: dict[str, nn.Module],
    device: torch.device,
    workers: int,
    tally: Tally,
    progress: Callable[[int], None],
) -> None:
    """Encode the lacking parts of one task and split and write them, part by part.

    A part is written by a thread while the next is encoded, so that an encoder waits for a slow disk only if the disk
    is slower than it.
    """
    _check_precision(config, images, targets, towers, device)
    parts = parts_of(targets)
    batches = read_batches(images, config.arch, _batches(parts, len(images), config.batch_size), workers, device)
    with ThreadPoolExecutor(max_workers=1) as thread:
        writing: Future | None = None
        for part in parts:
            here = [target for target in targets if part in target.parts]
            names = {target.encoder for target in here} - {"labels"}
            encoded: dict[str, list[Tensor]] = {name: [] for name in names}
            rows = part_range(part, len(images))
            bad: dict[int, str] = {}
            for _ in range(0, len(rows), config.batch_size):
                with tally.timed("read"):
                    batch, undecoded = next(batches)
                if not config.skip_bad:
                    refuse(undecoded, here[0].array.rpartition("/")[0])
                bad |= undecoded
                with tally.timed("encode"):
                    for name in names:
                        encoded[name].append(encode(towers[name], batch, config.precision))
                tally.images += len(batch)
                tally.passes += len(batch) * len(names)
                progress(tally.images)
            with tally.timed("encode"):
                values = {name: torch.cat(blocks).cpu().numpy() for name, blocks in encoded.items()}
            with tally.timed("write"):
                if writing is not None:
                    writing.result()
            writing = thread.submit(_write, config, images.labels, here, part, rows, values, bad)
        with tally.timed("write"):
            if writing is not None:
                writing.result()


def _write(
    config: ExtractConfig,
    labels: np.ndarray,
    targets: Sequence[Target],
    part: int,
    rows: range,
    values: dict[str, np.ndarray],
    bad: dict[int, str],
) -> None:
    """Write one part of every target. Rows of images that were left out are NaN, and their labels -1."""
    left_out = [row - rows.start for row in bad]
    kept = labels[rows.start : rows.stop].copy()
    kept[left_out] = -1
    skipped = {targets[0].array.rpartition("/")[0]: {str(row): problem for row, problem in bad.items()}}
    for writer in {id(target.writer): target.writer for target in targets}.values():
        stored = {}
        for target in targets:
            if target.writer is not writer:
                continue
            if target.encoder == "labels":
                stored[target.array] = kept
                continue
            stored[target.array] = _for_store(values[target.encoder], config.dtype, target.array, rows.start)
            stored[target.array][left_out] = np.nan
        writer.write(part, stored, skipped)


def _for_store(values: np.ndarray, dtype: str, array: str, first_row: int) -> np.ndarray:
    """Features as they are kept. Raises `ProbsurgeryError` if the encoder, or the type, made one NaN or infinite."""
    with np.errstate(over="ignore"):
        stored = values.astype(dtype)
    bad = np.flatnonzero(~np.isfinite(stored).all(-1))
    if len(bad):
        raise ProbsurgeryError(
            f"features {array} are NaN or infinite in row {first_row + bad[0]}; "
            "try --precision fp32 and --dtype float32, and check that checkpoint"
        )
    return stored


def _check_precision(
    config: ExtractConfig,
    images: Images,
    targets: Sequence[Target],
    towers: dict[str, nn.Module],
    device: torch.device,
) -> None:
    """Compare the first batch with fp32, and keep the relative difference |z - z32| / |z32| in the manifests.

    Raises `ProbsurgeryError` if an encoder's is above `_MOST_DIFFERENCE`, which rounding alone does not make.
    """
    if config.precision == "fp32":
        return
    first = _batches(parts_of(targets), len(images), config.batch_size)[:1]
    batch, _ = next(read_batches(images, config.arch, first, 0, device))
    for target in targets:
        if target.encoder == "labels":
            continue
        exact = encode(towers[target.encoder], batch, "fp32")
        difference = ((encode(towers[target.encoder], batch, config.precision) - exact).norm() / exact.norm()).item()
        if not difference <= _MOST_DIFFERENCE:
            raise ProbsurgeryError(
                f"{config.precision} changes the first features of {target.array} by {difference:.1%} of their length; "
                "use --precision fp32"
            )
        target.writer.note({"precision": {target.array: difference}})


@torch.inference_mode()
def encode(tower: nn.Module, images: Tensor, precision: str) -> Tensor:
    """Images (B, 3, size, size) -> features (B, d) in float32, not normalised."""
    if precision == "fp32":
        # cuDNN would else compute the patch embedding in TF32.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            return tower(images).float()
    with torch.autocast(images.device.type, _AUTOCAST[precision]):
        return tower(images).float()
