"""Everything that a suite names, opened without encoding: what would stop `extract`, all of it at once."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

import torch

from probsurgery.pipeline.config import SPLITS, ExtractConfig
from probsurgery.pipeline.datasets.suites import read_suite, suite_path
from probsurgery.pipeline.datasets.tasks import Images, Task, open_images, with_classes
from probsurgery.pipeline.errors import ProbsurgeryError, first_line
from probsurgery.pipeline.extraction.run_plan import chosen
from probsurgery.pipeline.models.sources import Weights
from probsurgery.pipeline.models.text_classifiers import load_classifiers
from probsurgery.pipeline.progress import Progress, no_progress

_NAMED = 5
"""Images of a split that are named if they cannot be decoded."""
T = TypeVar("T")


def check_suite(
    suite: str, arch: str | None, checkpoints: str | None, data: str | None, progress: Progress = no_progress
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """What each task of a suite has, and a line for each problem: a file's keys, checkpoints, classifiers, images.

    `suite`, `arch`, `checkpoints` and `data` are as for `ExtractConfig`. Every image is decoded.
    """
    read, problems = read_suite(suite_path(suite))
    if read is None:
        return {}, problems

    def tried(step: Callable[[], T]) -> T | None:
        try:
            return step()
        except (ProbsurgeryError, OSError) as error:
            if str(error) not in problems:  # one file may be the cause of several
                problems.append(str(error))
            return None

    choice = tried(lambda: chosen(ExtractConfig(arch, suite=suite, data=data, checkpoints=checkpoints)))
    weights = tried(lambda: Weights(choice[1], checkpoints, read.places)) if choice else None
    usable = weights if weights and tried(weights.pretrained) else None
    checked = {}
    for listed in read.tasks.values():
        task = tried(partial(with_classes, listed))
        if task is None:
            continue
        row: dict[str, Any] = {"classes": len(task.class_names), "class_names": task.class_names}
        row |= {"classifier": "no classifier", "expert": "not read"}
        if usable and tried(partial(usable.expert, task)):
            row["expert"] = usable.files[task.name].source
        classifiers = tried(partial(load_classifiers, usable, [task], torch.device("cpu"))) if usable else None
        if usable and classifiers:
            row["classifier"] = f"classifier from {usable.files[f'classifier {task.name}'].source}"
            row["classes"] = len(classifiers[task.name].weight)
        row["images"] = {}
        for split in SPLITS:
            if task.source(split) or (task.hub and split in task.hub.split):
                images = tried(partial(open_images, task, split, data))
                row["images"] |= {split: len(images)} if images else {}
                problems += _undecoded(task, split, images, progress) if images else []
        checked[task.name] = row
    return checked, problems


def _undecoded(task: Task, split: str, images: Images, progress: Progress) -> list[str]:
    """A line for each of the first images that cannot be decoded, and one with the number of all."""

    def problem(row: int) -> str | None:
        try:
            images.decode(row)
        except Exception as error:  # damaged image files raise anything in their decoders
            return f"{task.name} ({split}): image {row} cannot be decoded: {first_line(error)}"
        return None

    found = []
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for done, line in enumerate(threads.map(problem, range(len(images)), chunksize=64), start=1):
            progress(done, len(images), task.name)
            found += [line] if line else []
    rest = [f"{task.name} ({split}): {len(found)} images cannot be decoded"] if len(found) > _NAMED else []
    return found[:_NAMED] + rest
