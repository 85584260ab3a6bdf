"""What is done to an image before it is encoded."""

from collections.abc import Callable
from typing import Annotated, Any, Literal

from msgspec import Meta
from PIL import Image
from torch import Tensor

from probsurgery.pipeline.datasets.pictures import to_rgb
from probsurgery.pipeline.files import Number, Record

Transform = Callable[[Image.Image], Tensor]
"""PIL image -> tensor (3, size, size)."""
Positive = Annotated[float, Meta(gt=0, le=1e6)]
Pixels = Annotated[int, Meta(ge=1, le=4_096)]
"""A length in pixels."""


class Preprocessing(Record, frozen=True, kw_only=True):
    """What is done to an image before it is encoded, in open_clip's words."""

    image_size: Pixels
    """Of the square."""
    resize: Literal["shortest", "longest", "squash"]
    interpolation: Literal["bicubic", "bilinear", "lanczos", "nearest"]
    mean: tuple[Number, Number, Number]
    """Subtracted from each channel in [0, 1], which is then divided by `std`."""
    std: tuple[Positive, Positive, Positive]
    resized: Pixels | None = None
    """Length to which the image is resized before the square is cut from its middle; None: `image_size`."""
    crop: Literal["round", "floor"] = "round"
    """Where the middle is between two pixels: half a pixel is rounded to an even number (torchvision) or down
    (transformers)."""

    def to_json(self) -> dict[str, Any]:
        """With lists, as identities read from a file have them."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in super().to_json().items()}

    @property
    def transform(self) -> Transform:
        """PIL image -> tensor (3, size, size): RGB as `to_rgb` gives it, then resize, crop, normalisation.

        Pillow resizes, with antialiasing, as for the training of OpenAI's models.
        """
        import open_clip
        from torchvision import transforms

        if self.resized is None and self.crop == "round" and self.interpolation in ("bicubic", "bilinear"):
            values: dict[str, Any] = {"mean": self.mean, "std": self.std, "interpolation": self.interpolation}
            transform = open_clip.image_transform(self.image_size, False, resize_mode=self.resize, **values)
            transform.transforms.insert(
                0, to_rgb
            )  # open_clip's own comes after resizing, which palettes do not survive
            return transform
        length = self.resized or self.image_size
        size = length if self.resize == "shortest" else (length, length)
        resize = transforms.Resize(size, transforms.InterpolationMode(self.interpolation))
        normalise = transforms.Normalize(self.mean, self.std)
        return transforms.Compose([to_rgb, resize, self._cut, transforms.ToTensor(), normalise])

    def _cut(self, image: Image.Image) -> Image.Image:
        """The square in the middle of an image that is not smaller, PIL to PIL."""
        size = self.image_size
        halves = [(length - size) / 2 for length in image.size]
        left, top = (int(half) if self.crop == "floor" else round(half) for half in halves)
        return image.crop((left, top, left + size, top + size))
