"""LoRA adapters as experts: peft merges them into the weights of their base.

An adapter's folder has `adapter_config.json` and `adapter_model.safetensors` (or .bin), as `save_pretrained` of peft
writes them. It may have been trained on any class of the base (with or without a task's head), so its modules are found
by the ends of their names. What it replaces outright (biases, `modules_to_save`) is taken where the tower has it, and
a head beside the tower is left out.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from probsurgery.pipeline.errors import InputError, first_line
from probsurgery.pipeline.files import MalformedError, read_json
from probsurgery.pipeline.hub import ADAPTER_CONFIG
from probsurgery.pipeline.models.encoders import MAX_CONFIG_BYTES
from probsurgery.pipeline.models.transformers_encoder import BESIDE, TransformersEncoder

_PREFIX = re.compile(r"^(?:base_model\.model\.)?")
_TAKEN = ("r", "lora_alpha", "use_rslora", "use_dora", "fan_in_fan_out", "lora_bias")
"""Settings that say what is added to the weights; each other one has no effect after training, or is refused."""
_REFUSED = (
    *("alora_invocation_tokens", "arrow_config", "layer_replication", "megatron_config", "target_parameters"),
    *("trainable_token_indices", "use_bdlora", "use_qalora"),
)
_PATTERNS = {"r": "rank_pattern", "lora_alpha": "alpha_pattern"}
"""Settings of which modules may have their own value, and where."""
_OTHER_BASE = re.compile(r"pissa|olora|loftq|corda|lora_ga")
"""Initialisations that change the base, so that the adapter fits no published one."""


def merged_adapter(
    folder: Path, tensors: Mapping[str, Tensor], base: Mapping[str, Tensor], encoder: TransformersEncoder
) -> dict[str, Tensor]:
    """The base with an adapter merged into it: the tower's state dict in float32. `base` is not changed.

    Raises `InputError` for another kind of adapter, one of another base (by the first tensor that does not fit), and
    one that changes nothing of the tower.
    """
    config = _read_config(folder)
    own = {encoder.checkpoint_name(name): name for name in encoder.empty().state_dict()}
    modules: dict[str, str] = {}
    added: dict[str, Tensor] = {}
    state = {name: base[name].clone() for name in encoder.shapes}
    for key, tensor in tensors.items():
        module, lora, part = _PREFIX.sub("", key).replace(".base_layer.", ".").partition(".lora_")
        published = _published(module + (".weight" if lora else ""), encoder)
        if not tensor.isfinite().all():
            raise InputError(f"the adapter {folder} holds NaN or infinite values in {key!r}")
        if published is None:
            if BESIDE.search(module):
                continue
            raise InputError(
                f"{folder} is an adapter of another base: it changes {module!r}, which {encoder.name} lacks"
            )
        if lora:
            name = own[published].removesuffix(".weight")
            modules[name] = module
            added[f"{name}.lora_{part}"] = tensor.float()
        elif tensor.shape != state[published].shape:
            raise _misfit(folder, key, tensor, state[published], encoder)
        else:
            state[published] = tensor.float()
    if not added and all(torch.equal(state[name], base[name]) for name in state):
        raise InputError(f"{folder} is an adapter that changes nothing of the image tower of {encoder.name}")
    return _merged(folder, config, encoder, state, modules, added)


def _merged(
    folder: Path,
    config: Mapping[str, Any],
    encoder: TransformersEncoder,
    state: dict[str, Tensor],
    modules: Mapping[str, str],
    added: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """The weights with the adapter's tensors merged. `modules` are the tower's, with their names in the adapter."""
    peft = _require_peft()
    tower = encoder.build(state)
    ranks, alphas = ({name: _value(config, key, own) for name, own in modules.items()} for key in ("r", "lora_alpha"))
    try:
        settings = peft.LoraConfig(
            **{name: config[name] for name in _TAKEN if config.get(name) is not None},
            target_modules=list(modules),
            rank_pattern={re.escape(name): rank for name, rank in ranks.items()},
            alpha_pattern={re.escape(name): alpha for name, alpha in alphas.items()},
        )
        peft.inject_adapter_in_model(settings, tower)
        places = peft.get_peft_model_state_dict(tower)
        for key in sorted(places.keys() | added.keys()):  # peft's own error lists every tensor at once
            if key not in added:
                raise InputError(f"the adapter {folder} is damaged: it lacks {key!r}")
            if key not in places or places[key].shape != added[key].shape:
                raise _misfit(folder, key, added[key], places.get(key), encoder)
        peft.set_peft_model_state_dict(tower, dict(added))
        for module in tower.modules():
            if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer):
                module.merge(safe_merge=True)
    except InputError:
        raise
    except Exception as error:  # peft raises anything for settings that do not go together
        raise InputError(f"the adapter {folder} cannot be merged by peft: {first_line(error)}") from None
    weights = {name.replace(".base_layer.", "."): tensor for name, tensor in tower.state_dict().items()}
    return {encoder.checkpoint_name(name): tensor for name, tensor in weights.items() if ".lora_" not in name}


def _read_config(folder: Path) -> dict[str, Any]:
    """The adapter's settings. Raises `InputError` for those of another method, or of one that is not merged here."""
    path = folder / ADAPTER_CONFIG
    try:
        config = read_json(path, MAX_CONFIG_BYTES)
    except FileNotFoundError:
        raise InputError(
            f"{folder} holds the weights of an adapter without {ADAPTER_CONFIG}; give the folder that peft saved"
        ) from None
    except (OSError, MalformedError) as error:
        raise InputError(f"{path} cannot be read: {first_line(error)}") from None
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != "LORA":
        raise InputError(
            f"{path} is of an adapter of type {str(kind)[:80]}; LORA is merged here, others by their own tools"
        )
    refused = next((name for name in _REFUSED if config.get(name)), None)
    start = str(config.get("init_lora_weights"))
    if refused or _OTHER_BASE.match(start):
        what = f"has {refused}" if refused else f"began with {start[:40]}, which changes its base"
        raise InputError(f"{path} {what}; merge it with peft's merge_and_unload(), and give the model that this saves")
    for key, kinds in (("r", int), ("lora_alpha", (int, float))):
        pattern = config.get(_PATTERNS[key]) or {}
        values = [config.get(key), *(pattern.values() if isinstance(pattern, dict) else [pattern])]
        wrong = next((v for v in values if isinstance(v, bool) or not isinstance(v, kinds) or not 0 < v < 1e9), None)
        if wrong is not None or None in values:
            raise InputError(f"{path} has a {key} of {str(wrong)[:40]!r}; it must be a number above 0")
    return config


def _published(name: str, encoder: TransformersEncoder) -> str | None:
    """The tower's tensor that a name of a larger model ends with, as checkpoints call it."""
    parts = name.split(".")
    ends = (encoder.checkpoint_name(".".join(parts[first:])) for first in range(len(parts)))
    return next((end for end in ends if end in encoder.shapes), None)


def _value(config: Mapping[str, Any], key: str, module: str) -> Any:
    """A setting of a module of the model that was trained: the module's own, if it has one."""
    from peft.utils.other import get_pattern_key

    patterns = config.get(_PATTERNS[key]) or {}
    return patterns.get(get_pattern_key(list(patterns), module), config[key])


def _misfit(folder: Path, key: str, given: Tensor, expected: Tensor | None, encoder: TransformersEncoder) -> InputError:
    """The error of a tensor that does not fit the base."""
    shape = "no such tensor" if expected is None else f"shape {tuple(expected.shape)}"
    problem = f"{key!r} has shape {tuple(given.shape)}, and {encoder.name} takes {shape}"
    return InputError(f"{folder} is an adapter of another base: {problem}")


def _require_peft() -> Any:
    try:
        import peft
    except ImportError:
        raise InputError("adapters need peft; install it with `pip install 'probsurgery[adapters]'`") from None
    return peft
