"""The heads: what each computes, how it starts, and the frozen object that a fit returns.

A head's parameters are a dictionary of tensors whose first dimension is the stack: K heads are trained, kept and
applied as one. A single head is a stack of one.

Shapes: K heads, B rows, d dimensions, r rank, h hidden width.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from probsurgery.pipeline.config import HEAD_SETTINGS, HeadSettings, head_settings
from probsurgery.pipeline.errors import InputError, ProbsurgeryError, first_line
from probsurgery.pipeline.files import refuse_links

Params = dict[str, Tensor]
SCHEMA = 1
_MOST_BYTES = 2**28
"""Of head.json."""
_MOST_HEADER = 2**20
"""Of head.safetensors."""


def _linear(x: Float[Tensor, "K B i"], weight: Float[Tensor, "K o i"]) -> Float[Tensor, "K B o"]:
    return torch.bmm(x, weight.mT)


def _kaiming(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Kaiming-uniform with a = sqrt(5), which is U(-1/sqrt(inputs), 1/sqrt(inputs))."""
    bound = 1 / math.sqrt(shape[1])
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def surgery_correction(params: Params, z: Float[Tensor, "K B d"]) -> Float[Tensor, "K B d"]:
    """``W_up relu(W_down z)``; down: (K, r, d), up: (K, d, r), no biases (Surgery, eq. 2)."""
    return _linear(_linear(z, params["down"]).relu(), params["up"])


def prob_distribution(
    params: Params, z: Float[Tensor, "K B d"]
) -> tuple[Float[Tensor, "K B d"], Float[Tensor, "K B d"]]:
    """Mean and log-variance of the correction, from one bottleneck ``u = relu(W_h z)`` (ProbSurgery).

    hidden: (K, h, d), mu and log_var: (K, d, h), no biases. The public code calls the compressing map `up_proj`.
    """
    u = _linear(z, params["hidden"]).relu()
    return _linear(u, params["mu"]), _linear(u, params["log_var"])


def prob_correction(params: Params, z: Float[Tensor, "K B d"]) -> Float[Tensor, "K B d"]:
    """What inference subtracts: the mean alone."""
    return _linear(_linear(z, params["hidden"]).relu(), params["mu"])


def ridge_correction(params: Params, z: Float[Tensor, "K B d"]) -> Float[Tensor, "K B d"]:
    """``z - (W z + b)``, so that subtracting it leaves the prediction; weight: (K, d, d), bias: (K, d)."""
    return z - _linear(z, params["weight"]) - params["bias"].unsqueeze(1)


def _init_surgery(settings: HeadSettings, d: int, generator: torch.Generator) -> Params:
    return {"down": _kaiming((settings.rank, d), generator), "up": torch.zeros(d, settings.rank)}


def _init_prob(settings: HeadSettings, d: int, generator: torch.Generator) -> Params:
    h = settings.hidden
    return {"hidden": _kaiming((h, d), generator), "mu": torch.zeros(d, h), "log_var": torch.zeros(d, h)}


@dataclass(frozen=True)
class HeadKind:
    """One row of the table of heads."""

    paper: str
    correction: Callable[[Params, Tensor], Tensor]
    shapes: Callable[[HeadSettings, int], dict[str, tuple[int, ...]]]
    """Shapes of one head's parameters, from its settings and d."""
    init: Callable[[HeadSettings, int, torch.Generator], Params] | None = None
    """Starting parameters of one head; None: the head is solved in closed form."""


HEADS: dict[str, HeadKind] = {
    "prob": HeadKind(
        "ProbSurgery, Wei et al., ICML 2025",
        prob_correction,
        lambda s, d: {"hidden": (s.hidden, d), "mu": (d, s.hidden), "log_var": (d, s.hidden)},
        _init_prob,
    ),
    "surgery": HeadKind(
        "Surgery, Yang et al., ICML 2024, arxiv.org/abs/2402.02705",
        surgery_correction,
        lambda s, d: {"down": (s.rank, d), "up": (d, s.rank)},
        _init_surgery,
    ),
    "ridge": HeadKind(
        "ridge regression, a baseline",
        ridge_correction,
        lambda s, d: {"weight": (d, d), "bias": (d,)},
    ),
}


def parameter_count(settings: HeadSettings, d: int) -> int:
    """Trained numbers in one head."""
    return sum(math.prod(shape) for shape in HEADS[settings.kind].shapes(settings, d).values())


@dataclass(frozen=True)
class Head:
    """Fitted heads, ready to apply: one for each task, or one shared by all.

    `head(features, "mnist")` takes merged features (N, d) and returns corrected ones (N, d).
    """

    settings: HeadSettings
    tasks: tuple[str, ...]
    dim: int
    """d, the features' width."""
    params: Params = field(repr=False)
    """Stacked over tasks; a stack of one if shared."""
    shared: bool = False
    record: dict = field(default_factory=dict, repr=False)
    """What the fit wrote beside the weights: seed, protocol, metrics, loss curve."""

    def params_of(self, task: str | None = None) -> Params:
        """One task's parameters, a stack of one. `task` may be left out where there is but one head."""
        if self.shared or (task is None and len(self.tasks) == 1):
            index = 0
        elif task in self.tasks:
            index = self.tasks.index(task)
        else:
            given = "no task was named" if task is None else f"no head for task {task!r}"
            raise InputError(f"{given}; this file has heads for: {', '.join(self.tasks)}")
        return {name: tensor[index : index + 1] for name, tensor in self.params.items()}

    @torch.no_grad()
    def __call__(self, features: Float[Tensor, "N d"], task: str | None = None) -> Float[Tensor, "N d"]:
        """Merged features with the task's estimated bias subtracted. Raises `InputError` for another width."""
        features = torch.as_tensor(features)
        if features.ndim != 2 or features.shape[1] != self.dim:
            raise InputError(f"features have shape {tuple(features.shape)}; this head takes (N, {self.dim})")
        params = {name: tensor.to(features.device) for name, tensor in self.params_of(task).items()}
        z = features.float().unsqueeze(0)
        return (z - HEADS[self.settings.kind].correction(params, z))[0]

    def save(self, folder: Path) -> None:
        """Write head.safetensors and head.json into an existing folder."""
        try:
            save_file({name: t.contiguous().cpu() for name, t in self.params.items()}, folder / "head.safetensors")
        except SafetensorError as error:
            raise ProbsurgeryError(f"cannot write {folder / 'head.safetensors'}: {first_line(error)}") from None
        about = {"schema": SCHEMA, "head": self.settings.kind, "settings": asdict(self.settings)}
        about |= {"tasks": list(self.tasks), "shared": self.shared, "dim": self.dim} | self.record
        (folder / "head.json").write_text(json.dumps(about, indent=1) + "\n")


def load_head(path: str | Path) -> Head:
    """Read a fitted head from its folder (or its head.safetensors); nothing in the files is executed.

    Raises `InputError` if there is none, if it was written by a newer version, or if its tensors do not have the
    shapes that its settings ask for.
    """
    folder = Path(path)
    folder = folder.parent if folder.suffix == ".safetensors" else folder
    refuse_links(folder)
    try:
        if (folder / "head.json").stat().st_size > _MOST_BYTES:
            raise InputError(f"{folder / 'head.json'} has more than {_MOST_BYTES:,} bytes; it does not describe a head")
        about = json.loads((folder / "head.json").read_text())
    except OSError as error:
        raise InputError(f"no head at {folder}: {error.strerror or error}; `probsurgery fit` writes one") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"the head at {folder} is damaged: {error}; fit it again") from None
    if not isinstance(about, dict) or type(about.get("schema")) is not int:
        raise InputError(f"{folder / 'head.json'} does not describe a head; fit it again")
    if about["schema"] > SCHEMA:
        raise InputError(f"the head at {folder} has schema {about['schema']}; this version reads up to {SCHEMA}")
    try:
        settings = head_settings(about["head"], **about["settings"])
        tasks, shared, dim = tuple(about["tasks"]), about["shared"], about["dim"]
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{folder / 'head.json'} lacks or garbles {error}; fit the head again") from None
    if not all(isinstance(task, str) for task in tasks) or not isinstance(dim, int):
        raise InputError(f"{folder / 'head.json'} garbles the tasks or the width; fit the head again")
    tensors = _load_tensors(folder, settings, dim, 1 if shared else len(tasks))
    known = {"schema", "head", "settings", "tasks", "shared", "dim"}
    return Head(settings, tasks, dim, tensors, shared, {k: v for k, v in about.items() if k not in known})


def _load_tensors(folder: Path, settings: HeadSettings, dim: int, stack: int) -> Params:
    """The parameters, read only if the file is as large as they are."""
    expected = {n: (stack, *shape) for n, shape in HEADS[settings.kind].shapes(settings, dim).items()}
    file = folder / "head.safetensors"
    try:
        size, needed = file.stat().st_size, 4 * sum(map(math.prod, expected.values()))
        if not needed < size < needed + _MOST_HEADER:
            raise InputError(
                f"{file} has {size:,} bytes, but its settings ask for {needed:,} and a header; fit it again"
            )
        tensors = load_file(file)
    except OSError as error:
        raise InputError(f"no head at {folder}: {error.strerror or error}; `probsurgery fit` writes one") from None
    except (ValueError, SafetensorError) as error:
        raise InputError(f"the head at {folder} is damaged: {error}; fit it again") from None
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found != expected:
        raise InputError(f"the head at {folder} holds {found}, but its settings ask for {expected}; fit it again")
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise InputError(f"the head at {folder} holds NaN or infinite weights; fit it again")
    return tensors


def stack_params(heads: Sequence[Params]) -> Params:
    """Join single heads' parameters (or stacks of one) along the stack dimension."""
    return {name: torch.cat([head[name] for head in heads]) for name in heads[0]}


assert HEADS.keys() == HEAD_SETTINGS.keys()
