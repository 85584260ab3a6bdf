"""Encoders: weights in, features out, whatever library builds the tower."""

from __future__ import annotations

import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import replace
from difflib import get_close_matches
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from probsurgery.pipeline import hub
from probsurgery.pipeline.errors import DamagedCacheError, InputError, unknown
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

    projection: str | None
    """Name of the visual projection in its state dict; None if features are not projected."""
    own_weights: Callable[[], Path] | None = None
    """The checkpoint that it came with, fetched if need be: the pre-trained weights, unless others are given."""

    @property
    @abstractmethod
    def description(self) -> Mapping[str, Any]:
        """What `encoder_of` needs beside the name to build it again; empty if the name says it all."""

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

    def checkpoint_name(self, name: str) -> str:
        """What a tensor of the tower is called in its state dict, whichever release of its library builds the tower."""
        return name

    @cached_property
    def shapes(self) -> dict[str, torch.Size]:
        """Names and shapes of the tower's tensors, in order."""
        return {self.checkpoint_name(name): tensor.shape for name, tensor in self.empty().state_dict().items()}

    def build(self, state: Mapping[str, Tensor]) -> nn.Module:
        """The tower with these weights, in inference mode: images (B, 3, size, size) -> features (B, d).

        Features are projected, where the model projects, and not normalised.
        """
        tower = self.empty()
        own = {self.checkpoint_name(name): name for name in tower.state_dict()}
        tower.load_state_dict({own.get(name, name): tensor for name, tensor in state.items()}, strict=True, assign=True)
        tensors = (*tower.named_parameters(), *tower.named_buffers())
        unfilled = next((name for name, tensor in tensors if tensor.is_meta), None)
        if unfilled is not None:
            raise InputError(f"{self.name} cannot be built from a checkpoint: checkpoints do not hold {unfilled!r}")
        return tower.eval().requires_grad_(False)

    def functional(self) -> Callable[[Mapping[str, Tensor], Tensor], Tensor]:
        """The tower as a function of weights and images (B, 3, size, size), for merges that learn."""
        tower = self.empty().eval()
        own = {self.checkpoint_name(name): name for name in tower.state_dict()}
        fixed = {name: buffer for name, buffer in tower.named_buffers() if not buffer.is_meta}

        def forward(weights: Mapping[str, Tensor], images: Tensor) -> Tensor:
            moved = {name: buffer.to(images.device) for name, buffer in fixed.items()}
            tensors = moved | {own.get(name, name): tensor for name, tensor in weights.items()}
            with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # the patch embedding would use TF32
                return torch.func.functional_call(tower, tensors, (images,), strict=True)

        return forward


def get_encoder(name: str, *, pooling: str | None = None, projection: bool | None = None) -> Encoder:
    """An encoder by name: a row of `ARCHS`; any model of open_clip; the path of an open_clip configuration (.json); the
    folder of a transformers model, or `hf:owner/name` for one of the Hub.

    `pooling` and `projection` say which features a transformers model gives: see `transformers_encoder`. Raises
    `InputError` for an unknown name, and for a path at which no image encoder is described.
    """
    encoder = _named(name) or _from_file(Path(name))
    if encoder is None:
        return _from_transformers(name, pooling, projection)
    if pooling is not None or projection is not None:
        raise InputError(f"pooling and projection are for models of transformers, and {name} is none; leave them out")
    return encoder


def encoder_of(identity: Identity) -> Encoder:
    """The encoder of a cache, without its checkpoints and its suite. Raises `InputError` if it cannot be built here."""
    try:
        preprocessing = decode(Preprocessing, identity.preprocessing) if identity.encoder else None
    except MalformedError as error:
        raise DamagedCacheError(f"the cache records no preprocessing of images ({error}); extract again") from None
    return described_encoder(identity.arch, identity.encoder, preprocessing)


def described_encoder(name: str, description: Mapping[str, Any], preprocessing: Preprocessing | None) -> Encoder:
    """The encoder of this name and `description`. Both may come from anybody: no path and no address is followed."""
    from probsurgery.pipeline.models import open_clip_encoder, transformers_encoder

    if not description or preprocessing is None:
        encoder = _named(name)
        if encoder is None:
            raise _unknown(name)
        return encoder
    libraries = {"open_clip": open_clip_encoder.described, "transformers": transformers_encoder.described}
    library = description.get("library")
    if library not in libraries:
        raise unknown(f"library of the encoder {name}", str(library)[:80], libraries)
    try:
        size = len(json.dumps(description))
    except RecursionError:
        size = MAX_CONFIG_BYTES + 1
    if size > MAX_CONFIG_BYTES:
        raise InputError(f"the description of {name} has more than {MAX_CONFIG_BYTES:,} bytes, or is nested too deeply")
    return libraries[library](name, Arch(name), description, preprocessing)


def _named(name: str) -> Encoder | None:
    """The encoder of a name that needs no file, if it is one."""
    from probsurgery.pipeline.models.open_clip_encoder import OpenClipEncoder, has_model

    if name in ARCHS:
        return OpenClipEncoder(name, ARCHS[name])
    return OpenClipEncoder(name, model_arch(name)) if has_model(name) else None


def _from_file(path: Path) -> Encoder | None:
    """The encoder of an open_clip configuration, if a file is there."""
    from probsurgery.pipeline.models.open_clip_encoder import read_config

    if not path.is_file():
        return None
    name = _own_name(path.with_suffix(""))
    return read_config(path, name, Arch(name))


def _from_transformers(name: str, pooling: str | None, projection: bool | None) -> Encoder:
    """The encoder of a model's folder, which may be the Hub's."""
    from probsurgery.pipeline.models.transformers_config import CONFIG, PROCESSORS
    from probsurgery.pipeline.models.transformers_encoder import read_folder

    repo = name.removeprefix("hf:")
    if repo != name and re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        folder = hub.download(repo, "--arch", (CONFIG,)).parent
        hub.download(repo, "--arch", PROCESSORS)
        arch = replace(model_arch(_own_name(Path(repo))), pretrained_repo=repo)
        own_weights = partial(hub.download, repo, "--checkpoints")
    elif (folder := Path(name)).is_dir():
        arch, own_weights = Arch(_own_name(folder)), partial(hub.weights_in, folder)
    else:
        raise _unknown(name)
    encoder = read_folder(folder, arch.open_clip, arch, pooling, projection)
    encoder.own_weights = own_weights
    return encoder


def _own_name(path: Path) -> str:
    """What an encoder of one's own is called: by its file or folder. Raises `InputError` for a name of `ARCHS`."""
    name = Path(os.path.abspath(path)).name
    if name in ARCHS or not name:
        raise InputError(f"{path} has the name of another encoder ({name!r}), and reports would mix them up; rename it")
    return name


def _unknown(name: str) -> InputError:
    import open_clip

    if "/" in name or name.endswith(".json") or name.startswith("hf:"):
        what = "the path of an open_clip configuration or of a model's folder, or hf:owner/name"
        return InputError(f"no encoder at {name[:200]!r}; give {what}")
    models = {model.lower(): model for model in open_clip.list_models()}
    near = [models[model] for model in get_close_matches(name.lower(), models, 3, 0.75)]
    return InputError(
        f"unknown arch {name[:200]!r}; choose from: {', '.join(ARCHS)}, or any model of open_clip by its name, such as "
        f"{' or '.join(near) or 'ViT-B-32-quickgelu'}, with --checkpoints"
    )
