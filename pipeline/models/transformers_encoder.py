"""Image encoders of transformers: CLIP, SigLIP, ViT, DeiT and DINOv2.

A model's folder has `config.json`, `preprocessor_config.json` (or `processor_config.json`) and, unless the weights come
from elsewhere, `model.safetensors`, in one file or several. Only the sizes and switches of `TowerConfig` are taken from
the configuration; no code of the folder is run.

Features (`pooling`, `projection`):

- CLIP: `pooler`, the class token after the last layer norm, times the visual projection unless `projection` is False.
- SigLIP: `pooler`, the attention pooling, where the model has it; or `mean`.
- ViT, DeiT, DINOv2: `cls`, the class token after the last layer norm; `mean`; of ViT and DeiT also `pooler`, the tanh
  layer that checkpoints of classifiers lack.

`mean` is over the patches alone, after the last layer norm. Features agree with transformers' own to float noise, and
images with its Pillow processors exactly. Its default processors, of torchvision, resize with another rounding: on four
photographs and noise, values differed by at most one grey level of 255, and by 0.004 in the mean. DINOv2 interpolates
its position embeddings to the size that images are prepared at, as it does in transformers; other models take their own
size only.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from probsurgery.pipeline.errors import InputError, first_line, unknown
from probsurgery.pipeline.files import MalformedError, decode
from probsurgery.pipeline.models.architectures import Arch
from probsurgery.pipeline.models.checkpoints import LazyMapping, unwrapped
from probsurgery.pipeline.models.encoders import Encoder
from probsurgery.pipeline.models.preprocessing import Preprocessing
from probsurgery.pipeline.models.transformers_config import (
    CLASSIFIERS_POOLING,
    KINDS,
    PROCESSORS,
    TowerConfig,
    given_fields,
    read_preprocessing,
    read_tower,
    require_transformers,
    tower_config,
)

PROJECTION = "visual_projection.weight"
_BEFORE_PATCHES = re.compile(r"(?:.*\.)?(?=embeddings\.patch_embeddings?\.(?:projection\.)?weight$)")
BESIDE = re.compile(
    r"^(?:\w*classifier|text_model|text_projection|visual_projection|pooler|head)\.|^logit_(?:scale|bias)$|position_ids$"
)
"""Names of what a checkpoint holds beside a tower."""


class TransformersEncoder(Encoder):
    """The image tower of a transformers model, by its configuration alone."""

    def __init__(
        self,
        name: str,
        arch: Arch,
        config: TowerConfig,
        preprocessing: Preprocessing,
        pooling: str | None = None,
        projection: bool | None = None,
    ) -> None:
        """None stands for the kind's own pooling and projection. Raises `InputError` for what it does not have."""
        self.name, self.arch, self.config, self._preprocessing = name, arch, config, preprocessing
        self._kind = KINDS[config.model_type]
        choices = ("mean",) if config.vision_use_head is False else self._kind.pooling
        self.pooling = choices[0] if pooling is None else pooling
        if self.pooling not in choices:
            raise unknown(f"pooling of {name}, a {config.model_type},", self.pooling, choices)
        if projection and config.projection_dim is None:
            raise InputError(f"{name}, a {config.model_type}, has no projection; leave it out")
        self.projection = PROJECTION if config.projection_dim and projection is not False else None
        self._check_sizes()

    @property
    def description(self) -> Mapping[str, Any]:
        features = {"pooling": self.pooling, "projection": self.projection is not None}
        return {"library": "transformers", "config": given_fields(self.config), **features}

    @property
    def preprocessing(self) -> Preprocessing:
        return self._preprocessing

    @property
    def dim(self) -> int:
        widths = {PROJECTION: self.config.projection_dim, "pooler": self.config.pooler_output_size}
        return widths.get(self.projection or self.pooling) or self.config.hidden_size

    def empty(self) -> nn.Module:
        transformers, values = require_transformers(), given_fields(self.config)
        if self.pooling == "mean" and "vision_use_head" in values:
            values["vision_use_head"] = False
        has_layer = self._kind.pooling == CLASSIFIERS_POOLING
        options = {"add_pooling_layer": self.pooling == "pooler"} if has_layer else {}
        try:
            with torch.device("meta"):
                config = getattr(transformers, f"{self._kind.name}Config")(**values)
                model = getattr(transformers, f"{self._kind.name}Model")(config, **options)
                projection = nn.Linear(self.config.hidden_size, self.dim, bias=False) if self.projection else None
                return _Tower(model, self.pooling, self._first_patch, projection)
        except Exception as error:  # transformers raises anything for sizes that do not go together
            raise InputError(f"{self.name} cannot be built: {first_line(error)}") from None

    def checkpoint_name(self, name: str) -> str:
        """Published files keep their names, and releases of transformers rename the modules that they load."""
        name = name.removeprefix("model.")
        for pattern, published in self._kind.renamed:
            name = re.sub(pattern, published, name)
        return name

    def state(
        self, checkpoint: Mapping[str, Tensor], projection: Callable[[], Tensor] | None = None
    ) -> Mapping[str, Tensor]:
        return _TowerState(checkpoint, self, projection)

    def check_config(self, config: Mapping[str, Any], path: Path) -> None:
        """The kind, the activation and what else no tensor's shape shows."""
        if "model_type" not in config:  # it is about something else
            return
        other = tower_config(config, path)
        for field in ("model_type", "hidden_act", "layer_norm_eps", "num_attention_heads", "image_size", "patch_size"):
            given, own = getattr(other, field), getattr(self.config, field)
            if given != own:
                raise InputError(f"{path} is of a model with {field} {given}, and {self.name} has {own}")

    @property
    def _first_patch(self) -> int:
        """Number of tokens before those of the patches."""
        special = {"siglip_vision_model": 0, "deit": 2}.get(self.config.model_type, 1)
        return special + (self.config.num_register_tokens or 0)

    def _check_sizes(self) -> None:
        size, own, patch = self.preprocessing.image_size, self.config.image_size, self.config.patch_size
        if not patch <= min(size, own) <= max(size, own) <= 256 * patch:
            raise InputError(f"{self.name} has images of {size} pixels and patches of {patch}; 1 to 256 are in a row")
        if self.config.hidden_size % self.config.num_attention_heads:
            width, heads = self.config.hidden_size, self.config.num_attention_heads
            raise InputError(f"{self.name} has a hidden_size of {width}, which is no multiple of its {heads} heads")
        if size != own and not self.config.model_type.startswith("dinov2"):
            raise InputError(
                f"images are prepared at {size} pixels, and {self.name} takes {own}; its position embeddings are not "
                f"interpolated, so set the size in {PROCESSORS[0]}"
            )


class _Tower(nn.Module):
    """Images (B, 3, size, size) -> features (B, d)."""

    def __init__(self, model: nn.Module, pooling: str, first_patch: int, projection: nn.Module | None) -> None:
        super().__init__()
        self.model, self.pooling, self.first_patch, self.visual_projection = model, pooling, first_patch, projection
        for module in model.modules():  # the one buffer that no checkpoint of today holds
            if isinstance(ids := getattr(module, "position_ids", None), Tensor):
                module.position_ids = torch.arange(ids.numel(), device="cpu").expand((1, -1))

    def forward(self, images: Tensor) -> Tensor:
        output = self.model(pixel_values=images)
        if self.pooling == "pooler":
            features = output.pooler_output
        elif self.pooling == "cls":
            features = output.last_hidden_state[:, 0]
        else:
            features = output.last_hidden_state[:, self.first_patch :].mean(1)
        return features if self.visual_projection is None else self.visual_projection(features)


class _TowerState(LazyMapping):
    """The tower of a checkpoint of a whole model, or of a part with it, under published names and in float32.

    What lies outside the tower is left out, and of what lies inside it, heads and poolings that are not used.
    """

    def __init__(
        self, checkpoint: Mapping[str, Tensor], encoder: TransformersEncoder, projection: Callable[[], Tensor] | None
    ) -> None:
        names = unwrapped(checkpoint)
        prefixes = [match.group() for name in names if (match := _BEFORE_PATCHES.match(name))]
        prefix = min(prefixes, key=len, default="")
        builders: dict[str, Callable[[], Tensor]] = {}
        for name, own in names.items():
            published = encoder.checkpoint_name(name.removeprefix(prefix))
            if name.startswith(prefix) and (published in encoder.shapes or not BESIDE.search(published)):
                builders[published] = partial(checkpoint.__getitem__, own)
        if encoder.projection is not None:
            given = next((own for name, own in names.items() if name.endswith(PROJECTION)), None)
            if given is not None:
                builders[PROJECTION] = partial(checkpoint.__getitem__, given)
            elif projection is not None:
                builders[PROJECTION] = projection
        super().__init__(builders)

    def __getitem__(self, name: str) -> Tensor:
        tensor = super().__getitem__(name)
        return tensor.float() if tensor.is_floating_point() else tensor


def read_folder(
    folder: Path, name: str, arch: Arch, pooling: str | None = None, projection: bool | None = None
) -> TransformersEncoder:
    """The encoder of a model's folder. Raises `InputError` that says what the folder is, if it is another thing."""
    config = read_tower(folder)
    return TransformersEncoder(name, arch, config, read_preprocessing(folder, config), pooling, projection)


def described(name: str, arch: Arch, description: Mapping[str, Any], preprocessing: Preprocessing) -> Encoder:
    """The encoder of a cache. Raises `InputError` if the description is not one that `description` gives."""
    try:
        config = decode(TowerConfig, description.get("config"))
    except MalformedError as error:
        raise InputError(f"the description of {name} cannot be used: {error}") from None
    if config.model_type not in KINDS:
        raise unknown(f"kind of model in the description of {name}", config.model_type, KINDS)
    pooling, projection = description.get("pooling"), description.get("projection")
    return TransformersEncoder(name, arch, config, preprocessing, str(pooling), projection is True)
