"""What a folder of transformers says of its model: `config.json` and `preprocessor_config.json`.

Only the fields of `TowerConfig` are taken, within bounds, and no code of the folder is run.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from msgspec import Meta

from probsurgery.pipeline.errors import InputError, first_line, unknown
from probsurgery.pipeline.files import MalformedError, Record, decode, read_json
from probsurgery.pipeline.models.encoders import MAX_CONFIG_BYTES
from probsurgery.pipeline.models.preprocessing import Preprocessing

CONFIG, ADAPTER = "config.json", "adapter_config.json"
PROCESSORS = ("preprocessor_config.json", "processor_config.json")

Width = Annotated[int, Meta(ge=1, le=32_768)]
Depth = Annotated[int, Meta(ge=1, le=512)]
Share = Annotated[float, Meta(ge=0, le=1)]
Activation = Literal["gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "quick_gelu", "relu", "silu", "tanh"]


class TowerConfig(Record, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What determines a tower's computation, under transformers' names. A field that its kind does not have is None."""

    model_type: str
    hidden_size: Width
    num_hidden_layers: Depth
    num_attention_heads: Width
    image_size: Annotated[int, Meta(ge=1, le=4_096)]
    patch_size: Annotated[int, Meta(ge=1, le=4_096)]
    hidden_act: Activation
    layer_norm_eps: Share
    num_channels: Literal[3]
    intermediate_size: Width | None = None
    mlp_ratio: Annotated[int, Meta(ge=1, le=64)] | None = None
    projection_dim: Width | None = None
    qkv_bias: bool | None = None
    use_mask_token: bool | None = None
    vision_use_head: bool | None = None
    num_register_tokens: Annotated[int, Meta(ge=0, le=4_096)] | None = None
    pooler_output_size: Width | None = None
    pooler_act: Activation | None = None


@dataclass(frozen=True)
class Kind:
    """One kind of model."""

    name: str
    """What the names of its classes in transformers begin with."""
    pooling: tuple[str, ...]
    """How its features may be pooled; the first is the default."""
    processor: str
    """What prepares its images, if their folder does not say it."""
    renamed: tuple[tuple[str, str], ...] = ()
    """Patterns of names that releases of transformers write differently, and what they are in published files."""


_ATTENTION = (
    (r"attention\.q_proj\.", "attention.attention.query."),
    (r"attention\.k_proj\.", "attention.attention.key."),
    (r"attention\.v_proj\.", "attention.attention.value."),
    (r"attention\.o_proj\.", "attention.output.dense."),
)
_LAYERS = (
    (r"^layers\.", "encoder.layer."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
    *_ATTENTION,
)
CLASSIFIERS_POOLING = ("cls", "mean", "pooler")
"""Of models whose pooling is a layer that their checkpoints may lack."""
KINDS = {
    "clip_vision_model": Kind("CLIPVision", ("pooler",), "CLIPImageProcessor"),
    "siglip_vision_model": Kind("SiglipVision", ("pooler", "mean"), "SiglipImageProcessor"),
    "vit": Kind("ViT", CLASSIFIERS_POOLING, "ViTImageProcessor", _LAYERS),
    "deit": Kind("DeiT", CLASSIFIERS_POOLING, "DeiTImageProcessor", _LAYERS),
    "dinov2": Kind("Dinov2", ("cls", "mean"), "BitImageProcessor", _ATTENTION),
    "dinov2_with_registers": Kind("Dinov2WithRegisters", ("cls", "mean"), "BitImageProcessor", _ATTENTION),
}
_WHOLE = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}
"""Models with a text tower, and the kind of their image tower."""
_SUPPORTED = "CLIP, SigLIP, ViT, DeiT and DINOv2 models are built"


def given_fields(config: TowerConfig) -> dict[str, Any]:
    """The fields that the tower's kind has, as transformers' configuration takes them."""
    return {key: value for key, value in config.to_json().items() if value is not None}


def require_transformers() -> Any:
    """The library. Raises `InputError` if it is not installed."""
    try:
        import transformers
    except ImportError as error:
        raise InputError(f"this encoder needs {error.name}; pip install 'probsurgery[transformers]'") from None
    return transformers


def read_tower(folder: Path) -> TowerConfig:
    """The image tower of a model's folder. Raises `InputError` that says what the folder is, if it is another thing."""
    if (folder / ADAPTER).is_file() and not (folder / CONFIG).is_file():
        raise InputError(f"{folder} holds an adapter (LoRA or the like) and no model; merge it into its model first")
    return tower_config(read_json_object(folder, CONFIG), folder / CONFIG)


def tower_config(config: Mapping[str, Any], path: Path) -> TowerConfig:
    """The image tower of a config.json. Raises `InputError` if it has none that is built here."""
    kind = str(config.get("model_type", ""))[:100]
    if "auto_map" in config:
        raise InputError(f"{path} is of a model with code of its own (auto_map), which is never run; {_SUPPORTED}")
    if "quantization_config" in config:
        raise InputError(f"{path} is of a quantised model; give the one that it was made from")
    part: dict[str, Any] = {**config}
    if kind in _WHOLE:
        vision = config.get("vision_config") or {}
        part = {**(vision if isinstance(vision, Mapping) else {}), "model_type": _WHOLE[kind]}
        if kind == "clip":
            part["projection_dim"] = config.get("projection_dim") or 512
    if part.get("use_swiglu_ffn"):
        raise InputError(f"{path} has use_swiglu_ffn, which is not built here; DINOv2's other sizes do not have it")
    if part.get("model_type") not in KINDS:
        is_text = re.search("text|bert|gpt|llama|t5", kind)
        what = f"a {'text ' if is_text else ''}model of type {kind!r}" if kind else "no model_type"
        raise InputError(f"{path} has {what}; {_SUPPORTED}")
    known = TowerConfig.__struct_fields__
    given = {key: _side(value) for key, value in part.items() if key in known and value is not None}
    transformers = require_transformers()
    try:
        # Published files leave out what is at its default. Sizes are checked before anything is built of them.
        full = getattr(transformers, f"{KINDS[part['model_type']].name}Config")(**given)
        return decode(TowerConfig, {key: value for key in known if (value := getattr(full, key, None)) is not None})
    except Exception as error:  # transformers' own, of many kinds, and ours
        raise InputError(f"{path} cannot be used: {first_line(error)}") from None


def _side(value: object) -> object:
    """A side of a square, which may be written twice."""
    return value[0] if isinstance(value, list) and len(value) == 2 and value[0] == value[1] else value


def read_json_object(folder: Path, file: str) -> dict[str, Any]:
    try:
        value = read_json(folder / file, MAX_CONFIG_BYTES)
    except FileNotFoundError:
        held = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        problem = f"{folder} has no {file}, so it is no whole folder of a transformers model"
        raise InputError(f"{problem}; it holds: {held}") from None
    except (OSError, MalformedError) as error:
        raise InputError(f"{folder / file} cannot be read: {first_line(error)}") from None
    if not isinstance(value, dict):
        raise InputError(f"{folder / file} does not hold an object of JSON")
    return value


_PROCESSING = (
    *("do_resize", "size", "resample", "do_center_crop", "crop_size", "do_rescale", "rescale_factor", "do_normalize"),
    *("image_mean", "image_std", "do_pad"),
)
_RESAMPLING = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
"""Pillow's numbers."""


def read_preprocessing(folder: Path, config: TowerConfig) -> Preprocessing:
    """What a folder says of its images. Raises `InputError` for what is not done here."""
    file = next((name for name in PROCESSORS if (folder / name).is_file()), PROCESSORS[0])
    given = read_json_object(folder, file)
    if file == PROCESSORS[1]:
        given = given.get("image_processor") or {}
    default = KINDS[config.model_type].processor
    kind = str(given.get("image_processor_type") or given.get("feature_extractor_type") or default)
    kind = re.sub(r"(?:FeatureExtractor|ImageProcessor)(?:Fast|Pil)?$", "ImageProcessor", kind)
    known = sorted({row.processor for row in KINDS.values()})
    if kind not in known:
        raise unknown(f"image_processor_type in {folder / file}:", kind, known)
    transformers = require_transformers()
    processor = getattr(transformers, f"{kind}Pil", None) or getattr(transformers, kind)
    try:
        values = processor(**{key: given[key] for key in _PROCESSING if key in given}).to_dict()
        return _preprocessing(values)
    except Exception as error:  # transformers' own, of many kinds, and ours
        raise InputError(f"{folder / file} cannot be used: {first_line(error)}") from None


def _preprocessing(values: Mapping[str, Any]) -> Preprocessing:
    """Transformers' words in ours. Raises ValueError with what is not done here."""
    size = {key: value for key, value in dict(values["size"]).items() if value is not None}
    if not values.get("do_resize"):
        raise ValueError("it does not resize (do_resize), and images of several sizes make no batch")
    if values.get("do_pad"):
        raise ValueError("it pads images (do_pad), which is not done here")
    if size.keys() == {"shortest_edge"}:
        resize, length = "shortest", size["shortest_edge"]
    elif size.keys() == {"height", "width"} and size["height"] == size["width"]:
        resize, length = "squash", size["height"]
    else:
        raise ValueError(f"its size is {size}; shortest_edge, or height and width that are equal, are taken")
    side = length
    if values.get("do_center_crop"):
        crop = dict(values["crop_size"])
        side = crop["height"]
        if crop["width"] != side or side > length:
            raise ValueError(
                f"it crops to {crop['height']} x {crop['width']} from {length}; a square inside it is taken"
            )
    elif resize == "shortest":
        raise ValueError("it resizes the shortest edge and does not crop (do_center_crop), so images are no squares")
    if values["resample"] not in _RESAMPLING:
        raise ValueError(f"resample is {values['resample']}; Pillow's numbers from 0 to 3 are taken")
    factor = values["rescale_factor"] if values.get("do_rescale") else 1.0
    if not 0 < factor < 1e6:
        raise ValueError(f"rescale_factor is {factor}; a positive number is taken")
    scale = 1.0 if abs(255 * factor - 1) < 1e-9 else 255 * factor
    normalises = bool(values.get("do_normalize"))
    mean, std = (values["image_mean"], values["image_std"]) if normalises else ([0.0] * 3, [1.0] * 3)
    return decode(
        Preprocessing,
        {
            "image_size": side,
            "resize": resize,
            "interpolation": _RESAMPLING[values["resample"]],
            "mean": [value / scale for value in mean],
            "std": [value / scale for value in std],
            "resized": None if length == side else length,
            "crop": "floor",
        },
    )
