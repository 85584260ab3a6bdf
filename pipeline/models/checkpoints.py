"""Published checkpoint formats -> state dicts with open_clip's names, without executing anything in the files."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from probsurgery.pipeline.errors import InputError, first_line
from probsurgery.pipeline.models import pickles

StateDict = dict[str, Tensor]

_HF_NAMES = {
    "embeddings.class_embedding": "class_embedding",
    "embeddings.patch_embedding.weight": "conv1.weight",
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "pre_layrnorm": "ln_pre",  # spelt so in transformers
    "post_layernorm": "ln_post",
    "final_layer_norm": "ln_final",
    "encoder.layers": "transformer.resblocks",
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
_WRAPPERS = ("state_dict", "model_state_dict", "model")
"""Under these names training scripts keep the model beside their own records."""
_STRANGERS = {
    b"<": "an HTML or XML page, which is what a download that wanted a confirmation or a login leaves",
    b"version https://git-lfs": "a Git LFS pointer; fetch the file itself with `git lfs pull`",
    b"\x1f\x8b": "a gzip archive; unpack it first",
    b"\x89HDF": "an HDF5 file",
    b"{": "a JSON file",
    b"\x00" * 16: "a file that begins with zeros, as a download does that reserved its space and did not finish",
}
_FORMATS = "safetensors, torch.save and pickle files are read"


def read_tensors(path: Path) -> Mapping[str, Tensor]:
    """Named tensors of a checkpoint, its format recognised by content: safetensors, `torch.save`, or a plain pickle.

    Those of safetensors are read when they are asked for, one at a time. Pickled objects are read at once, as what they
    are made of (see `pickles`). Raises `InputError` if the file is missing, cut
    off, of another format, holds no tensors, or would call something when unpickled by others.
    """
    if not path.is_file():
        raise InputError(f"no checkpoint at {path}")
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(512)
    header = int.from_bytes(start[:8], "little")
    try:
        if start[8:9] == b"{" and header < 2**32:
            state = _read_safetensors(path, header, size)
        elif start[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
            state = _pickled_tensors(pickles.read_zip(path), size)
        elif start[:1] == b"\x80":
            state = _pickled_tensors(pickles.read_stream(path), size)
        else:
            what = next((what for magic, what in _STRANGERS.items() if start.lstrip().startswith(magic)), None)
            raise InputError(
                f"{path} is empty: its download did not begin"
                if not size
                else f"{path} is not a checkpoint but {what}"
                if what
                else f"{path} is not a checkpoint of a known format; {_FORMATS}"
            )
    except pickles.CutOffError as error:
        raise InputError(f"{path} is cut off: {error}; download or copy it again") from None
    except pickles.UnreadableError as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    except (OSError, MemoryError) as error:
        raise InputError(f"{path} cannot be read: {first_line(error)}") from None
    if not state:
        raise InputError(f"{path} holds no named tensors: it is not a state dict and not a model")
    return state


class _Streamed(Mapping):
    """Tensors of a safetensors file, each read when it is asked for; none is kept, nor the file held open."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with safe_open(path, "pt") as file:
            self._names = dict.fromkeys(file.keys())

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        try:
            with safe_open(self._path, "pt") as file:
                return file.get_tensor(name)
        except Exception as error:  # the library raises its own and the OS's
            raise InputError(f"{self._path}: {name!r} cannot be read: {first_line(error)}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _read_safetensors(path: Path, header: int, size: int) -> Mapping[str, Tensor]:
    try:
        return _Streamed(path)
    except Exception as error:  # the library raises its own and the OS's
        if 8 + header > size:
            raise pickles.CutOffError("it ends in the middle of its safetensors header") from None
        try:
            with path.open("rb") as file:
                entries = json.loads(file.read(8 + header)[8:])
            end = 8 + header + max(e["data_offsets"][1] for n, e in entries.items() if n != "__metadata__")
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
            raise pickles.UnreadableError("its safetensors header is damaged") from None
        if end > size:
            raise pickles.CutOffError(f"it has {size:,} of {end:,} bytes") from None
        raise pickles.UnreadableError(f"its safetensors header is damaged ({first_line(error)})") from None


def _pickled_tensors(value: object, size: int) -> StateDict:
    for wrapper in _WRAPPERS:
        if isinstance(value, dict) and isinstance(value.get(wrapper), dict | pickles.Record):
            value = value[wrapper]
    return pickles.named_tensors(value, size)


class VisualState(Mapping):
    """State dict of open_clip's visual tower in float32, made tensor by tensor from any of the layouts met in the wild.

    - open_clip's visual tower itself;
    - a whole CLIP model of open_clip or OpenAI, or a wrapper of one, whose tower is under `visual.` (the rest is
      dropped);
    - Hugging Face `CLIPVisionModel` (keys with `vision_model.`, or without as transformers >= 5 writes them), which
      lacks the visual projection: `projection` (width, d), the pre-trained model's, stands in;
    - Hugging Face `CLIPModel` and `CLIPVisionModelWithProjection`, which hold it.
    """

    def __init__(self, held: Mapping[str, Tensor], projection: Tensor | None = None) -> None:
        self._held, self._projection = held, projection
        self._sources = _visual_sources(held)
        if projection is not None and lacks_projection(held):
            self._sources["proj"] = ()

    def raw(self, name: str) -> Tensor:
        """A tensor in the type in which the checkpoint has it."""
        sources = self._sources[name]
        if not sources:
            return self._projection
        parts = [self._held[source] for source in sources]
        if len(parts) > 1:
            if len({part.shape for part in parts}) > 1:
                raise InputError(f"the shapes of the q, k, v projections of {name} differ in the checkpoint")
            return torch.cat(parts)
        return parts[0].T.contiguous() if sources[0].endswith("visual_projection.weight") else parts[0]

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.raw(name)
        return tensor.float() if tensor.is_floating_point() else tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)


def to_visual(state: Mapping[str, Tensor], projection: Tensor | None = None) -> StateDict:
    """What `VisualState` describes, all of it, in the types in which the checkpoint has it."""
    view = VisualState(state, projection)
    return {name: view.raw(name) for name in view}


def to_text(state: Mapping[str, Tensor]) -> StateDict | None:
    """The text tower of a whole CLIP model, in open_clip's names; None if there is none."""
    if _is_hugging_face(state):
        sources = _from_hugging_face(_under(state, "text_model."))
        text = {name: torch.cat([state[source] for source in its]) for name, its in sources.items()}
        kept = {"text_projection": state.get("text_projection.weight"), "logit_scale": state.get("logit_scale")}
        if not text or None in kept.values():
            return None
        return text | {"text_projection": kept["text_projection"].T.contiguous(), "logit_scale": kept["logit_scale"]}
    last = "token_embedding.weight"
    where = next((name.removesuffix(last) for name in state if name.endswith(last)), None)
    names = ("token_embedding.", "positional_embedding", "transformer.", "ln_final.", "text_projection", "logit_scale")
    if where is None or not any(n.startswith(f"{where}transformer.") for n in state):
        return None
    return {n.removeprefix(where): t for n, t in state.items() if n.startswith(tuple(where + name for name in names))}


def to_classifier(state: Mapping[str, Tensor]) -> Tensor:
    """Weights (C, d) of a pickled `ClassificationHead`. Raises `InputError` if it is something else, or has a bias."""
    weight, bias = state.get("weight"), state.get("bias")
    if weight is None or weight.ndim != 2 or state.keys() - {"weight", "bias"}:
        raise InputError(f"it is not a classification head; it looks like {looks_like(state)}")
    if bias is not None and bias.any():
        raise InputError("its bias is not zero, so it is not a zero-shot classifier")
    return weight.float()


def _visual_sources(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Which of a checkpoint's tensors make up each one of open_clip's visual tower: one, or q, k and v."""
    if not _is_hugging_face(names):
        return {name: (source,) for name, source in (_under(names, "visual.") or {n: n for n in names}).items()}
    tower = _from_hugging_face(_under(names, "vision_model.") or {name: name for name in names})
    tower.pop("visual_projection.weight", None)
    projection = next((name for name in names if name.endswith("visual_projection.weight")), None)
    return tower if projection is None else tower | {"proj": (projection,)}


def _under(names: Iterable[str], module: str) -> dict[str, str]:
    """Names of what is under a module of this name, wherever it first is: without its prefix -> whole."""
    found = [match.group() for n in names if (match := re.match(rf"(?:\w+\.)*?{re.escape(module)}", n))]
    prefix = min(found, key=len, default=None)
    return {n.removeprefix(prefix): n for n in names if prefix is not None and n.startswith(prefix)}


def _is_hugging_face(names: Iterable[str]) -> bool:
    return any(name.endswith("embeddings.patch_embedding.weight") for name in names)


def lacks_projection(names: Iterable[str]) -> bool:
    """Whether these are a Hugging Face `CLIPVisionModel`'s tensors, which leave the visual projection out."""
    return _is_hugging_face(names) and not any(name.endswith("visual_projection.weight") for name in names)


def _from_hugging_face(names: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    tower: dict[str, tuple[str, ...]] = {}
    attention: dict[str, dict[str, str]] = {}
    for name, source in names.items():
        if name.endswith("position_ids"):  # 0, 1, 2, ..., which older releases kept
            continue
        for theirs, ours in _HF_NAMES.items():
            name = name.replace(theirs, ours)
        block, found, rest = name.partition("self_attn.")
        if found:
            which, _, kind = rest.partition("_proj.")
            attention.setdefault(f"{block}attn.in_proj_{kind}", {})[which] = source
        else:
            tower[name] = (source,)
    for name, parts in attention.items():
        if parts.keys() != {"q", "k", "v"}:
            raise InputError(f"the checkpoint lacks one of the q, k, v projections of {name}")
        tower[name] = tuple(parts[which] for which in "qkv")
    return tower


def check_state(state: Mapping[str, Tensor], expected: dict[str, torch.Size], where: str, arch: str) -> None:
    """Raise `InputError`, naming the first key that differs, unless names and shapes are exactly these."""
    bad = None
    for name, shape in expected.items():
        if name not in state:
            problem = f"lacks the key {name!r}"
        elif (tensor := state[name]).shape != shape:
            problem = f"has {name!r} of shape {tuple(tensor.shape)} instead of {tuple(shape)}"
        elif tensor.is_complex() or (name.endswith(("weight", "bias")) and not tensor.is_floating_point()):
            problem = f"has {name!r} in {str(tensor.dtype).removeprefix('torch.')}, and not in real numbers"
        else:
            bad = bad or (None if tensor.isfinite().all() else name)
            continue
        raise InputError(f"{where} {problem}: it is no checkpoint of {arch}; it looks like {looks_like(state)}")
    extra = next((name for name in state if name not in expected), None)
    if extra is not None:
        raise InputError(f"{where} has a key {extra!r} that {arch} has not; it looks like {looks_like(state)}")
    if bad is not None:
        raise InputError(f"{where}: {bad!r} holds NaN or infinite weights")


def looks_like(state: Mapping[str, Tensor]) -> str:
    """A few words on what a state dict is of, for errors."""
    conv = next((t for n, t in state.items() if n.endswith(("conv1.weight", "patch_embedding.weight"))), None)
    blocks = {int(m.group(1)) for n in state if (m := re.search(r"(?:resblocks|encoder\.layers)\.(\d+)\.", n))}
    if conv is not None and conv.ndim == 4 and blocks:
        proj = state.get("proj")
        d = f", d = {proj.shape[1]}" if proj is not None and proj.ndim == 2 else ", without a visual projection"
        return f"a CLIP ViT of width {conv.shape[0]}, patch {conv.shape[-1]}, {max(blocks) + 1} blocks{d}"
    if any("layer1." in name for name in state):
        return "a ResNet"
    if state.keys() <= {"weight", "bias"}:
        return f"a classification head {tuple(state['weight'].shape) if 'weight' in state else ''}".strip()
    names = list(state)
    return f"tensors named {', '.join(map(repr, names[:3]))}{', ...' if len(names) > 3 else ''}"


def digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, shapes and values: the same for the same weights, whatever file they came in."""
    total = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].contiguous()
        total.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        total.update(tensor.numpy().data)
    return total.hexdigest()
