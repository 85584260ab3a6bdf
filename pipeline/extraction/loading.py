"""Images -> batches on the device: decoded in worker processes, copied while the previous batch is encoded."""

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from probsurgery.pipeline.datasets.tasks import Images
from probsurgery.pipeline.errors import ProbsurgeryError, first_line
from probsurgery.pipeline.models.encoders import Encoder
from probsurgery.pipeline.models.preprocessing import Preprocessing

Batch = tuple[Tensor, dict[int, str]]
"""Images (B, 3, size, size), and the rows among them that could not be decoded, each with the reason."""
_LOST = ("DataLoader worker", "Communication with the workers", "items of ancdata")
"""What torch's errors say when a decoding process has died, or has no memory or files to send its batch in."""


def read_batches(
    images: Images, encoder: Encoder, rows: Iterable[Sequence[int]], workers: int, device: torch.device
) -> Iterator[Batch]:
    """Batches of these rows on the device, in order, preprocessed for the encoder."""
    batches = DataLoader(
        _Decoded(images, encoder.preprocessing),
        batch_sampler=cast("Iterable[list[int]]", rows),
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=device.type == "cuda",
    )
    try:
        with _without_callers_script():
            decoded = iter(batches)  # starts the workers
    except OSError as error:
        problem = f"cannot start {workers} processes that decode images: {error.strerror or first_line(error)}"
        raise ProbsurgeryError(f"{problem}; use fewer --workers") from None
    return _copied(decoded, device) if device.type == "cuda" else decoded


@contextmanager
def _without_callers_script() -> Iterator[None]:
    """Keep processes that start here from importing the caller's script, as all but forked ones do.

    A script that calls `extract` without an `if __name__ == "__main__":` would call it again in each of them, and wait
    for ever. They need nothing of it: whatever they are sent is from this package and from libraries.
    """
    script = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = script


@contextmanager
def lost_workers() -> Iterator[None]:
    """Turn the loss of a decoding process into a `ProbsurgeryError` that says what to change.

    torch raises its error from a signal handler, so wherever the main thread is at that moment.
    """
    try:
        yield
    except RuntimeError as error:
        lines = str(error).strip().splitlines()
        if not any(sign in str(error) for sign in _LOST):
            raise
        problem = lines[-1 if lines[0].startswith("Caught ") else 0].rstrip(". ")
        advice = "use fewer --workers (0: none), as memory, /dev/shm or open files may have run out"
        raise ProbsurgeryError(
            f"a process that decodes images was lost ({problem}); what is written stays, and the same command goes on "
            f"from there: {advice}"
        ) from None


def refuse_undecoded(problems: dict[int, str], where: str) -> None:
    """Raise `ProbsurgeryError` naming the first image that could not be decoded, if there is one."""
    for row, problem in problems.items():
        raise ProbsurgeryError(
            f"image {row} of {where} cannot be decoded: {problem}; repair it, or leave such images out with --skip-bad"
        )


def _copied(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """Copies each batch on a separate CUDA stream while the previous one is encoded."""
    copying = torch.cuda.Stream(device)
    waiting: list[Batch] = []
    for batch, bad in batches:
        with torch.cuda.stream(copying):
            copied = batch.to(device, non_blocking=True)
        yield from waiting
        torch.cuda.current_stream(device).wait_stream(copying)
        copied.record_stream(torch.cuda.current_stream(device))
        waiting = [(copied, bad)]
    yield from waiting


class _Decoded(Dataset[tuple[Tensor, tuple[int, str] | None]]):
    """Images as the encoder takes them. An image that cannot be decoded becomes zeros, with the text of the error."""

    def __init__(self, images: Images, preprocessing: Preprocessing) -> None:
        self.images, self.transform, self.size = images, preprocessing.transform, preprocessing.image_size

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> tuple[Tensor, tuple[int, str] | None]:
        try:
            return self.transform(self.images.decode(row)), None
        except Exception as error:  # damaged image files raise anything in their decoders
            return torch.zeros(3, self.size, self.size), (row, first_line(error))


def _collate(items: list[tuple[Tensor, tuple[int, str] | None]]) -> Batch:
    return default_collate([image for image, _ in items]), dict(problem for _, problem in items if problem)
