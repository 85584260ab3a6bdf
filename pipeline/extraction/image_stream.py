"""Images as merges that learn want them: batches of one task in random order, without end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from probsurgery.pipeline.datasets.tasks import Images
from probsurgery.pipeline.extraction.loading import read_batches, refuse_undecoded
from probsurgery.pipeline.merging.registry import Samples
from probsurgery.pipeline.models.architectures import functional, preprocessing

_HELD_BYTES = 2**28
"""A task whose decoded images take no more than this is decoded once."""


def samples_of(
    arch: str,
    open_task: Callable[[str, str], Images],
    classifiers: Mapping[str, Tensor],
    device: torch.device,
    workers: int,
    *,
    skip_bad: bool,
    progress: Callable[[int, int, str], None],
) -> Samples:
    """Samples for a merge of the tasks that `classifiers` has; `open_task` opens a task's split when it is needed.

    The batches of all tasks are read side by side, and share the workers.
    """
    held: dict[tuple[str, str], tuple[Tensor, Tensor]] = {}
    size = preprocessing(arch)["image_size"]
    own_workers = max(1, workers // len(classifiers)) if workers else 0

    def batches(task: str, split: str, batch_size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        images = open_task(task, split)
        labels = torch.from_numpy(images.labels)
        rows = shuffled(len(images), batch_size, seed)
        if len(images) * 3 * size * size * 4 > _HELD_BYTES:
            yield from _read(task, images, labels, arch, rows, own_workers, device, skip_bad)
        if (task, split) not in held:
            order = [list(range(i, min(i + 256, len(images)))) for i in range(0, len(images), 256)]
            parts = list(_read(task, images, labels, arch, iter(order), own_workers, device, skip_bad))
            held[task, split] = torch.cat([p for p, _ in parts]), torch.cat([its for _, its in parts])
        decoded, kept = held[task, split]
        for chosen in shuffled(len(kept), batch_size, seed):
            yield decoded[chosen], kept[chosen]

    moved = {task: classifier.to(device) for task, classifier in classifiers.items()}
    return Samples(functional(arch), moved, batches, device, progress)


def shuffled(count: int, batch_size: int, seed: int) -> Iterator[list[int]]:
    """Rows of each batch, without end: one permutation after the other, a batch may lie across two."""
    generator = torch.Generator().manual_seed(seed)
    waiting: list[int] = []
    while True:
        while len(waiting) < batch_size:
            waiting += torch.randperm(count, generator=generator).tolist()
        yield waiting[:batch_size]
        waiting = waiting[batch_size:]


def _read(
    task: str,
    images: Images,
    labels: Tensor,
    arch: str,
    rows: Iterator[list[int]],
    workers: int,
    device: torch.device,
    skip_bad: bool,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of these rows and their labels, without the images that cannot be decoded."""
    asked: list[list[int]] = []

    def noted() -> Iterator[list[int]]:
        for batch in rows:
            asked.append(batch)
            yield batch

    for decoded, bad in read_batches(images, arch, noted(), workers, device):
        its = asked.pop(0)
        if not skip_bad:
            refuse_undecoded(bad, task)
        good = [index for index, row in enumerate(its) if row not in bad]
        if good:
            yield (decoded if not bad else decoded[good]), labels[[its[index] for index in good]]
