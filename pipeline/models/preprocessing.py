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


class Preprocessing(Record, frozen=True, kw_only=True):
    """What is done to an image before it is encoded, in open_clip's words."""

    image_size: Annotated[int, Meta(ge=1, le=4_096)]
    """Of the square."""
    resize: Literal["shortest", "longest", "squash"]
    interpolation: Literal["bicubic", "bilinear"]
    mean: tuple[Number, Number, Number]
    """Subtracted from each channel in [0, 1], which is then divided by `std`."""
    std: tuple[Positive, Positive, Positive]

    def to_json(self) -> dict[str, Any]:
        """With lists, as identities read from a file have them."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in super().to_json().items()}

    @property
    def transform(self) -> Transform:
        """PIL image -> tensor (3, size, size): RGB as `to_rgb` gives it, then resize, crop, normalisation."""
        import open_clip

        values: dict[str, Any] = {"mean": self.mean, "std": self.std, "interpolation": self.interpolation}
        transform = open_clip.image_transform(self.image_size, False, resize_mode=self.resize, **values)
        transform.transforms.insert(0, to_rgb)  # open_clip's own comes after resizing, which palettes do not survive
        return transform
