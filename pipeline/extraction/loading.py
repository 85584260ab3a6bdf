"""Images -> batches on the device: decoded in worker processes, copied while the previous batch is encoded."""

from collections.abc import Iterable, Iterator, Sequence
from typing import cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from probsurgery.pipeline.datasets.tasks import Images
from probsurgery.pipeline.errors import ProbsurgeryError, first_line
from probsurgery.pipeline.models.architectures import Transform, image_transform, preprocessing

Batch = tuple[Tensor, dict[int, str]]
"""Images (B, 3, size, size), and the rows among them that could not be decoded, each with the reason."""


def read_batches(
    images: Images, arch: str, rows: Iterable[Sequence[int]], workers: int, device: torch.device
) -> Iterator[Batch]:
    """Batches of these rows on the device, in order, preprocessed for the architecture."""
    batches = DataLoader(
        _Decoded(images, image_transform(arch), preprocessing(arch)["image_size"]),
        batch_sampler=cast("Iterable[list[int]]", rows),
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=device.type == "cuda",
    )
    return _copied(batches, device) if device.type == "cuda" else iter(batches)


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

    def __init__(self, images: Images, transform: Transform, size: int) -> None:
        self.images, self.transform, self.size = images, transform, size

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> tuple[Tensor, tuple[int, str] | None]:
        try:
            return self.transform(self.images.decode(row)), None
        except Exception as error:  # damaged image files raise anything in their decoders
            return torch.zeros(3, self.size, self.size), (row, first_line(error))


def _collate(items: list[tuple[Tensor, tuple[int, str] | None]]) -> Batch:
    return default_collate([image for image, _ in items]), dict(problem for _, problem in items if problem)
