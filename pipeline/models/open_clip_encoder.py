"""Image towers of open_clip."""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from probsurgery.pipeline.errors import InputError
from probsurgery.pipeline.files import MalformedError, decode, read_json
from probsurgery.pipeline.models.architectures import Arch
from probsurgery.pipeline.models.checkpoints import VisualState
from probsurgery.pipeline.models.encoders import MAX_CONFIG_BYTES, Encoder
from probsurgery.pipeline.models.preprocessing import Preprocessing


def has_model(name: str) -> bool:
    """Whether open_clip has a configuration of this name."""
    import open_clip

    return name in open_clip.list_models()


class OpenClipEncoder(Encoder):
    """The image tower of an open_clip configuration. Features are what `encode_image` returns."""

    def __init__(self, name: str, arch: Arch) -> None:
        self.name, self.arch, self.description = name, arch, {}

    @cached_property
    def config(self) -> dict[str, Any]:
        """open_clip's configuration: embed_dim d, both towers, QuickGELU."""
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
        import open_clip

        name = self.arch.open_clip
        tags = sorted(open_clip.list_pretrained_tags_by_model(name), key=lambda tag: tag != "openai")
        config = open_clip.get_pretrained_cfg(name, tags[0]) if tags else {}
        config = config | {"size": self.config["vision_cfg"]["image_size"]}
        p = open_clip.transform.merge_preprocess_dict(asdict(open_clip.transform.PreprocessCfg()), config)
        resize = {"image_size": p["size"], "resize": p["resize_mode"], "interpolation": p["interpolation"]}
        try:
            return decode(Preprocessing, resize | {"mean": list(p["mean"]), "std": list(p["std"])})
        except MalformedError as error:
            raise InputError(f"images cannot be prepared for {self.name}: {error}") from None

    def empty(self) -> nn.Module:
        """Built alone, because for some models open_clip would fetch the text tower from the Hub."""
        from open_clip.model import _build_vision_tower

        vision = self.config["vision_cfg"]
        if "timm_model_name" in vision:
            vision = vision | {"timm_model_pretrained": False}
        with torch.device("meta"):
            return _build_vision_tower(self.dim, vision, self._is_quick)

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
