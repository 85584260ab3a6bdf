"""The table of merging methods, and `merge`, which applies one to a pre-trained state dict and those of the experts.

Each family of methods has a module of its own. Methods that learn take an `ImageStream`: the encoder as a function, and
batches of images. They depend on no encoder and no data set. A follower is a method that changes the model which the
methods before it have merged: `ta+svc` is task arithmetic, then singular value calibration.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from probsurgery.pipeline.config import SPLITS, number_text
from probsurgery.pipeline.errors import InputError, nearest, unknown
from probsurgery.pipeline.merging.adamerging import adamerging
from probsurgery.pipeline.merging.adarank import adarank
from probsurgery.pipeline.merging.arithmetic import task_arithmetic, weight_averaging
from probsurgery.pipeline.merging.coefficients import Coefficients
from probsurgery.pipeline.merging.concrete import concrete_am, concrete_ta
from probsurgery.pipeline.merging.consensus import consensus_ta
from probsurgery.pipeline.merging.featcal import featcal
from probsurgery.pipeline.merging.fisher import fisher
from probsurgery.pipeline.merging.method import Method, Setting, Value
from probsurgery.pipeline.merging.regmean import regmean, regmean_plus_plus
from probsurgery.pipeline.merging.rescale import rescale
from probsurgery.pipeline.merging.sparse import COUNTED, breadcrumbs, dare, ties
from probsurgery.pipeline.merging.spectral import iso_c, iso_cts, svc, tsv_m, wudi
from probsurgery.pipeline.merging.vectors import ImageStream, Machine, Merged

_SCALE = {"scale": Setting(0.3, "factor of the summed task vectors")}
_COUNTED = "entries that `keep` is a share of: the tower's, or with a published checkpoint's text tensors"
_KEEP = {
    "keep": Setting(0.2, "share of each task vector that is kept, the largest entries", 1e-9, 1),
    "counted": Setting("tower", _COUNTED, choices=COUNTED, is_later=True),
}
_INITIAL = {"initial": Setting(0.3, "initial value of the coefficients", 0, 1)}
_TEMPERATURE = {"temperature": Setting(0.5, "temperature of the mask's Gumbel-sigmoid", 1e-3, 1e3)}
_SEED = Setting(0, "random seed", 0, 2**31 - 1)
_SPLIT = Setting("test", "split of the images that it learns from", choices=SPLITS)


def _adam(steps: int) -> dict[str, Setting]:
    return {
        "steps": Setting(steps, "Adam steps, each on a batch of every task", 1, 10_000_000),
        "lr": Setting(1e-3, "Adam's learning rate", 1e-9, 10),
        "batch_size": Setting(16, "images of each task in a batch", 1, 65_536),
        "split": _SPLIT,
        "seed": _SEED,
    }


def _images(count: int) -> dict[str, Setting]:
    return {"images": Setting(count, "images of each task", 1, 10_000_000), "split": _SPLIT, "seed": _SEED}


_ADA = "Yang et al., ICLR 2024, arxiv.org/abs/2310.02575"
_ISO = "Marczak et al., ICML 2025, arxiv.org/abs/2502.04959"
_CONCRETE = "Tang et al., 2023, arxiv.org/abs/2312.06173"
_TASK_WISE, _LAYER_WISE = (partial(adamerging, layerwise=layerwise) for layerwise in (False, True))
_COEFFICIENTS = _INITIAL | _adam(500)
_PROCESSED = _KEEP | _COEFFICIENTS
_DARE = {**_SCALE, "drop": Setting(0.9, "probability that an entry is dropped", 0, 0.9999), "seed": _SEED}
_BREADCRUMBS = {
    **_SCALE,
    "small": Setting(0.85, "share of each tensor's smallest entries to drop", 0, 1),
    "large": Setting(0.01, "share of each tensor's largest entries to drop", 0, 1),
    "rows": Setting(False, "take the shares of each row, as the authors' code does", is_later=True),
}
_FISHER = {
    **_images(256),
    "labels": Setting(False, "true labels instead of the expert's own predictions"),
    "normalise": Setting(True, "scale each expert's Fisher information to norm 1"),
    "floor": Setting(1e-6, "minimum Fisher information, relative to its mean", 0, 1),
}
_QKV = {"qkv": Setting("stacked", "q, k and v as one matrix, or each for itself", choices=("stacked", "apart"))}
_SPECTRAL = {"scale": Setting(1.0, "factor of the merged task vector"), **_QKV}
_COMMON = {"common": Setting(0.8, "share of the directions that stay those of the summed task vectors", 0, 1)}
_WUDI = {
    "keep": Setting(0.0, "share of the eigenvectors that are kept; 0: as many as they are worth (ASWUDI)", 0, 1),
    "time": Setting(0.0, "time of SWUDI's filter (1300 with keep=0.65 in the paper); 0: no filter", 0, 1e9),
}
_CONSENSUS = {
    **_SCALE,
    "threshold": Setting(0.4, "size from which a task uses an entry, relative to all other tasks' sum", 0, 1e3),
    "least": Setting(2, "number of tasks that must use an entry", 1, 1000),
}
_BY = ("distance", "entropy")
_SVC = {"alpha": Setting(0.0, "least that a task counts along a singular vector; 0: 1 / number of tasks", 0, 1), **_QKV}
_RESCALE = {
    "by": Setting("distance", "what is least: distance to experts' features, or entropy", choices=_BY),
    **_images(64),
}
_REGMEAN = {**_images(256), "off_diagonal": Setting(0.9, "factor of the Gram matrices' off-diagonal entries", 0, 1)}
_FEATCAL = {
    **_images(256),
    "split": Setting("train", _SPLIT.description, choices=SPLITS),
    "ridge": Setting(0.05, "weight of the anchor (lambda)", 1e-8, 1e8),
    "anchor": Setting(2.2, "the anchor is this times the merged weights, the rest pre-trained (rho)", -100, 100),
    "blend": Setting(0.25, "share of the expert's inputs in those of the targets (alpha)", 0, 1),
    "outside": Setting(False, "refit the layers outside the blocks too: layer norms, the projection"),
}

METHODS: dict[str, Method] = {
    "wa": Method("weight averaging", "Wortsman et al., ICML 2022, arxiv.org/abs/2203.05482", weight_averaging),
    "ta": Method("task arithmetic", "Ilharco et al., ICLR 2023, arxiv.org/abs/2212.04089", task_arithmetic, _SCALE),
    "ties": Method("TIES-Merging", "Yadav et al., NeurIPS 2023, arxiv.org/abs/2306.01708", ties, _SCALE | _KEEP),
    "dare": Method("DARE, then task arithmetic", "Yu et al., ICML 2024, arxiv.org/abs/2311.03099", dare, _DARE),
    "breadcrumbs": Method(
        "Model Breadcrumbs", "Davari and Belilovsky, ECCV 2024, arxiv.org/abs/2312.06795", breadcrumbs, _BREADCRUMBS
    ),
    "consensus-ta": Method(
        "task arithmetic on entries that several tasks use",
        "Wang et al., ICML 2024, arxiv.org/abs/2405.07813",
        consensus_ta,
        _CONSENSUS,
    ),
    "tsv-m": Method(
        "task singular vectors", "Gargiulo et al., CVPR 2025, arxiv.org/abs/2412.00081", tsv_m, _SPECTRAL, computes=True
    ),
    "iso-c": Method("isotropic merging in the common subspace", _ISO, iso_c, _SPECTRAL, computes=True),
    "iso-cts": Method(
        "isotropic merging in common and task-specific subspaces", _ISO, iso_cts, _SPECTRAL | _COMMON, computes=True
    ),
    "wudi": Method(
        "WUDI-Merging in closed form",
        "Cheng et al., ICML 2025, arxiv.org/abs/2503.08099; closed form: arxiv.org/abs/2606.07289",
        wudi,
        _SPECTRAL | _WUDI,
        computes=True,
    ),
    "fisher": Method(
        "Fisher merging", "Matena and Raffel, NeurIPS 2022, arxiv.org/abs/2111.09832", fisher, _FISHER, learns=True
    ),
    "regmean": Method(
        "RegMean", "Jin et al., ICLR 2023, arxiv.org/abs/2212.09849", regmean, _REGMEAN, learns=True, classifies=False
    ),
    "regmean++": Method(
        "RegMean, block by block",
        "Nguyen et al., 2025, arxiv.org/abs/2508.03121",
        regmean_plus_plus,
        _REGMEAN,
        learns=True,
        classifies=False,
    ),
    "tw-adamerging": Method("task-wise AdaMerging", _ADA, _TASK_WISE, _COEFFICIENTS, learns=True),
    "lw-adamerging": Method("layer-wise AdaMerging", _ADA, _LAYER_WISE, _COEFFICIENTS, learns=True),
    "tw-adamerging++": Method("task-wise AdaMerging of TIES vectors", _ADA, _TASK_WISE, _PROCESSED, learns=True),
    "lw-adamerging++": Method("layer-wise AdaMerging of TIES vectors", _ADA, _LAYER_WISE, _PROCESSED, learns=True),
    "concrete-ta": Method(
        "Concrete task arithmetic", _CONCRETE, concrete_ta, _SCALE | _TEMPERATURE | _adam(2000), learns=True
    ),
    "concrete-am": Method(
        "Concrete layer-wise AdaMerging", _CONCRETE, concrete_am, _INITIAL | _TEMPERATURE | _adam(1000), learns=True
    ),
    "adarank": Method(
        "AdaRank", "Lee et al., ICLR 2026, arxiv.org/abs/2503.22178", adarank, _COEFFICIENTS, learns=True
    ),
    "svc": Method(
        "singular value calibration",
        "Li et al., ICML 2026, arxiv.org/abs/2602.05536",
        svc,
        _SVC,
        computes=True,
        follows=True,
    ),
    "rescale": Method(
        "factor of a merge's update, chosen on unlabelled images",
        "ours",
        rescale,
        _RESCALE,
        learns=True,
        classifies=False,
        follows=True,
    ),
    "featcal": Method(
        "feature calibration",
        "Gu et al., 2026, arxiv.org/abs/2605.13030",
        featcal,
        _FEATCAL,
        learns=True,
        classifies=False,
        follows=True,
    ),
    "traditional-mtl": Method("multi-task learning: one encoder fine-tuned on all tasks", "Surgery, Tab. 1", None),
}


FOLLOWERS = tuple(name for name, row in METHODS.items() if row.follows)


@dataclass(frozen=True)
class Chain:
    """What the name of a merge stands for: a method, and the followers behind its plus signs, in order.

    A setting of the first method is recorded under its own name, one of a follower as `<follower>.<setting>`.
    """

    parts: tuple[tuple[str, Method], ...]

    @property
    def first(self) -> str:
        """The method that merges the experts."""
        return self.parts[0][0]

    @property
    def settings(self) -> dict[str, Setting]:
        """The settings of all parts, by the names that they are recorded under."""
        return {recorded: METHODS[part].settings[key] for part, key, recorded in self._keys()}

    @property
    def is_checkpoint(self) -> bool:
        """Whether a checkpoint of the method's name is used, and nothing is merged."""
        return self.parts[0][1].function is None

    @property
    def learns(self) -> bool:
        """Whether any part learns from images."""
        return any(row.learns for _, row in self.parts)

    @property
    def varies(self) -> bool:
        """Whether the result depends on the machine even if nothing is learned."""
        return any(row.computes for _, row in self.parts)

    @property
    def classifies(self) -> bool:
        """Whether any part learns from predictions, which need a classifier of each task."""
        return any(row.learns and row.classifies for _, row in self.parts)

    @property
    def takes_coefficients(self) -> bool:
        """Whether coefficients, if given, leave nothing to be learned."""
        return self.parts[0][1].takes_coefficients and not any(row.learns for _, row in self.parts[1:])

    def meant(self, key: str) -> list[str]:
        """The recorded names that a key addresses: `seed` of every part that has it, `svc.seed` of this part alone."""
        part, dot, plain = key.replace("-", "_").rpartition(".")
        return [r for name, own, r in self._keys() if own == plain and (not dot or part == name.replace("-", "_"))]

    def addressed(self, given: Mapping[str, object]) -> dict[str, object]:
        """Values by recorded name. A key that names a part wins over one that does not.

        Raises `InputError` for a key that addresses nothing.
        """
        values: dict[str, object] = {}
        for key in sorted(given, key=lambda key: "." in key):
            if not self.meant(key):
                name = "+".join(part for part, _ in self.parts)
                raise unknown(f"setting of {name}", key, self.settings or ["(it has none)"])
            values |= dict.fromkeys(self.meant(key), given[key])
        return values

    def own(self, part: str, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Those of the recorded settings that are a part's, by its own names for them."""
        return {
            key: settings[recorded] for name, key, recorded in self._keys() if name == part and recorded in settings
        }

    def checked(self, given: Mapping[str, object]) -> dict[str, Value]:
        """All settings, given or default, by recorded name. Raises `InputError` as `Method.checked` does."""
        values = self.addressed(given)
        own = {part: row.checked(part, self.own(part, values)) for part, row in self.parts}
        return {recorded: own[part][key] for part, key, recorded in self._keys()}

    def recorded(self, settings: Mapping[str, Value]) -> dict[str, Value]:
        """Settings as caches record them: without those that came later and have their default."""
        known = self.settings
        return {key: v for key, v in settings.items() if not (known[key].is_later and v == known[key].default)}

    def _keys(self) -> Iterator[tuple[str, str, str]]:
        """Every setting: its part, its name there, and the name that it is recorded under."""
        for part, row in self.parts:
            yield from ((part, key, f"{part}.{key}" if row.follows else key) for key in row.settings)


def find_merge(name: str, *others: str) -> Chain:
    """The methods that a name chains by plus signs. `others` are further names that the error for an unknown one lists.

    Names of methods hold plus signs too: the longest that fits is meant. Raises `InputError` for a name that is not
    known, a follower that follows nothing, or one that is named twice.
    """
    by_length = sorted(METHODS, key=len, reverse=True)
    parts: list[str] = []
    rest: str | None = name
    while rest is not None:
        part = next((m for m in by_length if rest == m or rest.startswith(f"{m}+")), None)
        if part is None and not parts:
            first, _, last = name.rpartition("+")
            if last in FOLLOWERS and Path(first).suffix:
                raise InputError(f"{first} is a merged checkpoint, and nothing can follow it; leave +{last} out")
            raise unknown("merge", name, [*(m for m in METHODS if m not in FOLLOWERS), *others])
        before = "+".join(parts)
        allowed = f"behind {before}+ can stand: {', '.join(FOLLOWERS)}"
        if part is None:
            near = nearest(name, [*METHODS, *(f"{before}+{follower}" for follower in FOLLOWERS)])
            raise InputError(f"unknown merge {name!r}{near}; {allowed}")
        if part in FOLLOWERS and not parts:
            raise InputError(f"{part} changes a merged model; write it behind a merge, as in ta+{part}")
        if parts and (part not in FOLLOWERS or part in parts):
            problem = "is there twice" if part in parts else "merges experts, and no merged model"
            raise InputError(f"{name}: {part} {problem}; {allowed}, once each")
        if parts and METHODS[parts[0]].function is None:
            raise InputError(f"{name}: {parts[0]} is a checkpoint, not a merge of experts, and nothing can follow it")
        parts.append(part)
        rest = rest[len(part) + 1 :] if len(rest) > len(part) else None
    return Chain(tuple((part, METHODS[part]) for part in parts))


def is_merge(name: str) -> bool:
    """Whether a name is that of a method, or of a method with followers."""
    with suppress(InputError):
        return bool(find_merge(name).parts)
    return False


def changed(method: str, settings: Mapping[str, object]) -> dict[str, str]:
    """The settings that differ from a merge's defaults, as text for names and tables."""
    known = find_merge(method).settings if is_merge(method) else {}
    return {
        key.replace("_", "-"): number_text(value) if isinstance(value, float) else str(value)
        for key, value in settings.items()
        if key not in known or value != known[key].default
    }


def merge_label(method: str, settings: Mapping[str, object], name: str | None = None) -> str:
    """A merge's label in tables: its name, by default the method's, and the settings that differ from the defaults."""
    differing = ", ".join(f"{key}={value}" for key, value in changed(method, settings).items())
    return (name or method) + (f" ({differing})" if differing else "")


def merge(
    method: str,
    pretrained: Mapping[str, Tensor],
    experts: Mapping[str, Mapping[str, Tensor]] | Iterable[Mapping[str, Tensor]],
    stream: ImageStream | None = None,
    coefficients: Coefficients | None = None,
    machine: Machine | None = None,
    **settings: Value,
) -> Merged:
    """Merge by a method of `METHODS`, or by one and followers (`ta+svc`); `settings` replace their defaults.

    Returns float32 tensors on the CPU. `experts` are state dicts by task, or a sequence of them. Methods that learn
    need a `stream` of images; AdaMerging takes `coefficients` instead. Merges by singular vectors compute on the
    `machine`, by default the CPU. A setting goes to every part that has it; `**{"svc.alpha": 1.0}` sets that of one
    part. Raises `InputError` for an unknown method or setting, or if the state dicts do not have the same keys.
    """
    chain = find_merge(method)
    if chain.is_checkpoint:
        raise InputError(f"{method} is a checkpoint, not a merge of experts; choose another method")
    if not isinstance(experts, Mapping):
        experts = {str(index): expert for index, expert in enumerate(experts)}
    if not experts:
        raise InputError("no expert was given to merge; give one or more")
    settings = chain.checked(settings)
    if coefficients is not None and not chain.takes_coefficients:
        raise InputError(f"{method} takes no coefficients; AdaMerging's methods do, without followers that learn")
    if chain.learns and stream is None and coefficients is None:
        raise InputError(f"{method} learns from images; give it a stream")
    merged = Merged({})
    for name, row in chain.parts:
        assert row.function is not None, "a checkpoint has no followers"
        inputs: list[Any] = [merged.state] if row.follows else []
        inputs += [machine or Machine()] if row.computes else []
        inputs += [stream, coefficients] if row.takes_coefficients else [stream] if row.learns else []
        with torch.set_grad_enabled(row.learns):
            made = row.function(pretrained, experts, *inputs, **chain.own(name, settings))
        merged = replace(
            made,
            entropy=merged.entropy + made.entropy,
            coefficients=made.coefficients or merged.coefficients,
            chosen={**merged.chosen, **{f"{name}.{key}": value for key, value in made.chosen.items()}},
        )
    return merged
