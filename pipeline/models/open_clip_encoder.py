"""Image towers of open_clip: by the name of a configuration, or by a configuration of one's own."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from probsurgery.pipeline.errors import InputError, first_line
from probsurgery.pipeline.files import MalformedError, decode, read_json
from probsurgery.pipeline.models.architectures import Arch
from probsurgery.pipeline.models.checkpoints import VisualState
from probsurgery.pipeline.models.encoders import MAX_CONFIG_BYTES, Encoder
from probsurgery.pipeline.models.preprocessing import Preprocessing

_MOST = {"image_size": 4_096, "patch_size": 4_096, "layers": 512, "mlp_ratio": 64, "attn_pooler_queries": 4_096}
"""Largest numbers in a configuration, which may come from anybody."""
_MOST_OTHER, _MOST_POSITIONS = 32_768, 2**28


def has_model(name: str) -> bool:
    """Whether open_clip has a configuration of this name."""
    import open_clip

    return name in open_clip.list_models()


class OpenClipEncoder(Encoder):
    """The image tower of an open_clip configuration. Features are what `encode_image` returns."""

    def __init__(
        self,
        name: str,
        arch: Arch,
        own: Mapping[str, Any] | None = None,
        preprocessing: Preprocessing | None = None,
    ) -> None:
        """`own` is a configuration that neither the package nor open_clip has, checked."""
        self.name, self.arch, self.projection, self._own, self._given = name, arch, "proj", own, preprocessing

    @property
    def description(self) -> Mapping[str, Any]:
        if self._own is None:
            return {}
        tower = {key: self._own[key] for key in ("embed_dim", "quick_gelu", "vision_cfg") if key in self._own}
        return {"library": "open_clip", "config": tower}

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """open_clip's configuration: embed_dim d, both towers, QuickGELU."""
        if self._own is not None:
            return self._own
        if self.arch.config is not None:
            return read_json(self.arch.config, MAX_CONFIG_BYTES)
        import open_clip

        return open_clip.get_model_config(self.arch.open_clip)

    @property
    def dim(self) -> int:
        return self.config["embed_dim"]

    @cached_property
    def preprocessing(self) -> Preprocessing:
        """open_clip's own for the model: if it lists several weights of it, that of OpenAI's, or of the first."""
        if self._given is not None:
            return self._given
        import open_clip

        name = self.arch.open_clip
        tags = sorted(open_clip.list_pretrained_tags_by_model(name), key=lambda tag: tag != "openai")
        config = open_clip.get_pretrained_cfg(name, tags[0]) if tags else {}
        return _preprocessing(self.name, config | {"size": self.config["vision_cfg"]["image_size"]})

    def empty(self) -> nn.Module:
        """Built alone, because for some models open_clip would fetch the text tower from the Hub."""
        from open_clip.model import _build_vision_tower

        vision = self.config["vision_cfg"]
        if "timm_model_name" in vision:
            vision = vision | {"timm_model_pretrained": False}
        try:
            with torch.device("meta"):
                return _build_vision_tower(self.dim, vision, self._is_quick)
        except Exception as error:
            if self._own is None:
                raise
            raise InputError(f"{self.name} cannot be built by open_clip: {first_line(error)}") from None

    def state(
        self, checkpoint: Mapping[str, Tensor], projection: Callable[[], Tensor] | None = None
    ) -> Mapping[str, Tensor]:
        return VisualState(checkpoint, projection)

    def check_config(self, config: Mapping[str, Any], path: Path) -> None:
        """A wrong activation gives wrong features; transformers records the right one."""
        vision = config.get("vision_config", config)
        activation = vision.get("hidden_act") if isinstance(vision, Mapping) else None
        if activation in ("quick_gelu", "gelu") and self._is_quick != (activation == "quick_gelu"):
            right = "a -quickgelu architecture" if activation == "quick_gelu" else "an architecture without QuickGELU"
            raise InputError(f"{path} was trained with {activation}, which {self.name} does not have; choose {right}")

    @property
    def _is_quick(self) -> bool:
        return self.config.get("quick_gelu", False)


def read_config(path: Path, name: str, arch: Arch) -> OpenClipEncoder:
    """The encoder of a configuration's file, in the form of open_clip's own or of the Hub's `open_clip_config.json`.

    Raises `InputError` for what open_clip would not build, and for what it would fetch.
    """
    try:
        value = read_json(path, MAX_CONFIG_BYTES)
    except (OSError, MalformedError) as error:
        raise InputError(f"{path} cannot be read: {first_line(error)}") from None
    value = value if isinstance(value, dict) else {}
    config = value.get("model_cfg", value)
    own = _checked(config, str(path))
    given = value.get("preprocess_cfg", {}) if "model_cfg" in value else {}
    preprocessing = _preprocessing(str(path), {**given, "size": own["vision_cfg"].get("image_size", 224)})
    encoder = OpenClipEncoder(name, arch, own, preprocessing)
    assert encoder.shapes  # or it says here what is wrong
    return encoder


def described(name: str, arch: Arch, description: Mapping[str, Any], preprocessing: Preprocessing) -> OpenClipEncoder:
    """The encoder of a cache. Raises `InputError` if the description is not one that `description` gives."""
    own = _checked(description.get("config"), f"the description of {name}")
    return OpenClipEncoder(name, arch, own, preprocessing)


def _preprocessing(where: str, config: Mapping[str, Any]) -> Preprocessing:
    """open_clip's words, with its defaults for what is not given."""
    import open_clip

    p = open_clip.transform.merge_preprocess_dict(asdict(open_clip.transform.PreprocessCfg()), config)
    resize = {"image_size": p["size"], "resize": p["resize_mode"], "interpolation": p["interpolation"]}
    try:
        return decode(Preprocessing, resize | {"mean": list(p["mean"]), "std": list(p["std"])})
    except (MalformedError, TypeError) as error:
        raise InputError(f"images cannot be prepared for {where}: {first_line(error)}") from None


def _checked(config: object, where: str) -> dict[str, Any]:
    """A configuration whose image tower can be built without a network and without much memory.

    Raises `InputError` for anything else.
    """
    import timm
    from open_clip.model import CLIPVisionCfg

    vision = config.get("vision_cfg") if isinstance(config, dict) else None
    if not isinstance(config, dict) or not isinstance(vision, dict) or "embed_dim" not in config:
        raise InputError(f"{where} is no configuration of open_clip: it has no embed_dim and vision_cfg")
    known = [field.name for field in fields(CLIPVisionCfg)]
    for key, value in {"embed_dim": config["embed_dim"], **vision}.items():
        if key != "embed_dim" and key not in known:
            near = get_close_matches(key, known, 1)
            raise InputError(f"{where}: vision_cfg has no {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
        most = _MOST.get(key, _MOST_OTHER)
        for number in value if isinstance(value, list) else [value]:
            is_number = isinstance(number, int | float) and not isinstance(number, bool)
            if is_number and not 0 <= number <= most:
                raise InputError(f"{where}: {key} is {number}; at most {most:,} can be built, and nothing below 0")
    sides = [vision.get("image_size", 224), vision.get("patch_size", 16)]
    if not all(
        type(number) is int and number > 0 for number in (*sides, config["embed_dim"], vision.get("width", 768))
    ):
        raise InputError(f"{where}: embed_dim, width, image_size and patch_size must be whole numbers from 1")
    if (sides[0] // sides[1]) ** 2 * vision.get("width", 768) > _MOST_POSITIONS:  # some are computed, in memory
        raise InputError(f"{where}: too many patches ({sides[0]} // {sides[1]} in a row) for their width")
    timm_name = vision.get("timm_model_name")
    if timm_name is not None and not (isinstance(timm_name, str) and timm.is_model(timm_name)):
        raise InputError(f"{where}: timm has no model {str(timm_name)[:80]!r}, and none is fetched")
    if vision.get("output_tokens"):
        raise InputError(f"{where}: output_tokens gives no features; leave it out")
    return {**config, "vision_cfg": {**vision, "image_size": sides[0]}}
