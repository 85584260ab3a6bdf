"""Reads published checkpoint formats as state dicts with open_clip's names. Nothing in the files is executed."""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from probsurgery.pipeline.classifier import Classifier
from probsurgery.pipeline.errors import InputError, first_line
from probsurgery.pipeline.files import MalformedError, read_json
from probsurgery.pipeline.fingerprints import state_digest
from probsurgery.pipeline.models.pickles import named_tensors, read_zip
from probsurgery.pipeline.models.unpickler import CutOffError, UnreadableError, load_stream

StateDict = dict[str, Tensor]
digest = state_digest

_HF_NAMES = {
    "embeddings.class_embedding": "class_embedding",
    "embeddings.patch_embedding.weight": "conv1.weight",
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "pre_layrnorm": "ln_pre",  # spelt like this in transformers
    "post_layernorm": "ln_post",
    "final_layer_norm": "ln_final",
    "encoder.layers": "transformer.resblocks",
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}

INDEX = ".index.json"
"""How the name of a file ends that says which of several files holds which tensor."""
_MAX_INDEX_BYTES = 2**26
_INNER_WRAPPERS = re.compile(r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_BESIDE = ("logit_scale", "logit_bias", "n_averaged")
"""What is saved next to a tower and is no part of it."""
_ADAPTER = re.compile(r"(?:^|[._])(?:lora|hada|lokr|ia3|b?oft|vera)_|\.base_layer\.")

_OTHER_FORMATS = {
    b"<": "an HTML or XML page, which a download leaves that needed a confirmation or a login",
    b"version https://git-lfs": "a Git LFS pointer; fetch the file itself with `git lfs pull`",
    b"\x1f\x8b": "a gzip archive; unpack it first",
    b"\x89HDF": "an HDF5 file",
    b"{": "a JSON file",
    b"\x00" * 16: "a file that begins with zeros, which a download leaves that did not finish",
}


def read_tensors(path: Path) -> Mapping[str, Tensor]:
    """Named tensors of a checkpoint: safetensors, `torch.save` or a plain pickle, recognised by content.

    Or those of several files, by the index that names them. Those of safetensors are read on access, one at a time; a
    pickle is read as a whole. Raises `InputError` if a file is missing, cut off or of another format, has no tensors,
    or would call something when unpickled by other tools.
    """
    if not path.is_file():
        raise InputError(f"no checkpoint at {path}")
    if path.name.endswith(INDEX):
        return _read_shards(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(512)
    header = int.from_bytes(start[:8], "little")
    try:
        if start[8:9] == b"{" and header < 2**32:
            state = _read_safetensors(path, 8 + header, size)
        elif start[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
            state = named_tensors(read_zip(path), size)
        elif start[:1] == b"\x80":  # `pickle.dump`, or `torch.save` before 1.6
            with path.open("rb") as file:
                state = named_tensors(load_stream(file, size), size)
        elif not size:
            raise InputError(f"{path} is empty: its download did not begin")
        else:
            known = (f"but {name}" for magic, name in _OTHER_FORMATS.items() if start.lstrip().startswith(magic))
            other = next(known, "of a known format; safetensors, torch.save and pickle files are read")
            raise InputError(f"{path} is not a checkpoint {other}")
    except CutOffError as error:
        raise InputError(f"{path} is cut off: {error}; download or copy it again") from None
    except UnreadableError as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    except (OSError, MemoryError) as error:
        raise InputError(f"{path} cannot be read: {first_line(error)}") from None
    if not state:
        raise InputError(f"{path} holds no named tensors: it is not a state dict or a model")
    return state


class LazyMapping(Mapping[str, Any]):
    """Values that are read or built on each access. None is cached."""

    def __init__(self, builders: dict[str, Callable[[], Any]]) -> None:
        self._builders = builders

    def __getitem__(self, name: str) -> Any:
        return self._builders[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._builders)

    def __len__(self) -> int:
        return len(self._builders)


def shards(path: Path) -> list[Path]:
    """The files that an index names, which lie beside it; none for any other checkpoint."""
    files = sorted({path.parent / name for name in _weight_map(path).values()} if path.name.endswith(INDEX) else ())
    absent = next((file.name for file in files if not file.is_file()), None)
    if absent is not None:
        raise InputError(f"{path} names {absent}, which is not beside it; fetch or copy all its files")
    return files


def _weight_map(path: Path) -> Mapping[str, str]:
    try:
        index = read_json(path, _MAX_INDEX_BYTES)["weight_map"]
        if index and all(re.fullmatch(r"[^/\\\0]+\.(?:safetensors|bin|pt|pth)", file) for file in index.values()):
            return index
        problem = "it does not name files beside it"
    except (OSError, MalformedError, LookupError, TypeError, AttributeError) as error:
        problem = first_line(error) if isinstance(error, OSError | MalformedError) else "it has no weight_map"
    raise InputError(f"{path} is not the index of a checkpoint in several files: {problem}")


def _read_shards(path: Path) -> Mapping[str, Tensor]:
    files = {file.name: read_tensors(file) for file in shards(path)}
    tensors: dict[str, Callable[[], Tensor]] = {}
    for name, file in _weight_map(path).items():
        if name not in files[file]:
            raise InputError(f"{path} says that {file} holds {name!r}, which it does not; fetch or write both again")
        tensors[name] = partial(files[file].__getitem__, name)
    return LazyMapping(tensors)


def _read_safetensors(path: Path, start: int, size: int) -> Mapping[str, Tensor]:
    """The tensors of a file whose values begin at byte `start`, each read on access. The file is not left open."""
    try:
        with safe_open(path, "pt") as file:
            names = file.keys()
        return LazyMapping({name: partial(_read_tensor, path, name) for name in names})
    except Exception as error:  # the library raises its own and the OS's
        if start > size:
            raise CutOffError("it ends in the middle of its safetensors header") from None
        try:
            with path.open("rb") as file:
                entries = json.loads(file.read(start)[8:])
            end = start + max(e["data_offsets"][1] for n, e in entries.items() if n != "__metadata__")
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
            raise UnreadableError("its safetensors header is damaged") from None
        if end > size:
            raise CutOffError(f"it has {size:,} of {end:,} bytes") from None
        raise UnreadableError(f"its safetensors header is damaged ({first_line(error)})") from None


def _read_tensor(path: Path, name: str) -> Tensor:
    try:
        with safe_open(path, "pt") as file:
            return file.get_tensor(name)
    except Exception as error:  # the library raises its own and the OS's
        raise InputError(f"{path}: {name!r} cannot be read: {first_line(error)}") from None


class VisualState(LazyMapping):
    """State dict of open_clip's visual tower in float32, built tensor by tensor from any published layout:

    - open_clip's visual tower itself, with a logit scale beside it or not;
    - a whole CLIP model of open_clip or OpenAI, or a wrapper of it, of which only the tower, `visual.`, is used;
    - Hugging Face `CLIPVisionModel` (keys with `vision_model.`, or without as transformers >= 5 writes them), which
      lacks the visual projection: `projection` gives that of the pre-trained model, (width, d);
    - Hugging Face `CLIPModel` and `CLIPVisionModelWithProjection`, which have it;
    - any of these with what training wrappers (`DataParallel`, `torch.compile`, a module around it) add to all names.
    """

    def __init__(self, checkpoint: Mapping[str, Tensor], projection: Callable[[], Tensor] | None = None) -> None:
        sources = _visual_sources(checkpoint)
        super().__init__({name: partial(_joined, checkpoint, name, names) for name, names in sources.items()})
        if projection is not None and _is_hugging_face(checkpoint):
            self._builders.setdefault("proj", projection)

    def __getitem__(self, name: str) -> Tensor:
        tensor = super().__getitem__(name)
        return tensor.float() if tensor.is_floating_point() else tensor


def _joined(checkpoint: Mapping[str, Tensor], name: str, sources: tuple[str, ...]) -> Tensor:
    """One tensor of the visual tower, in the checkpoint's own type."""
    tensors = [checkpoint[source] for source in sources]
    if len({tensor.shape for tensor in tensors}) > 1:
        raise InputError(f"the shapes of the q, k, v projections of {name} differ in the checkpoint")
    if len(tensors) > 1:
        return torch.cat(tensors)
    return tensors[0].T.contiguous() if sources[0].endswith("visual_projection.weight") else tensors[0]


def to_text(state: Mapping[str, Tensor]) -> StateDict | None:
    """The text tower of a whole CLIP model, with open_clip's names; None if there is none."""
    state = LazyMapping({name: partial(state.__getitem__, own) for name, own in unwrapped(state).items()})
    if _is_hugging_face(state):
        tower = _from_hugging_face(_under(state, "text_model."))
        text = {name: torch.cat([state[source] for source in sources]) for name, sources in tower.items()}
        projection, scale = state.get("text_projection.weight"), state.get("logit_scale")
        if not text or projection is None or scale is None:
            return None
        return text | {"text_projection": projection.T.contiguous(), "logit_scale": scale}
    embedding = "token_embedding.weight"
    prefix = next((name.removesuffix(embedding) for name in state if name.endswith(embedding)), None)
    names = ("token_embedding.", "positional_embedding", "transformer.", "ln_final.", "text_projection", "logit_scale")
    if prefix is None or not any(n.startswith(f"{prefix}transformer.") for n in state):
        return None
    return {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(tuple(prefix + name for name in names))}


_LINEAR = ("classifier", "fc", "head", "score")
"""What the last layer of a model is called."""


def to_classifier(state: Mapping[str, Tensor], path: Path, *, normalise: bool = True) -> Classifier:
    """A linear layer's weight and bias as a classifier. Raises `InputError` if there is anything else.

    A pickled `ClassificationHead` of the task-vectors code normalises its features.
    """
    # `fc.weight` alone, or `classifier.weight` and the like beside the rest of a model.
    prefixes = {name.removesuffix("weight") for name in state if name.endswith("weight")}
    if len(prefixes) > 1 or state.keys() - {f"{prefix}{part}" for prefix in prefixes for part in ("weight", "bias")}:
        prefixes = {p for p in prefixes if p.split(".")[-2:-1] and p.split(".")[-2] in _LINEAR and p.count(".") <= 2}
    if len(prefixes) != 1:
        raise InputError(
            f"{path} is not a classification head, which has `weight` (C, d) and perhaps `bias` (C,), also under one "
            f"name such as {_LINEAR[0]}.weight; it looks like {describe(state)}"
        )
    prefix = prefixes.pop()
    try:
        return Classifier(state[f"{prefix}weight"], state.get(f"{prefix}bias"), normalise)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _visual_sources(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """The checkpoint's names for each tensor of open_clip's visual tower: one name, or those of q, k and v."""
    own = {name: source for name, source in unwrapped(names).items() if name not in _BESIDE}
    if not _is_hugging_face(own):
        return {name: (own[source],) for name, source in (_under(own, "visual.") or {n: n for n in own}).items()}
    tower = _from_hugging_face(_under(own, "vision_model.") or {name: name for name in own})
    tower.pop("visual_projection.weight", None)
    projection = next((name for name in own if name.endswith("visual_projection.weight")), None)
    tower |= {} if projection is None else {"proj": (projection,)}
    return {name: tuple(own[source] for source in sources) for name, sources in tower.items()}


def unwrapped(names: Iterable[str]) -> dict[str, str]:
    """Names without what wrappers of a model add to them: those, and the names with it.

    A wrapper adds its attribute's name before all names, `module.` or any other, and torch.compile, FSDP and activation
    checkpointing do so before those of the modules that they wrap.
    """
    names = list(names)
    bare = {_INNER_WRAPPERS.sub("", name): name for name in names}
    if len(bare) < len(names):  # a model and a wrapped copy of it
        return dict(zip(names, names, strict=True))
    while True:
        first = {name.partition(".")[:2] for name in bare if name not in _BESIDE}
        if len(first) != 1 or first == {("trunk", ".")} or not next(iter(first))[1]:  # towers of timm have `trunk.`
            return bare
        prefix = "".join(first.pop())
        bare = {name.removeprefix(prefix): own for name, own in bare.items()}


def refuse_adapter(names: Iterable[str], where: Path) -> None:
    """Raise `InputError` if a checkpoint holds a LoRA adapter, or a model with one that is not merged into it."""
    if any(map(_ADAPTER.search, names)):
        raise InputError(
            f"{where} holds a LoRA adapter or the like, which is a change to a model and not a model; merge it into "
            "its model, as with peft's merge_and_unload(), and give what that saves"
        )


def _under(names: Iterable[str], module: str) -> dict[str, str]:
    """Names inside the outermost module of this name: without and with their prefix."""
    prefixes = [match.group() for n in names if (match := re.match(rf"(?:\w+\.)*?{re.escape(module)}", n))]
    prefix = min(prefixes, key=len, default=None)
    return {n.removeprefix(prefix): n for n in names if prefix is not None and n.startswith(prefix)}


def _is_hugging_face(names: Iterable[str]) -> bool:
    return any(name.endswith("embeddings.patch_embedding.weight") for name in names)


def _from_hugging_face(names: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    tower: dict[str, tuple[str, ...]] = {}
    attention: dict[str, dict[str, str]] = {}
    for name, source in names.items():
        if name.endswith("position_ids"):  # 0, 1, 2, ..., which older releases saved
            continue
        for hugging_face, open_clip in _HF_NAMES.items():
            name = name.replace(hugging_face, open_clip)
        block, is_attention, rest = name.partition("self_attn.")
        if is_attention:
            letter, _, kind = rest.partition("_proj.")
            attention.setdefault(f"{block}attn.in_proj_{kind}", {})[letter] = source
        else:
            tower[name] = (source,)
    for name, projections in attention.items():
        if projections.keys() != {"q", "k", "v"}:
            raise InputError(f"the checkpoint lacks one of the q, k, v projections of {name}")
        tower[name] = tuple(projections[letter] for letter in "qkv")
    return tower


def check_state(state: Mapping[str, Tensor], expected: dict[str, torch.Size], where: str, arch: str) -> None:
    """Raise `InputError`, naming the first key that differs, unless names and shapes are as expected and all finite."""
    not_finite = None
    for name, shape in expected.items():
        if name not in state:
            problem = f"lacks the key {name!r}"
        elif (tensor := state[name]).shape != shape:
            problem = f"has {name!r} of shape {tuple(tensor.shape)} instead of {tuple(shape)}"
        elif tensor.is_complex() or (name.endswith(("weight", "bias")) and not tensor.is_floating_point()):
            problem = f"has {name!r} in {str(tensor.dtype).removeprefix('torch.')}, and not in real numbers"
        else:
            not_finite = not_finite or (None if tensor.isfinite().all() else name)
            continue
        raise InputError(f"{where} {problem}: it is not a checkpoint of {arch}; it looks like {describe(state)}")
    extra = next((name for name in state if name not in expected), None)
    if extra is not None:
        raise InputError(f"{where} has a key {extra!r} that {arch} does not have; it looks like {describe(state)}")
    if not_finite is not None:
        raise InputError(f"{where}: {not_finite!r} holds NaN or infinite weights")


def describe(state: Mapping[str, Tensor]) -> str:
    """A few words on which model a state dict belongs to, for errors."""
    conv = next((t for n, t in state.items() if n.endswith(("conv1.weight", "patch_embedding.weight"))), None)
    blocks = {int(m.group(1)) for n in state if (m := re.search(r"(?:resblocks|encoder\.layers)\.(\d+)\.", n))}
    if conv is not None and conv.ndim == 4 and blocks:
        proj = state.get("proj")
        d = f", d = {proj.shape[1]}" if proj is not None and proj.ndim == 2 else ", without a visual projection"
        return f"a CLIP ViT of width {conv.shape[0]}, patch {conv.shape[-1]}, {max(blocks) + 1} blocks{d}"
    if any("layer1." in name for name in state):
        return "a ResNet"
    if "weight" in state and state.keys() <= {"weight", "bias"}:
        return f"a classification head {tuple(state['weight'].shape)}"
    names = list(state)
    return f"tensors named {', '.join(map(repr, names[:3]))}{', ...' if len(names) > 3 else ''}"
