"""Images for merges that learn: endless batches of one task in random order."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import tee

import torch
from torch import Tensor

from probsurgery.pipeline.classifier import Classifier
from probsurgery.pipeline.datasets.tasks import Images
from probsurgery.pipeline.extraction.loading import read_batches, refuse_undecoded
from probsurgery.pipeline.merging.vectors import ImageStream
from probsurgery.pipeline.models.encoders import Encoder
from probsurgery.pipeline.progress import Progress

_HELD_BYTES = 2**28
"""A task whose decoded images take no more than this is decoded once."""
_AT_ONCE = 256
"""Images in a batch while a whole task is decoded."""


def image_stream(
    encoder: Encoder,
    open_task: Callable[[str, str], Images],
    classifiers: Mapping[str, Classifier],
    device: torch.device,
    workers: int,
    *,
    skip_bad: bool,
    progress: Progress,
) -> ImageStream:
    """The images for a merge of the tasks that `classifiers` has; `open_task` opens a task's split when it is needed.

    The batches of all tasks are read side by side, and share the workers.
    """
    decoder = _Decoder(encoder, device, max(1, workers // max(1, len(classifiers))) if workers else 0, skip_bad)
    size = encoder.preprocessing.image_size
    decoded: dict[tuple[str, str], tuple[Tensor, Tensor]] = {}

    def batches(task: str, split: str, batch_size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        images = open_task(task, split)
        if len(images) * 3 * size * size * 4 > _HELD_BYTES:
            yield from decoder.read(task, images, shuffled(len(images), batch_size, seed))
        if (task, split) not in decoded:
            windows = (range(len(images))[i : i + _AT_ONCE] for i in range(0, len(images), _AT_ONCE))
            read = list(decoder.read(task, images, windows))
            decoded[task, split] = torch.cat([batch for batch, _ in read]), torch.cat([labels for _, labels in read])
        pixels, labels = decoded[task, split]
        for rows in shuffled(len(labels), batch_size, seed):
            yield pixels[rows], labels[rows]

    moved = {task: classifier.to(device) for task, classifier in classifiers.items()}
    return ImageStream(encoder.functional(), moved, batches, device, progress)


def shuffled(count: int, batch_size: int, seed: int) -> Iterator[list[int]]:
    """Rows of each batch, without end: one permutation after the other; a batch may span two."""
    generator = torch.Generator().manual_seed(seed)
    waiting: list[int] = []
    while True:
        while len(waiting) < batch_size:
            waiting += torch.randperm(count, generator=generator).tolist()
        yield waiting[:batch_size]
        waiting = waiting[batch_size:]


@dataclass(frozen=True)
class _Decoder:
    encoder: Encoder
    device: torch.device
    workers: int
    skip_bad: bool

    def read(self, task: str, images: Images, batch_rows: Iterator[Sequence[int]]) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of these rows with their labels, without the images that cannot be decoded."""
        labels = torch.from_numpy(images.labels)
        to_read, batch_rows = tee(batch_rows)  # the workers read ahead
        batches = read_batches(images, self.encoder, to_read, self.workers, self.device)
        for (pixels, undecoded), rows in zip(batches, batch_rows, strict=True):
            if not self.skip_bad:
                refuse_undecoded(undecoded, task)
            good = [index for index, row in enumerate(rows) if row not in undecoded]
            if good:
                yield (pixels[good] if undecoded else pixels), labels[[rows[index] for index in good]]
