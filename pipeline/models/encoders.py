"""Encoders: weights in, features out, whatever library builds the tower."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from probsurgery.pipeline.errors import DamagedCacheError, InputError
from probsurgery.pipeline.files import MalformedError, decode
from probsurgery.pipeline.models.architectures import ARCHS, Arch, model_arch
from probsurgery.pipeline.models.preprocessing import Preprocessing
from probsurgery.pipeline.store.manifest import Identity

MAX_CONFIG_BYTES = 2**20


class Encoder(ABC):
    """An image tower without its weights: what is done to images, its tensors' names, and how it is built and called.

    A text encoder would differ in its input alone: weights are named, checked, merged and called in the same way.
    """

    name: str
    """In reports and in caches' names; `Identity.arch`."""
    arch: Arch
    """What is published of it."""
    description: Mapping[str, Any]
    """What `encoder_of` needs beside the name to build it again; empty if the name says it all. `Identity.encoder`."""

    @property
    @abstractmethod
    def dim(self) -> int:
        """d, the features' width."""

    @property
    @abstractmethod
    def preprocessing(self) -> Preprocessing:
        """What is done to images."""

    @abstractmethod
    def empty(self) -> nn.Module:
        """The tower on the meta device, without memory for its parameters: images (B, 3, size, size) -> (B, d)."""

    @abstractmethod
    def state(
        self, checkpoint: Mapping[str, Tensor], projection: Callable[[], Tensor] | None = None
    ) -> Mapping[str, Tensor]:
        """A checkpoint in any published layout, as the tower's state dict in float32, built tensor by tensor.

        `projection` gives the pre-trained visual projection, for checkpoints that lack it.
        """

    @abstractmethod
    def check_config(self, config: Mapping[str, Any], path: Path) -> None:
        """Raise `InputError` if the config.json beside a checkpoint is of a model that computes something else.

        Such a checkpoint would load without an error and give wrong features.
        """

    @cached_property
    def shapes(self) -> dict[str, torch.Size]:
        """Names and shapes of the tower's tensors, in order."""
        return {name: tensor.shape for name, tensor in self.empty().state_dict().items()}

    def build(self, state: Mapping[str, Tensor]) -> nn.Module:
        """The tower with these weights, in inference mode: images (B, 3, size, size) -> features (B, d).

        Features are projected, where the model projects, and not normalised.
        """
        tower = self.empty()
        tower.load_state_dict(dict(state), strict=True, assign=True)
        tensors = (*tower.named_parameters(), *tower.named_buffers())
        unfilled = next((name for name, tensor in tensors if tensor.is_meta), None)
        if unfilled is not None:
            raise InputError(f"{self.name} cannot be built from a checkpoint: checkpoints do not hold {unfilled!r}")
        return tower.eval().requires_grad_(False)

    def functional(self) -> Callable[[Mapping[str, Tensor], Tensor], Tensor]:
        """The tower as a function of weights and images (B, 3, size, size), for merges that learn."""
        tower = self.empty().eval()

        def forward(weights: Mapping[str, Tensor], images: Tensor) -> Tensor:
            with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # the patch embedding would use TF32
                return torch.func.functional_call(tower, dict(weights), (images,), strict=True)

        return forward


def get_encoder(name: str) -> Encoder:
    """An encoder by name: a row of `ARCHS`, or any model of open_clip. Raises `InputError` for an unknown name."""
    from probsurgery.pipeline.models.open_clip_encoder import OpenClipEncoder, has_model

    if name in ARCHS:
        return OpenClipEncoder(name, ARCHS[name])
    if has_model(name):
        return OpenClipEncoder(name, model_arch(name))
    raise InputError(
        f"unknown arch {name!r}; choose from: {', '.join(ARCHS)}, or any model of open_clip by its name, such as "
        "ViT-B-32-quickgelu, with --checkpoints"
    )


def encoder_of(identity: Identity) -> Encoder:
    """The encoder of a cache, without its checkpoints and its suite. Raises `InputError` if it cannot be built here."""
    try:
        preprocessing = decode(Preprocessing, identity.preprocessing) if identity.encoder else None
    except MalformedError as error:
        raise DamagedCacheError(f"the cache records no preprocessing of images ({error}); extract again") from None
    return described_encoder(identity.arch, identity.encoder, preprocessing)


def described_encoder(name: str, description: Mapping[str, Any], preprocessing: Preprocessing | None) -> Encoder:
    """The encoder of this name and `description`, which may come from anybody: nothing outside it is read."""
    return get_encoder(name)
