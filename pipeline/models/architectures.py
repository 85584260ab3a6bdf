"""The table of architectures, and the open_clip image towers that they describe."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from msgspec import Meta
from PIL import Image
from torch import Tensor, nn

from probsurgery.pipeline.datasets.pictures import to_rgb
from probsurgery.pipeline.errors import InputError
from probsurgery.pipeline.files import Number, Record, decode, read_json

MINI = Path(__file__).parents[1] / "mini"
MAX_CONFIG_BYTES = 2**20
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


@dataclass(frozen=True)
class Arch:
    """One row of the table of architectures."""

    suite: str
    """Suite of tasks that the published experts were fine-tuned on."""
    open_clip: str
    """Name of open_clip's configuration. OpenAI's weights need the `-quickgelu` ones: the plain ones (`ViT-B-32`) build
    GELU, which loads without an error and gives wrong features."""
    pretrained_repo: str | None = None
    """Hugging Face model whose image tower the experts were fine-tuned from."""
    expert_repo: str | None = None
    """Hugging Face models of the experts; `{}` stands for the task's suffix."""
    folder: Path | None = None
    """Folder of checkpoints in the package."""
    config: Path | None = None
    """open_clip configuration in the package; None if open_clip has it."""


ARCHS: dict[str, Arch] = {
    "mini": Arch("mini", "mini", folder=MINI / "weights", config=MINI / "mini.json"),
    "vitb32": Arch("clip8", "ViT-B-32-quickgelu", "openai/clip-vit-base-patch32", "tanganke/clip-vit-base-patch32_{}"),
    "vitb16": Arch("clip8", "ViT-B-16-quickgelu", "openai/clip-vit-base-patch16", "tanganke/clip-vit-base-patch16_{}"),
    "vitl14": Arch(
        "clip8", "ViT-L-14-quickgelu", "openai/clip-vit-large-patch14", "tanganke/clip-vit-large-patch14_{}"
    ),
}


def get_arch(name: str) -> Arch:
    """An architecture by name: a row of `ARCHS`, or any model of open_clip with the clip8 suite.

    Raises `InputError` for an unknown name.
    """
    if name in ARCHS:
        return ARCHS[name]
    import open_clip

    if name not in open_clip.list_models():
        raise InputError(
            f"unknown arch {name!r}; choose from: {', '.join(ARCHS)}, or any model of open_clip by its name, such as "
            "ViT-B-32-quickgelu, with --checkpoints"
        )
    known = next((row.pretrained_repo for row in ARCHS.values() if row.open_clip == name), None)
    return Arch("clip8", name, known)


def model_config(arch: str) -> dict[str, Any]:
    """open_clip's configuration of an architecture: embed_dim d, both towers, QuickGELU."""
    row = get_arch(arch)
    if row.config is not None:
        return read_json(row.config, MAX_CONFIG_BYTES)
    import open_clip

    return open_clip.get_model_config(row.open_clip)


def preprocessing(arch: str) -> dict[str, Any]:
    """open_clip's preprocessing of images for the model, as recorded in a cache's identity.

    If open_clip lists several pre-trained weights of the model, it is that of OpenAI's, or of the first.
    """
    import open_clip

    name = get_arch(arch).open_clip
    tags = sorted(open_clip.list_pretrained_tags_by_model(name), key=lambda tag: tag != "openai")
    config = open_clip.get_pretrained_cfg(name, tags[0]) if tags else {}
    config = config | {"size": model_config(arch)["vision_cfg"]["image_size"]}
    p = open_clip.transform.merge_preprocess_dict(asdict(open_clip.transform.PreprocessCfg()), config)
    resize = {"image_size": p["size"], "resize": p["resize_mode"], "interpolation": p["interpolation"]}
    return resize | {"mean": list(p["mean"]), "std": list(p["std"])}


def image_transform(arch: str) -> Transform:
    """PIL image -> tensor (3, size, size): RGB as `to_rgb` gives it, then open_clip's resize, crop, normalisation."""
    return transform_of(decode(Preprocessing, preprocessing(arch)))


def transform_of(p: Preprocessing) -> Transform:
    """The transform of images."""
    import open_clip

    values: dict[str, Any] = {"mean": p.mean, "std": p.std, "interpolation": p.interpolation}
    transform = open_clip.image_transform(p.image_size, False, resize_mode=p.resize, **values)
    transform.transforms.insert(0, to_rgb)  # open_clip's own comes after resizing, which palettes do not survive
    return transform


def _empty_tower(arch: str) -> nn.Module:
    """The image tower on the meta device, without memory for its parameters.

    Built alone, because for some models open_clip would fetch the text tower from the Hub.
    """
    from open_clip.model import _build_vision_tower

    config = model_config(arch)
    vision = config["vision_cfg"]
    if "timm_model_name" in vision:
        vision = vision | {"timm_model_pretrained": False}
    with torch.device("meta"):
        return _build_vision_tower(config["embed_dim"], vision, config.get("quick_gelu", False))


def expected_shapes(arch: str) -> dict[str, torch.Size]:
    """Names and shapes of the image tower's parameters."""
    return {name: tensor.shape for name, tensor in _empty_tower(arch).state_dict().items()}


def functional(arch: str) -> Callable[[Mapping[str, Tensor], Tensor], Tensor]:
    """The image tower as a function of weights and images (B, 3, size, size)."""
    tower = _empty_tower(arch).eval()

    def forward(weights: Mapping[str, Tensor], images: Tensor) -> Tensor:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # the patch embedding would use TF32
            return torch.func.functional_call(tower, dict(weights), (images,), strict=True)

    return forward


def build_visual(arch: str, state: Mapping[str, Tensor]) -> nn.Module:
    """The image tower with these weights: images (B, 3, size, size) -> features (B, d).

    Features are projected and not normalised, as open_clip's `encode_image` returns them.
    """
    tower = _empty_tower(arch)
    tower.load_state_dict(dict(state), strict=True, assign=True)
    tensors = (*tower.named_parameters(), *tower.named_buffers())
    unfilled = next((name for name, tensor in tensors if tensor.is_meta), None)
    if unfilled is not None:
        raise InputError(f"{arch} cannot be built from a checkpoint: checkpoints do not hold {unfilled!r}")
    return tower.eval().requires_grad_(False)
