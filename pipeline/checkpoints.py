"""Published checkpoint formats -> state dicts of open_clip's visual tower, without executing anything in the files."""

from __future__ import annotations

import hashlib
import pickle
import warnings
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from probsurgery.pipeline.errors import InputError, first_line

StateDict = dict[str, Tensor]

_HF_NAMES = {
    "embeddings.class_embedding": "class_embedding",
    "embeddings.patch_embedding.weight": "conv1.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "pre_layrnorm": "ln_pre",  # spelt so in transformers
    "post_layernorm": "ln_post",
    "encoder.layers": "transformer.resblocks",
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def read_tensors(path: Path) -> StateDict:
    """Tensors of a .safetensors file, or of a file that `torch.load(weights_only=True)` reads.

    Raises `InputError` if the file is missing, torn, or a pickle of anything but tensors.
    """
    if not path.is_file():
        raise InputError(f"no checkpoint at {path}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the pickle protocol; what cannot be read is refused below
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise InputError(
            f"{path} holds pickled objects, which are not read because unpickling runs code; "
            "save its state dict as .safetensors"
        ) from None
    except Exception as error:  # a torn file can raise anything in either reader
        raise InputError(f"{path} is not a readable checkpoint: {first_line(error)}") from None
    if not isinstance(state, dict):
        raise InputError(f"{path} holds a {type(state).__name__}, not a state dict")
    state = state.get("state_dict", state)
    if not state or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise InputError(f"{path} holds something besides named tensors; save its state dict alone")
    return state


def find_checkpoint(folder: Path, name: str) -> Path:
    """The file of a model in a folder: `<name>.safetensors`, `<name>.pt`, or a Hugging Face folder `<name>/`."""
    candidates = [folder / f"{name}.safetensors", folder / f"{name}.pt", folder / name / "model.safetensors"]
    for path in candidates:
        if path.is_file():
            return path
    raise InputError(
        f"no checkpoint of {name!r} in {folder}; looked for {', '.join(str(p.relative_to(folder)) for p in candidates)}"
    )


def to_visual(state: StateDict, projection: Tensor | None = None) -> StateDict:
    """State dict of open_clip's visual tower, in float32, from any of the layouts that are met in the wild.

    - open_clip's visual tower itself;
    - a whole CLIP model of open_clip, whose tower is under `visual.` (text weights are dropped);
    - Hugging Face `CLIPVisionModel` (keys with `vision_model.`, or without as transformers >= 5 writes them), which
      lacks the visual projection: `projection` (width, d), the pre-trained model's, stands in;
    - Hugging Face `CLIPModel` and `CLIPVisionModelWithProjection`, which hold it.
    """
    for prefix in ("model.visual.", "visual."):
        if any(name.startswith(prefix) for name in state):
            state = {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
    if _is_hugging_face(state):
        state = _from_hugging_face(state, projection)
    return {name: tensor.float() for name, tensor in state.items() if tensor.is_floating_point()}


def _is_hugging_face(state: StateDict) -> bool:
    return any(name.removeprefix("vision_model.").startswith("embeddings.") for name in state)


def lacks_projection(state: StateDict) -> bool:
    """Whether these are a Hugging Face `CLIPVisionModel`'s tensors, which leave the visual projection out."""
    return _is_hugging_face(state) and "visual_projection.weight" not in state


def _from_hugging_face(state: StateDict, projection: Tensor | None) -> StateDict:
    if any(name.startswith("vision_model.") for name in state):
        state = {
            n.removeprefix("vision_model."): t
            for n, t in state.items()
            if n.startswith(("vision_model.", "visual_projection."))
        }
    visual: StateDict = {}
    attention: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        if name == "visual_projection.weight":
            projection = tensor.T
            continue
        for theirs, ours in _HF_NAMES.items():
            name = name.replace(theirs, ours)
        block, found, rest = name.partition("self_attn.")
        if found:
            which, _, kind = rest.partition("_proj.")
            attention.setdefault(f"{block}attn.in_proj_{kind}", {})[which] = tensor
        else:
            visual[name] = tensor
    for name, parts in attention.items():
        if parts.keys() != {"q", "k", "v"}:
            raise InputError(f"the checkpoint has only {', '.join(sorted(parts))} of the q, k, v projections of {name}")
        visual[name] = torch.cat([parts[which] for which in "qkv"])
    if projection is not None:
        visual["proj"] = projection.contiguous()
    return visual


def check_state(state: StateDict, expected: dict[str, torch.Size], where: str) -> None:
    """Raise `InputError`, naming the first key that differs, unless names and shapes are exactly these."""
    for name, shape in expected.items():
        if name not in state:
            raise InputError(f"{where} lacks the key {name!r}; it is not a checkpoint of this architecture")
        if state[name].shape != shape:
            raise InputError(
                f"{where}: {name!r} has shape {tuple(state[name].shape)}, this architecture takes {tuple(shape)}"
            )
        if not state[name].isfinite().all():
            raise InputError(f"{where}: {name!r} holds NaN or infinite weights")
    extra = next((name for name in state if name not in expected), None)
    if extra is not None:
        raise InputError(f"{where} has a key {extra!r} that this architecture has not")


def digest(state: StateDict) -> str:
    """SHA-256 of names, shapes and values: the same for the same weights, whatever file they came in."""
    total = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].contiguous()
        total.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        total.update(tensor.numpy().data)
    return total.hexdigest()
