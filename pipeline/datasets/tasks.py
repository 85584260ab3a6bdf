"""Tasks and suites: the sources of images, labels, class names and prompts."""

import hashlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from probsurgery.pipeline.datasets.layouts import FOLDERS, ClassIndex, find_layout, known_layouts
from probsurgery.pipeline.errors import InputError, first_line, unknown
from probsurgery.pipeline.files import Record, decode, read_json
from probsurgery.pipeline.hub import explain


class HubDataset(Record, frozen=True):
    """A data set of the Hugging Face Hub: its names of our splits, its columns of images and labels."""

    id: str
    config: str | None
    split: dict[str, str]
    image: str
    label: str


class Task(Record, frozen=True, rename={"class_names": "classes", "hub": "dataset"}):
    """One classification task."""

    name: str
    suite: str
    class_names: tuple[str, ...]
    title: str = ""
    """Name in the papers' tables, and in file names of the task-vectors code's checkpoints."""
    templates: tuple[str, ...] = ()
    """Prompts of the zero-shot classifier; `{}` stands for the class name."""
    expert_suffix: str = ""
    """The task's part of the name of its published expert."""
    hub: HubDataset | None = None
    rows: Mapping[str, tuple[int, ...]] = {}
    """Number of images of the papers' splits, where known. SUN397's test split exists in two sizes."""
    aliases: tuple[str, ...] = ()
    """The data set's own class names, where they differ from ours by more than case and separators."""

    @property
    def published(self) -> HubDataset:
        """The data set of the Hub, of a task that has one."""
        assert self.hub is not None, f"{self.name} is in the package"
        return self.hub


@dataclass(frozen=True)
class Images:
    """One opened split of a task: N images, decoded on request, and their labels (N,)."""

    labels: np.ndarray
    fingerprint: str
    """Digest of labels and images (of a sample of the images, except in the mini suite)."""
    decode: Callable[[int], Image.Image]
    """Decodes the image of a row."""
    source: str = "packages"
    """A data set of the Hub, a folder, or the packages of the mini suite."""
    class_order: str = "by name"
    """Whether the source's order of class names was checked against ours."""

    def __len__(self) -> int:
        return len(self.labels)


@cache
def _clip8() -> dict[str, Task]:
    table = read_json(Path(__file__).parent / "clip8.json", 2**20)
    return {name: decode(Task, row | {"name": name, "suite": "clip8"}) for name, row in table.items()}


@cache
def _mini() -> dict[str, Task]:
    from probsurgery.pipeline.mini import MINI_TASKS

    return {name: Task(name, "mini", tuple(row.class_names)) for name, row in MINI_TASKS.items()}


SUITES: dict[str, Callable[[], dict[str, Task]]] = {"mini": _mini, "clip8": _clip8}
"""`mini` is part of the package and needs no network; `clip8` are the papers' eight tasks."""


def select_tasks(suite: str, names: Sequence[str] | None) -> tuple[Task, ...]:
    """Tasks of a suite by name, in the suite's order; all if None. Raises `InputError` for an unknown name."""
    known = SUITES[suite]()
    if names is None:
        return tuple(known.values())
    check_names(names, known)
    return tuple(task for name, task in known.items() if name in names)


def check_names(names: Sequence[str], known: Collection[str]) -> None:
    """Raise `InputError` unless there is at least one name, all names are known, and none is repeated."""
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
    """Open one split of a task, from the published data set or from a folder of data sets, `source`.

    Raises `InputError` if the data are missing, have another number of rows than the papers' (unless `any_rows`),
    contain labels outside the task's classes, or list the classes in another order.
    """
    images = _open_mini(task, split, source) if task.suite == "mini" else _open_clip8(task, split, source)
    published = task.rows.get(split)
    if published and len(images) not in published and not any_rows:
        expected = " or ".join(f"{rows:,}" for rows in published)
        raise InputError(
            f"{task.name} ({split}) has {len(images):,} images, but the papers' has {expected}; complete the data set, "
            "or accept it with --any-rows"
        )
    if limit is not None and limit < len(images):
        digest = hashlib.sha256(f"{images.fingerprint} first {limit}".encode()).hexdigest()
        images = replace(images, labels=images.labels[:limit], fingerprint=digest)
    if not len(images):
        raise InputError(f"task {task.name} ({split}) has no rows")
    low, high, classes = images.labels.min(), images.labels.max(), len(task.class_names)
    if low < 0 or high >= classes:
        raise InputError(f"task {task.name} ({split}) has labels from {low} to {high}, but {classes} classes")
    return images


def _open_mini(task: Task, split: str, source: str | None) -> Images:
    from probsurgery.pipeline.mini import MINI_TASKS, load

    if source is not None:
        raise InputError("--data is for the clip8 suite; the mini suite's images come with its packages")
    images, labels = load(task.name, split)
    return Images(labels, MINI_TASKS[task.name].digests[split], images.__getitem__)  # `load` compared the digest


def _open_clip8(task: Task, split: str, source: str | None) -> Images:
    classes = ClassIndex(task.name, task.class_names, task.aliases)
    if source is None:
        return _open_table(task, split, None, classes)
    folders = _data_folders(task, Path(source))
    for folder in folders:
        if any(folder.rglob("*.parquet")):
            return _open_table(task, split, folder, classes)
        listing = find_layout(task.name, split, folder, classes)
        if listing is not None:
            files = [path.relative_to(folder).as_posix() for path in listing.files]
            fingerprint = _data_fingerprint([task.name, split, files], listing.labels, listing.encoded)
            return Images(listing.labels, fingerprint, listing.decode, f"folder {folder.name}")
    raise InputError(
        f"{folders[0]} has no known layout of {task.name} ({split}); known are: {known_layouts(task.name)}; "
        f"found: {_first_names(folders[0])}"
    )


def _first_names(folder: Path) -> str:
    return ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"


def _data_folders(task: Task, source: Path) -> list[Path]:
    """Folders in a folder of data sets that may hold a task's data."""
    if not source.is_dir():
        raise InputError(f"no folder {source}; --data takes a folder with a folder for each task")
    repo = task.published.id
    names = dict.fromkeys((task.name, task.title, repo.split("/")[-1], repo, *FOLDERS[task.name].names))
    folders = [source / name for name in names if (source / name).is_dir()]
    if not folders or (folders == [source / "."] and not any(source.glob("*_32x32.mat"))):
        raise InputError(
            f"{source} has no folder of {task.name}; it may be called: {', '.join(n for n in names if n != '.')}; "
            f"the folder holds: {_first_names(source)}"
        )
    return folders


def _data_fingerprint(origin: list[Any], labels: np.ndarray, encoded: Callable[[int], bytes]) -> str:
    """Digest of the origin, all labels and at most 128 encoded images: reading all takes as long as the extraction."""
    digest = hashlib.sha256(json.dumps(origin).encode() + labels.tobytes())
    for row in range(0, len(labels), max(1, len(labels) // 64)):
        digest.update(encoded(row))
    return digest.hexdigest()


def _open_table(task: Task, split: str, folder: Path | None, classes: ClassIndex) -> Images:
    """A data set of the Hub, or a folder in the same layout, opened by the `datasets` library."""
    try:
        import datasets
    except ImportError:
        raise InputError(f"task {task.name} needs the package datasets; pip install 'probsurgery[hub]'") from None
    hub = task.published
    path, config = hub.id if folder is None else str(folder), hub.config
    if folder is not None:
        datasets.disable_progress_bars()
    try:
        if folder is not None and config not in datasets.get_dataset_config_names(path):
            config = None
        table = datasets.load_dataset(path, config, split=hub.split[split])
    except Exception as error:  # the library raises its own, the hub client's and the OS's errors
        if folder is None:
            raise InputError(explain(error, path, "--data", "dataset")) from None
        problem = f"cannot load the data set {path}, split {hub.split[split]} ({first_line(error)})"
        raise InputError(f"{problem}; check its files") from None
    for column in (hub.image, hub.label):
        if column not in table.column_names:
            raise InputError(f"data set {path} has no column {column!r}; it has: {', '.join(table.column_names)}")
    names = getattr(table.features[hub.label], "names", None)
    if names is not None and len(names) != len(task.class_names):
        raise InputError(f"data set {path} has {len(names)} classes, but {task.name} has {len(task.class_names)}")
    order = "names unknown" if names is None else classes.check_order(names, f"data set {path}")
    labels = np.asarray(table[hub.label], dtype=np.int64)
    undecoded = table.cast_column(hub.image, datasets.Image(decode=False))
    origin = [hub.id, hub.config, split, names]
    fingerprint = _data_fingerprint(origin, labels, lambda row: undecoded[row][hub.image]["bytes"] or b"")
    return Images(labels, fingerprint, partial(_decode_row, table, hub.image), path, order)


def _decode_row(table: Any, column: str, row: int) -> Image.Image:
    return table[int(row)][column]
