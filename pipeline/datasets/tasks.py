"""Tasks and suites: where images, labels, class names and prompts come from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path

import numpy as np
from PIL import Image

from probsurgery.pipeline.datasets.layouts import LAYOUTS, ClassIndex, find_layout, known_layouts
from probsurgery.pipeline.errors import InputError, first_line, unknown
from probsurgery.pipeline.hub import explain


@dataclass(frozen=True)
class Task:
    """One classification task."""

    name: str
    suite: str
    class_names: tuple[str, ...]
    title: str = ""
    """Its name in the papers' tables, and in the file names of the first published checkpoints."""
    templates: tuple[str, ...] = ()
    """Prompts of the zero-shot classifier; `{}` stands for the class name."""
    expert_suffix: str = ""
    """What names the task's expert among the published checkpoints."""
    hub: dict | None = None
    """The Hugging Face data set: id, config, split names, image and label columns."""
    rows: dict[str, list[int]] = field(default_factory=dict)
    """How many images the papers' splits have, where that is known; SUN397's test split is met in two sizes."""
    aliases: tuple[str, ...] = ()
    """Class names as the data set itself spells them, where they differ by more than case and separators."""


@dataclass(frozen=True)
class Images:
    """One split of one task, opened: N images, decoded one at a time, and their labels (N,)."""

    labels: np.ndarray
    fingerprint: str
    """Digest of labels and images (of a sample of the images, outside of the mini suite)."""
    get: Callable[[int], Image.Image]
    source: str = "packages"
    """Where they are from: a data set of the Hub, a folder, or the packages of the mini suite."""
    class_order: str = "by name"
    """Whether the source's list of class names was found to agree with ours."""

    def __len__(self) -> int:
        return len(self.labels)


@cache
def _clip8() -> dict[str, Task]:
    table = json.loads((Path(__file__).parent / "clip8.json").read_text())
    return {
        name: Task(
            name,
            "clip8",
            tuple(row["classes"]),
            row["title"],
            tuple(row["templates"]),
            row["expert_suffix"],
            row["dataset"],
            row["rows"],
            tuple(row.get("aliases", ())),
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


def open_images(
    task: Task, split: str, source: str | None = None, limit: int | None = None, *, any_rows: bool = False
) -> Images:
    """Open one split of a task. `source` is a folder of data sets (clip8); None: the published one.

    Raises `InputError` if the data are missing, have another number of rows than the papers' (unless `any_rows`), have
    labels outside the task's classes, or list the classes in another order.
    """
    images = _open_mini(task, split, source) if task.suite == "mini" else _open_clip8(task, split, source)
    expected = task.rows.get(split)
    if expected and len(images) not in expected and not any_rows:
        raise InputError(
            f"{task.name} ({split}) has {len(images):,} images, but the papers' has "
            f"{' or '.join(f'{rows:,}' for rows in expected)}; complete the data set, or take it as it is with "
            "--any-rows"
        )
    if limit is not None and limit < len(images):
        digest = hashlib.sha256(f"{images.fingerprint} first {limit}".encode()).hexdigest()
        images = replace(images, labels=images.labels[:limit], fingerprint=digest)
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


def _open_clip8(task: Task, split: str, source: str | None) -> Images:
    classes = ClassIndex(task.name, task.class_names, task.aliases)
    if source is None:
        return _open_table(task, split, None, classes)
    folders = _data_folders(task, Path(source))
    for folder in folders:
        if any(folder.rglob("*.parquet")):
            return _open_table(task, split, folder, classes)
        listed = find_layout(task.name, split, folder, classes)
        if listed is not None:
            about = [task.name, split, [path.relative_to(folder).as_posix() for path in listed.files]]
            fingerprint = _data_fingerprint(about, listed.labels, listed.signature)
            return Images(listed.labels, fingerprint, listed.get, f"folder {folder.name}")
    held = ", ".join(sorted(p.name for p in folders[0].iterdir())[:8]) or "nothing"
    raise InputError(
        f"{folders[0]} has no layout that is known for {task.name} ({split}); known are: {known_layouts(task.name)}; "
        f"found: {held}"
    )


def _data_folders(task: Task, source: Path) -> list[Path]:
    """Where a task's data may lie in a folder of data sets."""
    if not source.is_dir():
        raise InputError(f"no folder {source}; --data takes a folder with a folder for each task")
    hub = task.hub["id"]
    names = dict.fromkeys((task.name, task.title, hub.split("/")[-1], hub, *LAYOUTS[task.name][0]))
    found = [source / name for name in names if (source / name).is_dir()]
    if "." in names and found == [source / "."] and not any(source.glob("*_32x32.mat")):
        found = []
    if not found:
        held = ", ".join(sorted(p.name for p in source.iterdir())[:8]) or "nothing"
        raise InputError(
            f"{source} has no folder of {task.name}; it may be called: {', '.join(n for n in names if n != '.')}; "
            f"the folder holds: {held}"
        )
    return found


def _data_fingerprint(about: list, labels: np.ndarray, signature: Callable[[int], bytes]) -> str:
    """Some images, undecoded, stand for all: reading every one would take as long as the extraction's decoding."""
    digest = hashlib.sha256(json.dumps(about).encode() + labels.tobytes())
    for row in range(0, len(labels), max(1, len(labels) // 64)):
        digest.update(signature(row))
    return digest.hexdigest()


def _open_table(task: Task, split: str, folder: Path | None, classes: ClassIndex) -> Images:
    """A data set of the Hub, or a folder in the same layout, through the `datasets` library."""
    try:
        import datasets
    except ImportError:
        raise InputError(f"task {task.name} needs the package datasets; pip install 'probsurgery[hub]'") from None
    hub = task.hub
    path = hub["id"] if folder is None else str(folder)
    if folder is not None:
        datasets.disable_progress_bars()
    try:
        config = hub["config"]
        if folder is not None and config not in datasets.get_dataset_config_names(path):
            config = None
        table = datasets.load_dataset(path, config, split=hub["split"][split])
    except Exception as error:  # the library raises its own, the hub client's and the OS's errors alike
        if folder is None:
            raise InputError(explain(error, path, "--data", "dataset")) from None
        raise InputError(
            f"cannot load the data set {path}, split {hub['split'][split]} ({first_line(error)}); check its files"
        ) from None
    for column in (hub["image"], hub["label"]):
        if column not in table.column_names:
            raise InputError(f"data set {path} has no column {column!r}; it has: {', '.join(table.column_names)}")
    names = getattr(table.features[hub["label"]], "names", None)
    if names is not None and len(names) != len(task.class_names):
        raise InputError(f"data set {path} has {len(names)} classes, but {task.name} has {len(task.class_names)}")
    order = "names unknown" if names is None else classes.check_order(names, f"data set {path}")
    labels = np.asarray(table[hub["label"]], dtype=np.int64)
    encoded = table.cast_column(hub["image"], datasets.Image(decode=False))
    fingerprint = _data_fingerprint(
        [hub["id"], hub["config"], split, names], labels, lambda row: encoded[row][hub["image"]]["bytes"] or b""
    )
    return Images(labels, fingerprint, partial(_table_image, table, hub["image"]), path, order)


def _table_image(table, column: str, row: int) -> Image.Image:
    return table[int(row)][column]
