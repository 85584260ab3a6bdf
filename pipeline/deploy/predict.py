"""Image files -> classes, by a model."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from probsurgery.pipeline.datasets.pictures import read_rgb
from probsurgery.pipeline.deploy.model import SurgeryModel
from probsurgery.pipeline.errors import InputError, first_line, unknown
from probsurgery.pipeline.files import file_size

_BATCH_SIZE = 64


@dataclass(frozen=True)
class Prediction:
    """The likeliest classes of an image, with probabilities in [0, 1]."""

    image: str
    classes: tuple[tuple[str, float], ...]
    sigma: float | None
    """Of ProbSurgery heads: the correction's predicted standard deviation, root mean square over dimensions."""


def check_images(images: Sequence[Path]) -> None:
    """Raise `InputError` naming the first that is no file, or may not be read, before a model is made for them."""
    for path in images:
        if file_size(path) is None:
            raise InputError(f"{path} is no file; predict takes image files")
        if not os.access(path, os.R_OK):
            raise InputError(f"{path} cannot be read: no permission")


@torch.inference_mode()
def predict(
    model: SurgeryModel, task: str, images: Sequence[Path], device: torch.device | str = "cpu", top: int = 3
) -> list[Prediction]:
    """Classify image files. Raises `InputError` naming the first that cannot be read."""
    if task not in model.tasks:
        raise unknown("task", task, model.tasks)
    names, model, predictions = model.class_names[task], model.to(device), []
    for start in range(0, len(images), _BATCH_SIZE):
        paths = images[start : start + _BATCH_SIZE]
        merged = model.encoder(torch.stack([_read(model, path) for path in paths]).to(device))
        probabilities = model.classify(model.correct(merged, task), task).softmax(-1).cpu()
        sigmas = model.sigma(merged, task).tolist() if model.settings.predicts_sigma else [None] * len(merged)
        for path, row, sigma in zip(paths, probabilities, sigmas, strict=True):
            best = row.topk(min(top, len(row)))
            classes = [names[i] if i < len(names) else str(i) for i in best.indices.tolist()]
            predictions.append(Prediction(str(path), tuple(zip(classes, best.values.tolist(), strict=True)), sigma))
    return predictions


def _read(model: SurgeryModel, path: Path) -> Tensor:
    try:
        return model.transform(read_rgb(path))
    except InputError:
        raise
    except Exception as error:  # damaged image files raise anything in their decoders
        raise InputError(f"{path} is not an image that can be read: {first_line(error)}") from None
