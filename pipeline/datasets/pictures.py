"""One picture, one tensor: the only place where pictures are decoded, whatever route they take to an encoder.

The result is that of the loaders that the published encoders were trained with (`convert("RGB")` of torchvision and
`datasets`, before resizing): alpha and transparent colours are dropped, CMYK is converted without its profile, and of
several frames the first is used. What a file says about how it is to be shown, and Pillow leaves to its caller, is
honoured here: the orientation (EXIF, XMP, TIFF), the range of 12 and 16 bits and which end of it is black. Colour
profiles and gamma are not applied: no training of these encoders did, so that applying them would move photographs
away from what the encoders know.
"""

import io
import warnings
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.Image import Transpose

from probsurgery.pipeline.files import open_file

DECODING = 1
"""Version of the pixels that this module makes. Caches record it, and features of two versions are never mixed."""

_TURNS: dict[object, Transpose] = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}
"""By EXIF orientation: what shows the picture upright."""
_UNKNOWN_RANGE = "so which are black and white is not known; save it with 8 or 16 bits"
_BITS, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0  # tags of TIFF


def read_rgb(source: Path | bytes) -> Image.Image:
    """A picture file, or its bytes, in RGB as `to_rgb` gives it. Raises ValueError, or as `open_file` and Pillow."""
    with io.BytesIO(source) if isinstance(source, bytes) else open_file(source) as file:
        try:
            with warnings.catch_warnings(action="ignore"), Image.open(file) as image:  # of damaged metadata
                return to_rgb(image)
        except UnidentifiedImageError:  # its text has an address of memory
            is_empty = not file.seek(0, io.SEEK_END)
            raise ValueError("it is empty" if is_empty else "it is not a picture in a known format") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """A picture in RGB, 8 bits, upright. One that is so already keeps its pixels.

    Raises ValueError, with what to do, for pixels whose black and white are not known, and what Pillow raises for
    damaged files.
    """
    with warnings.catch_warnings(action="ignore"):  # of transparent colours and of damaged metadata
        image.load()
        rgb = _eight_bits(image).convert("RGB")
        turn = _TURNS.get(_orientation(image))
        rgb.info = {}  # the orientation is in it
        return rgb if turn is None else rgb.transpose(turn)


def _orientation(image: Image.Image) -> object:
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # damaged metadata raise anything, and say nothing of the pixels
        return None


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey levels of more than 8 bits scaled to 8, which `convert` would cut off; other images as they are."""
    if image.mode == "F":
        raise ValueError(f"its pixels are floats (mode F), {_UNKNOWN_RANGE}")
    if image.mode != "I" and not image.mode.startswith("I;16"):
        return image
    tags, values = getattr(image, "tag_v2", {}), np.asarray(image).astype(np.int64)
    bits = tags.get(_BITS, (16,))[0]
    white = 2**16 - 1 if image.mode == "I" else 2**bits - 1
    # Mode I is that of 16-bit PGM, of 16-bit PNG in older releases, of 32 bits, and of 16 bits with a sign.
    if image.mode == "I" and ((tags and bits == 16) or values.min() < 0 or values.max() > white):
        raise ValueError(f"its pixels are signed or beyond 16 bits (mode I), {_UNKNOWN_RANGE}")
    scaled = (values * 255 + white // 2) // white
    return Image.fromarray((255 - scaled if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO else scaled).astype(np.uint8))
