"""The frozen head that a fit returns, and its files: head.safetensors (weights) and head.json (everything else)."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from jaxtyping import Float
from msgspec import Meta
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from probsurgery.pipeline.classifier import Classifier
from probsurgery.pipeline.config import HeadSettings, head_settings
from probsurgery.pipeline.errors import InputError, ProbsurgeryError, first_line
from probsurgery.pipeline.files import (
    Count,
    MalformedError,
    Name,
    Number,
    Record,
    Settings,
    Text,
    access_error,
    decode,
    read_json,
    refuse_links,
    require_readable,
    write_json,
)
from probsurgery.pipeline.heads.kinds import HEADS, Params, classifier_shapes
from probsurgery.pipeline.store.manifest import Dim
from probsurgery.pipeline.store.results import Distance, ResultRow, Seconds, TrainingPlan

SCHEMA = 1
_MAX_JSON_BYTES = 2**28
_LATER_DEFAULTS = (("feature_scale", 1), ("optimizer", "separate"))
"""Settings that older versions lack."""
_MAX_HEADER_BYTES = 2**20  # of head.safetensors
_WEIGHTS = "head.safetensors"


class HeadDescription(Record, frozen=True):
    """What head.json holds of the head itself; the keys of a `FitRecord` may stand beside these."""

    schema: int
    head: Name
    """Kind of head."""
    settings: Settings
    tasks: Annotated[tuple[Text, ...], Meta(min_length=1)]
    shared: bool
    dim: Dim
    classes: Mapping[Text, Annotated[int, Meta(ge=1, le=2**31)]] = {}
    """Of a classifier head, by task."""
    plain: tuple[Text, ...] = ()
    """Tasks whose classifiers take features that are not normalised."""


class TrainingRecord(Record, frozen=True, kw_only=True):
    """How one head of the stack was trained, or solved."""

    tasks: tuple[Text, ...]
    penalty: Distance | None
    """Ridge: the penalty that was used."""
    loss_curve: tuple[tuple[Count, Number], ...]
    """(step, mean loss since the last entry)."""
    device: Text = ""
    plan: TrainingPlan | None = None
    from_run_of: Count | None = None
    """Steps of the longer run from which this head was copied."""


class FitRecord(Record, frozen=True, kw_only=True):
    """What a fit writes beside the weights."""

    request: Mapping[str, Any]
    """What determines the head; the same request gives the same head."""
    results: tuple[ResultRow, ...] = ()
    fits: tuple[TrainingRecord, ...] = ()
    seconds: Seconds = 0.0
    software: Mapping[Text, Text] = {}
    """Versions of the libraries that the fit ran on."""


@dataclass(frozen=True)
class Head:
    """Fitted heads, ready to apply: one for each task, or one shared by all.

    `head(features, "mnist")` takes merged features (N, d) and returns corrected ones (N, d). A classifier head leaves
    features as they are; `head.logits(features, "mnist")` are what its own classifier makes of them.
    """

    settings: HeadSettings
    tasks: tuple[str, ...]
    dim: int
    """d, the features' width."""
    params: Params = field(repr=False)
    """Stacked over tasks; a stack of one if shared. Empty for a classifier head."""
    shared: bool = False
    record: FitRecord | None = field(default=None, repr=False)
    """How the head was fitted and how good it is; None if it was saved without that."""
    classifiers: Mapping[str, Classifier] = field(default_factory=dict, repr=False)
    """Of a classifier head: what replaces each task's classifier."""

    def params_of(self, task: str | None = None) -> Params:
        """One task's parameters, a stack of one. `task` is optional if there is only one head."""
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
        """Merged features with the task's estimated bias subtracted. Raises `InputError` for another width.

        Of a classifier head, the features themselves, in float32.
        """
        features = torch.as_tensor(features)
        if features.ndim != 2 or features.shape[1] != self.dim:
            raise InputError(f"features have shape {tuple(features.shape)}; this head takes (N, {self.dim})")
        params = {name: tensor.to(features.device) for name, tensor in self.params_of(task).items()}
        z = features.float().unsqueeze(0)
        return (z - HEADS[self.settings.kind].correction(params, z))[0]

    def logits(self, features: Float[Tensor, "N d"], task: str | None = None) -> Float[Tensor, "N C"]:
        """Logits of a classifier head's own classifier. Raises `InputError` for a head of another kind."""
        if self.settings.corrects_features:
            raise InputError(
                f"{self.settings.kind} heads have no classifier; correct the features, and give them to "
                "`cache.linear_classifier(task)`"
            )
        values = self(features, task)
        return self.classifiers[task or self.tasks[0]].to(values.device).logits(values)

    def save(self, folder: Path) -> None:
        """Write head.safetensors and head.json into an existing folder."""
        weights = folder / _WEIGHTS
        try:
            save_file({name: t.contiguous().cpu() for name, t in self._tensors().items()}, weights)
        except SafetensorError as error:
            raise ProbsurgeryError(f"cannot write {weights}: {first_line(error)}") from None
        settings = self.settings
        description = HeadDescription(
            SCHEMA,
            settings.kind,
            recorded(settings),
            self.tasks,
            self.shared,
            self.dim,
            {task: len(classifier.weight) for task, classifier in self.classifiers.items()},
            tuple(task for task, classifier in self.classifiers.items() if not classifier.normalise),
        )
        write_json(folder / "head.json", description.to_json() | (self.record.to_json() if self.record else {}))

    def _tensors(self) -> Params:
        tensors = dict(self.params)
        for task, classifier in self.classifiers.items():
            bias = torch.zeros(len(classifier.weight)) if classifier.bias is None else classifier.bias
            tensors |= {f"weight/{task}": classifier.weight, f"bias/{task}": bias}
        return tensors


def recorded(settings: HeadSettings) -> dict[str, Any]:
    """Settings as files and digests have them: one that older versions lack is left out at its default."""
    return {name: v for name, v in asdict(settings).items() if (name, v) not in _LATER_DEFAULTS}


def stored_settings(head: str, settings: Mapping[str, Any]) -> HeadSettings:
    """Settings of a head as a file has them. Raises `ValueError` where `head_settings` raises `InputError`."""
    try:
        found = head_settings(head, **settings)
    except (InputError, TypeError) as error:
        raise ValueError(str(error)) from None
    if not found.feature_scale:
        raise ValueError("its feature scale is 0")
    return found


def load_head(path: str | Path) -> Head:
    """Read a fitted head from its folder (or its head.safetensors); nothing in the files is executed.

    Raises `InputError` if there is no head, if it is damaged or was written by a newer version, or if the shapes of its
    tensors are not those of its settings; `AccessError`, which is one, if it is there and cannot be read.
    """
    folder = Path(path)
    folder = folder.parent if folder.suffix == ".safetensors" else folder
    try:
        refuse_links(folder)
        return _read_head(folder)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(f"no head at {folder}: {error.strerror or error}; `probsurgery fit` writes one") from None
    except OSError as error:
        raise access_error(error, folder, "ask its owner for permission, or fit it again with --results") from None
    except (TypeError, ValueError, OverflowError, SafetensorError) as error:  # settings of a wrong type raise any
        raise InputError(f"the head at {folder} is damaged ({first_line(error)}); fit it again") from None


def _read_head(folder: Path) -> Head:
    plain = read_json(folder / "head.json", _MAX_JSON_BYTES)
    schema = plain.get("schema") if isinstance(plain, dict) else None
    if type(schema) is int and schema > SCHEMA:
        raise InputError(f"the head at {folder} has schema {schema}; this version reads up to {SCHEMA}")
    head, record = decode(HeadDescription, plain), decode(FitRecord, plain) if "request" in plain else None
    if len(set(head.tasks)) < len(head.tasks):
        raise MalformedError("a task has two heads")
    settings, stack = stored_settings(head.head, head.settings), 1 if head.shared else len(head.tasks)
    shapes = HEADS[settings.kind].shapes(settings, head.dim)
    expected = {name: (stack, *shape) for name, shape in shapes.items()}
    if settings.corrects_features:
        return Head(settings, head.tasks, head.dim, _read_params(folder / _WEIGHTS, expected), head.shared, record)
    if head.shared or head.classes.keys() != set(head.tasks):
        raise MalformedError("it does not say how many classes each of its tasks has")
    by_task = {task: classifier_shapes(head.classes[task], head.dim) for task in head.tasks}
    expected = {f"{part}/{task}": shape for task, parts in by_task.items() for part, shape in parts.items()}
    tensors = _read_params(folder / _WEIGHTS, expected)
    classifiers = {
        task: Classifier(tensors[f"weight/{task}"], tensors[f"bias/{task}"], task not in head.plain)
        for task in head.tasks
    }
    return Head(settings, head.tasks, head.dim, {}, record=record, classifiers=classifiers)


def _read_params(file: Path, expected: dict[str, tuple[int, ...]]) -> Params:
    """Tensors of the expected shapes. They are read only if the file's size is that of the shapes."""
    size, needed = file.stat().st_size, 4 * sum(map(math.prod, expected.values()))
    if not needed < size < needed + _MAX_HEADER_BYTES:
        raise MalformedError(
            f"{file.name} has {size:,} bytes, but its settings ask for {needed:,} of float32 and a header"
        )
    require_readable(file)
    params = load_file(file)
    shapes = {name: tuple(tensor.shape) for name, tensor in params.items()}
    for name in sorted(shapes.keys() | expected.keys()):
        if shapes.get(name) != expected.get(name):
            found, asked = (of.get(name, "no such tensor") for of in (shapes, expected))
            raise MalformedError(f"{file.name} has {name!r} of shape {found}, but its settings ask for {asked}")
    if other := next((tensor.dtype for tensor in params.values() if tensor.dtype != torch.float32), None):
        raise MalformedError(f"{file.name} holds {other} weights and not float32")
    if not all(tensor.isfinite().all() for tensor in params.values()):
        raise MalformedError(f"{file.name} holds NaN or infinite weights")
    return params
