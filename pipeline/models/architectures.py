"""Architectures: where their weights are published, the open_clip tower they build, and classifiers from text."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from probsurgery.pipeline.datasets.tasks import Task
from probsurgery.pipeline.errors import InputError
from probsurgery.pipeline.models.checkpoints import StateDict

MINI = Path(__file__).parents[1] / "mini"


@dataclass(frozen=True)
class Arch:
    """One row of the table of architectures."""

    suite: str
    """Tasks that its published experts were fine-tuned on."""
    open_clip: str
    """Name of open_clip's configuration. The `-quickgelu` ones: OpenAI's weights need QuickGELU, and `ViT-B-32` and the
    like build plain GELU, which loads without an error and gives wrong features."""
    pretrained_repo: str | None = None
    """Hugging Face model whose image tower the experts were fine-tuned from."""
    expert_repo: str | None = None
    """Hugging Face models of the experts; `{}` stands for the task's suffix."""
    folder: Path | None = None
    """Folder of checkpoints that ships with the package."""
    config: Path | None = None
    """open_clip configuration that ships with the package; None: open_clip knows it by its name."""


ARCHS: dict[str, Arch] = {
    "mini": Arch("mini", "mini", folder=MINI / "weights", config=MINI / "mini.json"),
    "vitb32": Arch("clip8", "ViT-B-32-quickgelu", "openai/clip-vit-base-patch32", "tanganke/clip-vit-base-patch32_{}"),
    "vitb16": Arch("clip8", "ViT-B-16-quickgelu", "openai/clip-vit-base-patch16", "tanganke/clip-vit-base-patch16_{}"),
    "vitl14": Arch(
        "clip8", "ViT-L-14-quickgelu", "openai/clip-vit-large-patch14", "tanganke/clip-vit-large-patch14_{}"
    ),
}


def get_arch(name: str) -> Arch:
    """An architecture by name: a row of `ARCHS`, or any model of open_clip's with the clip8 suite.

    Raises `InputError` for an unknown one.
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


def model_config(arch: str) -> dict:
    """open_clip's configuration of an architecture: embed_dim d, the two towers, QuickGELU."""
    row = get_arch(arch)
    if row.config is not None:
        return json.loads(row.config.read_text())
    import open_clip

    return open_clip.get_model_config(row.open_clip)


def preprocessing(arch: str) -> dict:
    """What is done to an image before the encoder, as kept in a cache's identity: open_clip's own for the model.

    Where open_clip lists several pre-trained weights of the model, OpenAI's decide, or else the first.
    """
    import open_clip

    name = get_arch(arch).open_clip
    tags = sorted(open_clip.list_pretrained_tags_by_model(name), key=lambda tag: tag != "openai")
    own = open_clip.get_pretrained_cfg(name, tags[0]) if tags else {}
    own = {"size": model_config(arch)["vision_cfg"]["image_size"]} | {k: v for k, v in own.items() if k != "size"}
    p = open_clip.transform.merge_preprocess_dict(asdict(open_clip.transform.PreprocessCfg()), own)
    return {
        "image_size": p["size"],
        "resize": p["resize_mode"],
        "interpolation": p["interpolation"],
        "mean": list(p["mean"]),
        "std": list(p["std"]),
    }


def image_transform(arch: str) -> Callable:
    """PIL image -> tensor (3, size, size): open_clip's resize, centre crop, RGB and normalisation."""
    return transform_of(preprocessing(arch))


def transform_of(p: dict) -> Callable:
    """The same from what `preprocessing` gives."""
    import open_clip

    return open_clip.image_transform(
        p["image_size"],
        is_train=False,
        mean=tuple(p["mean"]),
        std=tuple(p["std"]),
        resize_mode=p["resize"],
        interpolation=p["interpolation"],
    )


def _empty_tower(arch: str) -> nn.Module:
    """The image tower without memory behind its parameters.

    open_clip's builder of this tower alone: building a whole model would ask the Hub for some models' text towers.
    """
    from open_clip.model import _build_vision_tower

    config = model_config(arch)
    vision = config["vision_cfg"] | (
        {"timm_model_pretrained": False} if "timm_model_name" in config["vision_cfg"] else {}
    )
    with torch.device("meta"):
        return _build_vision_tower(config["embed_dim"], vision, config.get("quick_gelu", False))


def expected_shapes(arch: str) -> dict[str, torch.Size]:
    """Names and shapes of the image tower's parameters."""
    return {name: tensor.shape for name, tensor in _empty_tower(arch).state_dict().items()}


def functional(arch: str) -> Callable[[Mapping[str, Tensor], Tensor], Tensor]:
    """The image tower as a function of its weights and images (B, 3, size, size), with no weights of its own."""
    tower = _empty_tower(arch).eval()

    def forward(weights: Mapping[str, Tensor], images: Tensor) -> Tensor:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # the patch embedding would else be TF32
            return torch.func.functional_call(tower, dict(weights), (images,), strict=True)

    return forward


def build_visual(arch: str, state: Mapping[str, Tensor]) -> nn.Module:
    """The image tower with these weights: images (B, 3, size, size) -> features (B, d), after the projection and not
    normalised, which is what open_clip's `encode_image` returns."""
    tower = _empty_tower(arch)
    tower.load_state_dict(dict(state), strict=True, assign=True)
    unfilled = next(
        (name for name, tensor in (*tower.named_parameters(), *tower.named_buffers()) if tensor.is_meta), None
    )
    if unfilled is not None:
        raise InputError(f"{arch} cannot be built from a checkpoint: {unfilled!r} is not part of one")
    return tower.eval().requires_grad_(False)


def text_shapes(arch: str) -> dict[str, torch.Size]:
    """Names and shapes of the text tower's parameters, the logit scale among them."""
    with torch.device("meta"):
        return {n: t.shape for n, t in _clip(arch).state_dict().items() if not n.startswith("visual.")}


def _clip(arch: str) -> nn.Module:
    import open_clip

    config = model_config(arch)
    if "hf_model_name" in config["text_cfg"] or config.get("custom_text"):
        raise InputError(f"classifiers of {arch} cannot be made here; put classifiers.safetensors into --checkpoints")
    return open_clip.CLIP(**config)


@torch.no_grad()
def text_classifiers(arch: str, text: StateDict, tasks: Sequence[Task], device: torch.device) -> dict[str, Tensor]:
    """Zero-shot classifiers (C, d) from a text tower that `text_shapes` describes.

    Each class name in each of the task's templates is embedded and normalised; the mean over templates is normalised
    again, and multiplied by exp(logit_scale).
    """
    import open_clip

    model = _clip(arch)
    missing, unexpected = model.load_state_dict(text, strict=False)  # of a whole model, only the text tower is used
    assert not unexpected
    assert all(name.startswith("visual.") for name in missing)
    model.to(device).eval()
    length = model_config(arch)["text_cfg"].get("context_length", open_clip.tokenizer.DEFAULT_CONTEXT_LENGTH)
    tokenizer = open_clip.SimpleTokenizer(context_length=length)  # OpenAI's, with which every `CLIP` was trained
    scale = model.logit_scale.exp()
    made = {}
    for task in tasks:
        weights = open_clip.build_zero_shot_classifier(
            model, tokenizer, task.class_names, task.templates, device=device
        )
        made[task.name] = (scale * weights.T).float().cpu().contiguous()
    return made
