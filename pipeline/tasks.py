"""Tasks and suites: where images, labels, class names and prompts come from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
from PIL import Image

from probsurgery.pipeline.errors import InputError, first_line, unknown


@dataclass(frozen=True)
class Task:
    """One classification task."""

    name: str
    suite: str
    class_names: tuple[str, ...]
    templates: tuple[str, ...] = ()
    """Prompts of the zero-shot classifier; `{}` stands for the class name."""
    expert_suffix: str = ""
    """What names the task's expert among the published checkpoints."""
    hub: dict | None = None
    """The Hugging Face data set: id, config, split names, image and label columns."""


@dataclass(frozen=True)
class Images:
    """One split of one task, opened: N images, decoded one at a time, and their labels (N,)."""

    labels: np.ndarray
    fingerprint: str
    """Digest of labels and images (of a sample of the images, for data sets of the hub)."""
    get: Callable[[int], Image.Image]

    def __len__(self) -> int:
        return len(self.labels)


@cache
def _clip8() -> dict[str, Task]:
    table = json.loads((Path(__file__).parent / "data" / "clip8.json").read_text())
    return {
        name: Task(
            name,
            "clip8",
            tuple(row["classes"]),
            tuple(row["templates"]),
            row["expert_suffix"],
            row["dataset"],
        )
        for name, row in table.items()
    }


@cache
def _mini() -> dict[str, Task]:
    from probsurgery.pipeline.mini import MINI_TASKS

    return {name: Task(name, "mini", tuple(row.class_names)) for name, row in MINI_TASKS.items()}


SUITES: dict[str, Callable[[], dict[str, Task]]] = {"mini": _mini, "clip8": _clip8}
"""`mini` ships with the package and needs no network; `clip8` is the papers' eight tasks."""


def select_tasks(suite: str, names: Sequence[str] | None) -> tuple[Task, ...]:
    """Tasks of a suite by name, in the suite's order; None: all. Raises `InputError` for an unknown name."""
    known = SUITES[suite]()
    if names is None:
        return tuple(known.values())
    check_names(names, known)
    return tuple(task for name, task in known.items() if name in names)


def check_names(names: Sequence[str], known: Sequence[str]) -> None:
    """Raise `InputError` unless there is at least one name, each is known, and none comes twice."""
    if not names:
        raise InputError(f"no task was named; choose from: {', '.join(known)}")
    for name in names:
        if name not in known:
            raise unknown("task", name, known)
    if len(set(names)) < len(names):
        raise InputError(f"a task is named twice: {', '.join(names)}")


def open_images(task: Task, split: str, source: str | None = None, limit: int | None = None) -> Images:
    """Open one split of a task. `source` is a folder with a data set for each task (clip8); None: the published one.

    Raises `InputError` if the data are missing, have no rows, or have labels outside the task's classes.
    """
    images = _open_mini(task, split, source) if task.suite == "mini" else _open_hub(task, split, source)
    if limit is not None and limit < len(images):
        digest = hashlib.sha256(f"{images.fingerprint} first {limit}".encode()).hexdigest()
        images = Images(images.labels[:limit], digest, images.get)
    if not len(images):
        raise InputError(f"task {task.name} ({split}) has no rows")
    low, high = images.labels.min(), images.labels.max()
    if low < 0 or high >= len(task.class_names):
        raise InputError(
            f"task {task.name} ({split}) has labels from {low} to {high}, but {len(task.class_names)} classes"
        )
    return images


def _open_mini(task: Task, split: str, source: str | None) -> Images:
    from probsurgery.pipeline.mini import load

    if source is not None:
        raise InputError("--data is for the clip8 suite; the mini suite's images come with its packages")
    images, labels = load(task.name, split)
    digest = hashlib.sha256(labels.tobytes())
    for image in images:
        digest.update(f"{image.mode} {image.size}".encode())
        digest.update(image.tobytes())
    return Images(labels, digest.hexdigest(), images.__getitem__)


def _open_hub(task: Task, split: str, source: str | None) -> Images:
    try:
        import datasets
    except ImportError:
        raise InputError(f"task {task.name} needs the package datasets; pip install 'probsurgery[hub]'") from None
    hub = task.hub
    path, config = (hub["id"], hub["config"]) if source is None else (str(Path(source) / task.name), None)
    if source is not None and not Path(path).is_dir():
        raise InputError(f"no folder {path}; --data takes a folder with one folder for each task")
    datasets.disable_progress_bars()
    try:
        table = datasets.load_dataset(path, config, split=hub["split"][split])
    except Exception as error:  # the library raises its own, the hub client's and the OS's errors alike
        raise InputError(
            f"cannot load the data set {path}, split {hub['split'][split]} ({first_line(error)}); "
            "check the connection, or give --data FOLDER"
        ) from None
    for column in (hub["image"], hub["label"]):
        if column not in table.column_names:
            raise InputError(f"data set {path} has no column {column!r}; it has: {', '.join(table.column_names)}")
    names = getattr(table.features[hub["label"]], "names", None)
    if names is not None and len(names) != len(task.class_names):
        raise InputError(f"data set {path} has {len(names)} classes, but {task.name} has {len(task.class_names)}")
    labels = np.asarray(table[hub["label"]], dtype=np.int64)
    digest = hashlib.sha256(json.dumps([hub["id"], hub["config"], split, names]).encode() + labels.tobytes())
    # Some images, undecoded, stand for all: reading every one would take as long as the extraction's decoding.
    encoded = table.cast_column(hub["image"], datasets.Image(decode=False))
    for row in range(0, len(labels), max(1, len(labels) // 64)):
        digest.update(encoded[row][hub["image"]]["bytes"] or b"")
    return Images(labels, digest.hexdigest(), partial(_hub_image, table, hub["image"]))


def _hub_image(table, column: str, row: int) -> Image.Image:
    return table[int(row)][column]
