"""The table of merging methods, and `merge`, which applies one to a pre-trained state dict and those of the experts.

Each family of methods has a module of its own. Methods that learn take an `ImageStream`: the encoder as a function, and
batches of images. They depend on no encoder and no data set.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from probsurgery.pipeline.config import PLAIN_NUMBER, SPLITS, number_text
from probsurgery.pipeline.errors import InputError, unknown
from probsurgery.pipeline.merging.adamerging import adamerging
from probsurgery.pipeline.merging.arithmetic import task_arithmetic, weight_averaging
from probsurgery.pipeline.merging.coefficients import Coefficients
from probsurgery.pipeline.merging.concrete import concrete_am, concrete_ta
from probsurgery.pipeline.merging.fisher import fisher
from probsurgery.pipeline.merging.regmean import regmean
from probsurgery.pipeline.merging.sparse import breadcrumbs, dare, ties
from probsurgery.pipeline.merging.vectors import ImageStream, Merged

Value = float | int | bool | str


@dataclass(frozen=True)
class Setting:
    """One setting of a merging method."""

    default: Value
    description: str
    low: float = -math.inf
    high: float = math.inf
    choices: tuple[str, ...] = ()

    def check(self, name: str, value: object) -> Value:
        """The value in the default's type, parsed if it is text. Raises `InputError` if it is not allowed."""
        kind: type[Value] = type(self.default)
        with suppress(ValueError, KeyError):
            if isinstance(value, str) and kind is bool:
                value = {"true": True, "false": False}[value.lower()]
            elif isinstance(value, str):
                value = kind(value) if kind is str or PLAIN_NUMBER.fullmatch(value) else value
            elif kind is float and type(value) is int:
                value = kind(value)
        span = "" if math.isinf(self.low) else f" from {number_text(self.low)}"
        span += "" if math.isinf(self.high) else f" to {number_text(self.high)}"
        allowed = {bool: "true or false", int: f"a whole number{span}", float: f"a number{span}"}
        if (
            type(value) is not kind
            or (self.choices and value not in self.choices)
            or (isinstance(value, int | float) and not (self.low <= value <= self.high and math.isfinite(value)))
        ):
            expected = " or ".join(self.choices) if self.choices else allowed.get(kind, "text")
            raise InputError(f"the setting {name} is {str(value)[:80]!r}; it must be {expected}")
        return value


@dataclass(frozen=True)
class Method:
    """One row of the table of merging methods."""

    title: str
    paper: str
    function: Callable[..., Merged] | None
    """None if there is nothing to merge: a checkpoint of the method's name is used."""
    settings: dict[str, Setting] = field(default_factory=dict)
    learns: bool = False
    """Whether it learns from images."""
    classifies: bool = True
    """Whether, if it learns, it does so from predictions, which need a classifier of each task."""

    @property
    def takes_coefficients(self) -> bool:
        """Whether coefficients can be given instead of learned."""
        return getattr(self.function, "func", None) is adamerging

    @property
    def is_layerwise(self) -> bool:
        """Whether it has a coefficient for each tensor of a task, and not one for each task."""
        return bool(getattr(self.function, "keywords", {}).get("layerwise"))

    def checked(self, method: str, given: Mapping[str, object]) -> dict[str, Value]:
        """All settings, given or default. Raises `InputError` for an unknown one, or a value that is not allowed."""
        for name in given:
            if name not in self.settings:
                raise unknown(f"setting of {method}", name, self.settings or ["(it has none)"])
        return {n: s.check(n, given[n]) if n in given else s.default for n, s in self.settings.items()}


def changed(method: str, settings: Mapping[str, object]) -> dict[str, str]:
    """The settings that differ from a method's defaults, as text for names and tables."""
    known = METHODS[method].settings if method in METHODS else {}
    return {
        key.replace("_", "-"): number_text(value) if isinstance(value, float) else str(value)
        for key, value in settings.items()
        if key not in known or value != known[key].default
    }


_SCALE = {"scale": Setting(0.3, "factor of the summed task vectors")}
_KEEP = {"keep": Setting(0.2, "share of each task vector that is kept, the largest entries", 1e-9, 1)}
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
_CONCRETE = "Tang et al., 2023, arxiv.org/abs/2312.06173"
_TASK_WISE, _LAYER_WISE = (partial(adamerging, layerwise=layerwise) for layerwise in (False, True))
_COEFFICIENTS = _INITIAL | _adam(500)
_PROCESSED = _KEEP | _COEFFICIENTS
_DARE = {**_SCALE, "drop": Setting(0.9, "probability that an entry is dropped", 0, 0.9999), "seed": _SEED}
_BREADCRUMBS = {
    **_SCALE,
    "small": Setting(0.85, "share of each tensor's smallest entries to drop", 0, 1),
    "large": Setting(0.01, "share of each tensor's largest entries to drop", 0, 1),
}
_FISHER = {
    **_images(256),
    "labels": Setting(False, "true labels instead of the expert's own predictions"),
    "normalise": Setting(True, "scale each expert's Fisher information to norm 1"),
    "floor": Setting(1e-6, "minimum Fisher information, relative to its mean", 0, 1),
}
_REGMEAN = {**_images(256), "off_diagonal": Setting(0.9, "factor of the Gram matrices' off-diagonal entries", 0, 1)}

METHODS: dict[str, Method] = {
    "wa": Method("weight averaging", "Wortsman et al., ICML 2022, arxiv.org/abs/2203.05482", weight_averaging),
    "ta": Method("task arithmetic", "Ilharco et al., ICLR 2023, arxiv.org/abs/2212.04089", task_arithmetic, _SCALE),
    "ties": Method("TIES-Merging", "Yadav et al., NeurIPS 2023, arxiv.org/abs/2306.01708", ties, _SCALE | _KEEP),
    "dare": Method("DARE, then task arithmetic", "Yu et al., ICML 2024, arxiv.org/abs/2311.03099", dare, _DARE),
    "breadcrumbs": Method(
        "Model Breadcrumbs", "Davari and Belilovsky, ECCV 2024, arxiv.org/abs/2312.06795", breadcrumbs, _BREADCRUMBS
    ),
    "fisher": Method(
        "Fisher merging", "Matena and Raffel, NeurIPS 2022, arxiv.org/abs/2111.09832", fisher, _FISHER, learns=True
    ),
    "regmean": Method(
        "RegMean", "Jin et al., ICLR 2023, arxiv.org/abs/2212.09849", regmean, _REGMEAN, learns=True, classifies=False
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
    "traditional-mtl": Method("multi-task learning: one encoder fine-tuned on all tasks", "Surgery, Tab. 1", None),
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
    **settings: Value,
) -> Merged:
    """Merge by a method of `METHODS`; `settings` replace its defaults. Returns float32 tensors on the CPU.

    `experts` are state dicts by task, or a sequence of them. Methods that learn need a `stream` of images; AdaMerging
    takes `coefficients` instead. Raises `InputError` for an unknown method or setting, or if the state dicts do not
    have the same keys.
    """
    if method not in METHODS:
        raise unknown("merge", method, METHODS)
    row = METHODS[method]
    if row.function is None:
        raise InputError(f"{method} is a checkpoint, not a merge of experts; choose another method")
    if not isinstance(experts, Mapping):
        experts = {str(index): expert for index, expert in enumerate(experts)}
    if not experts:
        raise InputError("no expert was given to merge; give one or more")
    settings = row.checked(method, settings)
    if coefficients is not None and not row.takes_coefficients:
        raise InputError(f"{method} takes no coefficients; AdaMerging's methods do")
    if row.learns and stream is None and coefficients is None:
        raise InputError(f"{method} learns from images; give it a stream")
    inputs = [stream, coefficients] if row.takes_coefficients else [stream] if row.learns else []
    with torch.set_grad_enabled(row.learns):
        return row.function(pretrained, experts, *inputs, **settings)
