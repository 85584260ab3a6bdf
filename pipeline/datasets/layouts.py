"""Data sets in folders: the layouts of torchvision, of the task-vectors code, and of the data sets' own archives.

A layout is a function of a folder. It returns the images of one split with their labels, or None if the folder has
another layout. Labels come from class names if a layout has names, so that they do not depend on an order.
"""

import csv
import gzip
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from pathlib import Path

import numpy as np
from PIL import Image

from probsurgery.pipeline.datasets.pictures import read_rgb
from probsurgery.pipeline.errors import InputError, first_line

_IMAGES = {".jpg", ".jpeg", ".png", ".ppm", ".pgm", ".bmp", ".tif", ".tiff", ".webp"}  # as torchvision's
_DROPPINGS = re.compile(
    r"\..*|.*~|~\$.*|#.*#|@eadir|@recycle|@recently-snapshot|@tmp|#recycle|#snapshot|\$recycle\.bin"
    r"|system volume information|lost\+found|(eh)?thumbs(_vista)?\.db.*|desktop\.ini|icon\r|__macosx",
    re.IGNORECASE,
)
"""Names of files and folders that file managers, file servers, archivers and tools leave among others."""
_PERHAPS = re.compile(
    r"recycler|recycled|found\.\d{3}|__pycache__|cvs|network trash folder|temporary items|thevolumesettingsfolder",
    re.IGNORECASE,
)
"""Such names of folders that may also be those of a class, and are if there are images in them."""


@dataclass(frozen=True)
class Listing:
    """One split in a folder: labels (N,), and a file per image or one array (N, H, W[, 3]) of all images."""

    labels: np.ndarray
    files: Sequence[Path] = ()
    pixels: np.ndarray | None = None
    root: Path = Path()
    """The folder around the task's; errors name files from there, because caches keep them."""

    def decode(self, row: int) -> Image.Image:
        """The image of a row. Raises ValueError that names its file if it cannot be decoded."""
        if self.pixels is not None:
            return Image.fromarray(self.pixels[row])
        try:
            return read_rgb(self.files[row])
        except Exception as error:  # damaged image files raise anything in their decoders
            raise ValueError(f"{self.files[row].relative_to(self.root)}: {first_line(error)}") from None

    def encoded(self, row: int) -> bytes:
        """The bytes of a row's image, without decoding it."""
        return self.files[row].read_bytes() if self.pixels is None else self.pixels[row].tobytes()


SPLIT_WORDS = {"test": {"test", "testing", "eval", "evaluation"}, "train": {"train", "training"}}
"""By split: what folders or files of it are called."""
_SPLIT_FOLDERS = {*SPLIT_WORDS["test"], *SPLIT_WORDS["train"], "val", "valid", "validation", "dev"}


class ClassIndex:
    """Maps class names, in any spelling of the published data sets, to labels 0..C-1."""

    def __init__(self, task: str, names: Sequence[str], aliases: Sequence[str] = (), *, prefixed: bool = False) -> None:
        self.task, self.names, self._prefixed = task, names, prefixed
        self._numbered = not any(name.isascii() and name.isdigit() for name in names)
        """Whether a number is a position, because no class is called by one."""
        self._exact = {name: label for label, name in enumerate(names)}
        self._spelled: dict[str, int | None] = {"": None}
        """By what is left of a name without case and separators; None where two classes differ in those only."""
        for known in (aliases, names):
            keys = [_key(name) for name in known]
            self._spelled |= {key: label if keys.count(key) == 1 else None for label, key in enumerate(keys) if key}

    def find(self, name: str) -> int | None:
        """The label of a class name, regardless of case and separators; None if the name is unknown."""
        if name in self._exact:
            return self._exact[name]
        # SUN397 has /a/abbey, and copies of it a_abbey.
        prefixed = re.fullmatch(r"/?[a-z][_/](.+)", name) if self._prefixed else None
        for spelling in map(_key, (name, prefixed.group(1) if prefixed else name)):
            if (label := self._spelled.get(spelling)) is not None:
                return label
        is_position = self._numbered and name.isascii() and name.isdigit() and int(name) < len(self.names)
        return int(name) if is_position else None

    def label(self, name: str, where: Path | str) -> int:
        """The label of a class name. Raises `InputError` if the name is unknown."""
        label = self.find(name)
        if label is None:
            classes = ", ".join(self.names[:4])
            raise InputError(
                f"{where} has a class {name!r} that {self.task} does not have; its classes are: {classes}, ..."
            )
        return label

    def check_order(self, names: Sequence[str], where: str) -> str:
        """Whether a data set's class names are known. Raises `InputError` if one is in another position than ours."""
        labels = [self.find(name) for name in names]
        for label, (name, expected) in enumerate(zip(names, labels, strict=True)):
            if expected is not None and expected != label:
                raise InputError(
                    f"{where} lists the classes of {self.task} in another order: {name!r} is number {label} there and "
                    f"{expected} here, so every label would be misread"
                )
        unknown = labels.count(None)
        return f"{unknown} of {len(names)} names unknown" if unknown else "checked"


def _key(name: str) -> str:
    """A name without case, separators and marks, in any script."""
    return "".join(filter(str.isalnum, unicodedata.normalize("NFKC", name).casefold()))


def same_spelling(names: Sequence[str]) -> list[tuple[str, str]]:
    """Pairs of names that differ in case, separators or marks only."""
    return [pair for pair in combinations(names, 2) if _key(pair[0]) == _key(pair[1])] if len(names) < 2_000 else []


def listed(folder: Path, pattern: str = "*") -> list[Path]:
    """What a folder of data holds, sorted: the paths that match, without what other programs left there."""
    paths = folder.glob(pattern)
    return sorted(p for p in paths if not any(map(_DROPPINGS.fullmatch, p.relative_to(folder).parts)))


def _files(folder: Path) -> list[Path]:
    return [p for p in listed(folder, "**/*") if p.suffix.lower() in _IMAGES and not p.is_dir()]


def folders(folder: Path) -> list[Path]:
    """The folders in a folder of data, sorted."""
    return [p for p in listed(folder) if p.is_dir() and not (_PERHAPS.fullmatch(p.name) and not _files(p))]


def class_files(named: Iterable[Path], classes: ClassIndex) -> Listing:
    """The images in folders that are named after classes, and in folders within them."""
    labels = {folder: classes.label(folder.name, folder.parent) for folder in named}
    of_label: dict[int, Path] = {}
    for folder, label in labels.items():
        if (other := of_label.setdefault(label, folder)) != folder:
            both = f"{other.name!r} and {folder.name!r}"
            raise InputError(f"{folder.parent} has two folders of the class {classes.names[label]!r}: {both}")
    files = {folder: _files(folder) for folder in labels}
    empty = next((folder for folder, paths in files.items() if not paths), None)
    if empty is not None:
        found = ", ".join(path.name for path in listed(empty)[:4]) or "nothing"
        raise InputError(f"{empty} holds no image ({', '.join(sorted(_IMAGES))}); found there: {found}")
    return _listing((path, labels[folder]) for folder, paths in files.items() for path in paths)


def read_text(path: Path) -> str:
    """A list that people edit: UTF-8, with the mark that Windows begins it with or not, or UTF-16 with its mark."""
    try:
        return path.read_bytes().decode(text_encoding(path))
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text ({first_line(error)}); save it as UTF-8") from None


def text_encoding(path: Path) -> str:
    """How a text is encoded that `read_text` reads."""
    with path.open("rb") as file:
        return "utf-16" if file.read(2) in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"


def _names(path: Path) -> list[str]:
    """The names of files in a list, one a line, with `/` between folders."""
    return [line.strip().replace("\\", "/").lstrip("/") for line in read_text(path).splitlines() if line.strip()]


def _listing(pairs: Iterable[tuple[Path, int]]) -> Listing:
    pairs = list(pairs)
    return Listing(np.array([label for _, label in pairs], dtype=np.int64), [path for path, _ in pairs])


def class_folders(folder: Path, split: str, classes: ClassIndex) -> Listing | None:
    """`<split>/<class>/<image>`."""
    base = folder / split
    if not folders(base):
        return None
    labels = [classes.label(sub.name, base) for sub in folders(base)]
    missing = sorted(set(range(len(classes.names))) - set(labels))
    if missing:
        raise InputError(f"{base} has no folder for {len(missing)} classes, such as {classes.names[missing[0]]!r}")
    return class_files(folders(base), classes)


def split_root(path: Path, split: str) -> Path:
    """The folder of a split: that in a folder which holds those of splits and nothing else, or the folder itself.

    Raises `InputError` if only other splits are there.
    """
    inner = {folder.name.lower(): folder for folder in folders(path)} if path.is_dir() else {}
    if not inner or not inner.keys() <= _SPLIT_FOLDERS:
        return path
    found = next((inner[name] for name in (split, *SPLIT_WORDS.get(split, ())) if name in inner), None)
    if found is None:
        raise InputError(f"{path} holds folders of splits ({', '.join(inner)}) and none is {split!r}; name one of them")
    return found


def holds_classes(folder: Path) -> bool:
    """Whether folders in it hold images, some of them at their top."""
    return any(path.parent.parent == folder for inner in folders(folder) for path in _files(inner))


def holds_images_below(folder: Path) -> bool:
    """Whether folders in it hold images, at any depth."""
    return any(map(_files, folders(folder)))


def unlabelled(folder: Path) -> Listing:
    """All images in a folder and in those within it, without labels."""
    return _listing((path, -1) for path in _files(folder))


def sun397(folder: Path, split: str, classes: ClassIndex) -> Listing | None:
    """The archive's `a/abbey/sun_x.jpg` with its first partition, `Training_01.txt` and `Testing_01.txt`."""
    partition = folder / ("Testing_01.txt" if split == "test" else "Training_01.txt")
    if not partition.is_file():
        return None
    lines = _names(partition)
    return _listing((folder / line, classes.label(line.rpartition("/")[0], partition)) for line in lines)


def resisc45(folder: Path, split: str, classes: ClassIndex) -> Listing | None:
    """`NWPU-RESISC45/<class>/<image>` and the lists of file names `resisc45-<split>.txt`."""
    partition = folder / f"resisc45-{split}.txt"
    if not partition.is_file():
        return None
    names = {name.rpartition("/")[2] for name in _names(partition)}
    base = folder / "NWPU-RESISC45"
    pairs = [(p, sub) for sub in folders(base) for p in _files(sub) if p.name in names]
    absent = sorted(names - {path.name for path, _ in pairs})
    if absent:
        raise InputError(f"{partition} lists {absent[0]}, which does not exist in a class folder of {base}")
    return _listing((path, classes.label(sub.name, sub)) for path, sub in pairs)


def dtd(folder: Path, split: str, classes: ClassIndex) -> Listing | None:
    """The archive's `images/<class>/` and `labels/`; train consists of its train and val lists, 3,760 images.

    In the task-vectors code's class folders, the test split may be called `val`.
    """
    if split == "test" and not folders(folder / "test") and folders(folder / "val"):
        return class_folders(folder, "val", classes)
    for base in (folder / "dtd", folder):
        lists = [base / "labels" / f"{name}1.txt" for name in (("test",) if split == "test" else ("train", "val"))]
        if all(path.is_file() for path in lists):
            lines = [line for path in lists for line in _names(path)]
            return _listing((base / "images" / line, classes.label(line.partition("/")[0], lists[0])) for line in lines)
    return None


def gtsrb(folder: Path, split: str, classes: ClassIndex) -> Listing | None:
    """torchvision's `GTSRB/Training/<00000>/` and `GTSRB/Final_Test/Images/` with `GT-final_test.csv`."""
    base = folder / "GTSRB" if (folder / "GTSRB").is_dir() else folder
    if split == "train":
        subs = folders(base / "Training")
        return class_files(subs, classes) if subs else None
    table = next((p for p in (folder / "GT-final_test.csv", base / "GT-final_test.csv") if p.is_file()), None)
    if table is None:
        return None
    lines = read_text(table).splitlines()
    delimiter = max(";,\t", key=lines[0].count) if lines else ";"  # spreadsheets write their own
    rows = list(csv.DictReader(lines, delimiter=delimiter, skipinitialspace=True))
    for number, row in enumerate(rows, start=2):
        if not row.get("Filename") or not row.get("ClassId"):
            raise InputError(
                f"{table} lacks Filename or ClassId in line {number}; its first line is {lines[0][:100]!r}"
            )
    return _listing((base / "Final_Test" / "Images" / r["Filename"], classes.label(r["ClassId"], table)) for r in rows)


def cars(folder: Path, split: str, classes: ClassIndex) -> Listing | None:
    """torchvision's `cars_<split>/` and annotations; class numbers start at 1, and `devkit/` has their names."""
    annotations = folder / ("cars_test_annos_withlabels.mat" if split == "test" else "devkit/cars_train_annos.mat")
    names = folder / "devkit" / "cars_meta.mat"
    if not annotations.is_file() or not names.is_file():
        return None
    class_names, rows = _mat(names, "class_names"), _mat(annotations, "annotations")
    pairs = [(str(row["fname"]), str(class_names[int(row["class"]) - 1])) for row in rows]
    return _listing((folder / f"cars_{split}" / file, classes.label(name, annotations)) for file, name in pairs)


def svhn(folder: Path, split: str, classes: ClassIndex) -> Listing | None:
    """torchvision's `<split>_32x32.mat`: X (32, 32, 3, N) and y (N, 1), where 10 is the label of digit 0."""
    path = folder / f"{split}_32x32.mat"
    if not path.is_file():
        return None
    labels, pixels = _mat(path, "y").astype(np.int64), _mat(path, "X")
    if pixels.ndim == 3:  # one image
        pixels = pixels[..., None]
    return Listing(labels % 10, pixels=np.ascontiguousarray(pixels.transpose(3, 0, 1, 2)))


def mnist(folder: Path, split: str, classes: ClassIndex) -> Listing | None:
    """torchvision's `raw/t10k-images-idx3-ubyte` and the like, compressed (`.gz`) or not."""
    stem = "t10k" if split == "test" else "train"
    for base, suffix in product((folder / "raw", folder / "MNIST" / "raw", folder), ("", ".gz")):
        images, labels = (base / f"{stem}-{kind}-ubyte{suffix}" for kind in ("images-idx3", "labels-idx1"))
        if images.is_file() and labels.is_file():
            return Listing(_idx(labels, 1).astype(np.int64), pixels=_idx(images, 3))
    return None


def _idx(path: Path, dims: int) -> np.ndarray:
    data = (gzip.decompress if path.suffix == ".gz" else bytes)(path.read_bytes())
    shape = np.frombuffer(data[4 : 4 + 4 * dims], ">u4").astype(int)
    if data[:4] != bytes([0, 0, 8, dims]) or len(data) != 4 + 4 * dims + int(np.prod(shape)):
        raise ValueError(f"{path.name} is not a whole IDX file of bytes")
    return np.frombuffer(data, np.uint8, offset=4 + 4 * dims).reshape(shape)


def _mat(path: Path, name: str) -> np.ndarray:
    try:
        from scipy.io import loadmat
    except ImportError:
        raise InputError(f"{path} needs the package scipy; pip install 'probsurgery[hub]'") from None
    return np.atleast_1d(loadmat(path, squeeze_me=True)[name])


Layout = Callable[[Path, str, ClassIndex], Listing | None]


LAYOUTS: dict[str, tuple[Layout, str]] = {
    "sun397": (sun397, "a/abbey/*.jpg with Testing_01.txt and Training_01.txt"),
    "cars": (cars, "cars_test/, cars_train/, devkit/ and cars_test_annos_withlabels.mat"),
    "resisc45": (resisc45, "NWPU-RESISC45/<class>/ with resisc45-test.txt and resisc45-train.txt"),
    "svhn": (svhn, "test_32x32.mat and train_32x32.mat"),
    "gtsrb": (gtsrb, "GTSRB/Training/, GTSRB/Final_Test/Images/ and GT-final_test.csv"),
    "mnist": (mnist, "raw/t10k-images-idx3-ubyte and the like"),
    "dtd": (dtd, "dtd/images/ and dtd/labels/"),
}
"""Layouts of archives, which a task of any suite may have besides the usual ones: by name, with files for errors."""


def find_layout(archive: str | None, split: str, folder: Path, classes: ClassIndex) -> Listing | None:
    """The images of one split in its task's folder, in one of `LAYOUTS` or in class folders; None if neither fits.

    Raises `InputError` for a folder in a known layout that is incomplete or damaged.
    """
    task, own = classes.task, LAYOUTS[archive][0] if archive else None
    for layout in filter(None, (own, class_folders)):
        try:
            listing = layout(folder, split, classes)
        except InputError:
            raise
        except Exception as error:  # damaged lists and tables can raise anything in their readers
            problem = f"it lacks {error}" if isinstance(error, KeyError) else first_line(error)
            raise InputError(f"{folder} cannot be read as {layout.__name__.replace('_', ' ')}: {problem}") from None
        if listing is not None:
            for path in listing.files:
                if not path.is_file():
                    state = "is not a file" if path.exists() else "does not exist"
                    raise InputError(f"{folder} lists {path.relative_to(folder)}, which {state}")
            if listing.pixels is not None and len(listing.pixels) != len(listing.labels):
                counts = f"{len(listing.pixels)} images and {len(listing.labels)} labels"
                raise InputError(f"{folder} has {counts} of {task} ({split}); fetch it again")
            if not len(listing.labels):
                raise InputError(f"{folder} has no images of {task} ({split}); expected: {known_layouts(archive)}")
            return listing
    return None


def known_layouts(archive: str | None) -> str:
    """The layouts of a task's folder, for errors."""
    tables = ["Parquet files as on the Hub", "folders of datasets' save_to_disk", "webdataset tars"]
    own = [LAYOUTS[archive][1]] if archive else []
    return "; ".join(["test/<class>/ and train/<class>/", *own, *tables])
