"""Image corruptions, to test heads on images that differ from those they were fitted on.

Kinds and levels are those of ImageNet-C (Hendrycks and Dietterich, ICLR 2019), applied to the decoded image at its own
size, before the encoder's preprocessing.
"""

import hashlib
import io
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from PIL import Image, ImageFilter

from probsurgery.pipeline.datasets.pictures import to_rgb
from probsurgery.pipeline.datasets.tasks import Images
from probsurgery.pipeline.errors import InputError, unknown

DEFAULT_SEVERITY = 3


@dataclass(frozen=True)
class Corruption:
    """One row of the table of corruptions."""

    levels: tuple[float, ...]
    """The function's second argument, for severities from 1 to 5."""
    function: Callable[[Image.Image, float, np.random.Generator], Image.Image]


def _noise(image: Image.Image, sd: float, random: np.random.Generator) -> Image.Image:
    """Gaussian noise of this standard deviation, for values in [0, 1]."""
    return _image(_values(image) + sd * random.standard_normal((image.height, image.width, 3)))


def _blur(image: Image.Image, radius: float, random: np.random.Generator) -> Image.Image:
    """Gaussian blur; the radius is for an image whose shorter side has 224 pixels."""
    return image.filter(ImageFilter.GaussianBlur(radius * min(image.size) / 224))


def _contrast(image: Image.Image, factor: float, random: np.random.Generator) -> Image.Image:
    values = _values(image)
    mean = values.mean(axis=(0, 1), keepdims=True)
    return _image((values - mean) * factor + mean)


def _jpeg(image: Image.Image, quality: float, random: np.random.Generator) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=int(quality))
    return Image.open(file).convert("RGB")


def _values(image: Image.Image) -> np.ndarray:
    return np.asarray(image, dtype=np.float32) / 255


def _image(values: np.ndarray) -> Image.Image:
    return Image.fromarray((values.clip(0, 1) * 255).round().astype(np.uint8))


CORRUPTIONS: dict[str, Corruption] = {
    "noise": Corruption((0.08, 0.12, 0.18, 0.26, 0.38), _noise),
    "blur": Corruption((1, 2, 3, 4, 6), _blur),
    "contrast": Corruption((0.4, 0.3, 0.2, 0.1, 0.05), _contrast),
    "jpeg": Corruption((25, 18, 15, 10, 7), _jpeg),
}


def checked(text: str) -> str:
    """A corruption as `kind:severity`, such as `noise:3`. Raises `InputError` for an unknown kind or severity."""
    kind, colon, severity = text.partition(":")
    if kind not in CORRUPTIONS:
        raise unknown("corruption", kind[:80], CORRUPTIONS)
    severity = severity[:80] if colon else str(DEFAULT_SEVERITY)
    if severity not in tuple("12345"):
        raise InputError(
            f"--corrupt {text[:80]!r} has the severity {severity!r}; it must be from 1 to 5, as in {kind}:3"
        )
    return f"{kind}:{severity}"


def corrupted(image: Image.Image, corruption: str, row: int) -> Image.Image:
    """The corrupted image in RGB. Noise depends on the row and the corruption only."""
    kind, _, severity = corruption.partition(":")
    key = hashlib.sha256(f"{corruption}/{row}".encode()).digest()
    random = np.random.default_rng(int.from_bytes(key[:8], "big"))
    return CORRUPTIONS[kind].function(to_rgb(image), CORRUPTIONS[kind].levels[int(severity) - 1], random)


def corrupt_images(images: Images, corruption: str) -> Images:
    """The same images, each corrupted after it is decoded."""
    digest = hashlib.sha256(f"{images.fingerprint} {corruption}".encode()).hexdigest()
    return replace(images, decode=partial(_decode, images.decode, corruption), fingerprint=digest)


def _decode(decode: Callable[[int], Image.Image], corruption: str, row: int) -> Image.Image:
    return corrupted(decode(row), corruption, row)
