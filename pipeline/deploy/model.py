"""The deployable model: merged encoder, heads and classifiers as one module, and the folder that it is exported to."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from jaxtyping import Float
from msgspec import Meta
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from probsurgery.pipeline import files
from probsurgery.pipeline.classifier import Classifier, linear_logits
from probsurgery.pipeline.errors import InputError, first_line, unknown
from probsurgery.pipeline.files import Digest, Name, Record, Settings, Text
from probsurgery.pipeline.fingerprints import file_digest
from probsurgery.pipeline.heads.head import Head, recorded, stored_settings
from probsurgery.pipeline.heads.kinds import HEADS, Params, prob_distribution
from probsurgery.pipeline.models.encoders import described_encoder
from probsurgery.pipeline.models.preprocessing import Preprocessing
from probsurgery.pipeline.store.lock import require_writable
from probsurgery.pipeline.store.manifest import Dim, MergeIdentity, TaskName
from probsurgery.pipeline.store.target import refuse_own_files

SCHEMA = 2
"""The newest that is read; written where a classifier has a bias or takes plain features."""
DESCRIPTION = "model.json"
FILES = ("merged.safetensors", "heads.safetensors", "classifiers.safetensors")
_MOST_BYTES = 2**24  # of model.json


class Provenance(Record, frozen=True, kw_only=True, omit_defaults=False):
    """What a model was made from. `cache` is the digest of the cache's identity."""

    arch: Text
    dim: Dim
    preprocessing: Preprocessing
    merge: MergeIdentity
    cache: Text
    software: Mapping[Text, Text]
    encoder: Mapping[str, Any] = {}


class ModelDescription(Provenance, frozen=True, kw_only=True, omit_defaults=True):
    """What model.json holds. `head` is the kind of head, `files` has the files' digests."""

    schema: int
    head: Name
    settings: Settings
    tasks: Annotated[tuple[TaskName, ...], Meta(min_length=1)]
    shared: bool
    class_names: Mapping[TaskName, tuple[Text, ...]]
    plain: tuple[TaskName, ...] = ()
    """Tasks whose classifiers take features that are not normalised."""
    files: Mapping[Name, Digest]


class SurgeryModel(nn.Module):
    """A merged encoder with a head and a classifier for each task.

    `model(images, "mnist")` takes images (B, 3, size, size), as `model.transform` makes them, and gives logits (B, C).
    """

    def __init__(
        self,
        encoder: nn.Module,
        head: Head,
        classifiers: Mapping[str, Classifier],
        class_names: Mapping[str, Sequence[str]],
        provenance: Provenance,
    ) -> None:
        super().__init__()
        self.encoder, self.settings, self.tasks, self.shared = encoder, head.settings, head.tasks, head.shared
        self.class_names = {task: tuple(names) for task, names in class_names.items()}
        self.provenance, self._head_names = provenance, tuple(head.params)
        self.transform = provenance.preprocessing.transform
        for name, values in head.params.items():
            self.register_buffer(f"head_{name}", values)
        for number, task in enumerate(head.tasks):  # not every task's name can be a buffer's
            own = classifiers.get(task)
            self.register_buffer(f"classifier_{number}", own.weight if own else None)
            self.register_buffer(f"bias_{number}", own.bias if own else None)
        self.plain = tuple(task for task, classifier in classifiers.items() if not classifier.normalise)
        """Tasks whose classifiers take features that are not normalised."""

    def forward(self, images: Float[Tensor, "B 3 s s"], task: str) -> Float[Tensor, "B C"]:
        """Logits of the task's classes."""
        return self.classify(self.features(images, task), task)

    def features(self, images: Float[Tensor, "B 3 s s"], task: str) -> Float[Tensor, "B d"]:
        """Corrected features, not normalised."""
        return self.correct(self.encoder(images), task)

    def correct(self, merged: Float[Tensor, "B d"], task: str) -> Float[Tensor, "B d"]:
        """Merged features with the task's estimated bias subtracted."""
        z = merged.float().unsqueeze(0)
        return (z - HEADS[self.settings.kind].correction(self._params(task), z))[0]

    def classify(self, corrected: Float[Tensor, "B d"], task: str) -> Float[Tensor, "B C"]:
        """Logits from corrected features. Raises `InputError` for a task without a classifier."""
        index = self._index(task)
        weight, bias = getattr(self, f"classifier_{index}"), getattr(self, f"bias_{index}")
        if weight is None:
            raise InputError(f"the model has no classifier of {task}; `correct` corrects its features")
        return linear_logits(corrected, weight, bias, normalise=task not in self.plain)

    def sigma(self, merged: Float[Tensor, "B d"], task: str) -> Float[Tensor, " B"]:
        """The correction's predicted standard deviation, root mean square over dimensions, from merged features.

        Raises `InputError` for heads that predict none.
        """
        if "log_var" not in self._head_names:
            raise InputError(f"{self.settings.kind} heads have no sigma; ProbSurgery's have")
        z, scale = merged.float().unsqueeze(0), self.settings.feature_scale
        _, log_var = prob_distribution(self._params(task), z, scale)
        return log_var[0].exp().mean(-1).sqrt()

    def _index(self, task: str) -> int:
        if task not in self.tasks:
            raise unknown("task", task, self.tasks)
        return self.tasks.index(task)

    def _params(self, task: str) -> Params:
        index = self._index(task)  # of a shared head too: it has no classifier for other tasks
        index = 0 if self.shared else index
        return {name: getattr(self, f"head_{name}")[index : index + 1] for name in self._head_names}

    def save(self, folder: str | Path, also: Callable[[Path], object] = lambda folder: None) -> None:
        """Write the model to a new folder: model.json, three safetensors files, and what `also` writes there.

        The folder appears whole or not at all. Raises `InputError` if it exists.
        """
        folder = Path(folder).absolute()
        require_new(folder)
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with files.replaced(folder, shared=True) as partial:
                partial.mkdir()
                self._write(partial)
                also(partial)
        except (OSError, SafetensorError) as error:
            raise InputError(f"cannot write {folder}: {first_line(error)}; choose another --out") from None

    def _write(self, folder: Path) -> None:
        params = {name: getattr(self, f"head_{name}") for name in self._head_names}
        classifiers = {task: getattr(self, f"classifier_{i}") for i, task in enumerate(self.tasks)}
        biases = {f"biases/{task}": getattr(self, f"bias_{i}") for i, task in enumerate(self.tasks)}
        classifiers |= {name: bias for name, bias in biases.items() if bias is not None}
        for file, named in zip(FILES, (self.encoder.state_dict(), params, classifiers), strict=True):
            save_file({name: value.detach().cpu().contiguous() for name, value in named.items()}, folder / file)
        description = ModelDescription(
            schema=2 if self.plain or len(classifiers) > len(self.tasks) else 1,
            plain=self.plain,
            head=self.settings.kind,
            settings=recorded(self.settings),
            tasks=self.tasks,
            shared=self.shared,
            class_names=self.class_names,
            files={name: file_digest(folder / name) for name in FILES},
            **self.provenance.to_json(),
        )
        files.write_json(folder / DESCRIPTION, description.to_json())


def require_new(folder: Path) -> None:
    """Raise `InputError` unless a model can be written to this folder, which must not exist."""
    if os.path.lexists(folder):
        raise InputError(f"{folder} exists; choose another --out, or delete it")
    refuse_own_files(folder, "--out")
    require_writable(folder, "--out")


def load_model(folder: str | Path) -> SurgeryModel:
    """Read what `SurgeryModel.save` (and `probsurgery export`) wrote; nothing in it is executed.

    Raises `InputError` if there is none, if it is of a newer schema, or if a file is not as it was written.
    """
    folder = Path(folder)
    description = _read_description(folder)
    try:
        for name in FILES:
            if file_digest(folder / name) != description.files.get(name):
                raise InputError(f"{folder / name} is not as it was written; export the model again")
        weights, params, classifiers = (load_file(folder / name) for name in FILES)
        settings = stored_settings(description.head, description.settings)
        head = Head(settings, description.tasks, description.dim, params, description.shared)
        stack = 1 if head.shared else len(head.tasks)
        shapes = HEADS[settings.kind].shapes(settings, head.dim)
        expected = {name: (stack, *shape) for name, shape in shapes.items()}
        counts = {task: len(description.class_names[task]) for task in head.tasks}
        expected |= {task: (count, head.dim) for task, count in counts.items()}
        expected |= {n: (counts[task],) for task in head.tasks if (n := f"biases/{task}") in classifiers}
        if {name: tuple(values.shape) for name, values in (params | classifiers).items()} != expected:
            raise InputError(f"{folder} does not hold the heads and classifiers of model.json; export it again")
        for name, tensors in zip(FILES, (weights, params, classifiers), strict=True):
            _check_values(folder / name, tensors.values())
        encoder = described_encoder(description.arch, description.encoder, description.preprocessing)
        size = encoder.preprocessing.image_size
        if description.preprocessing.image_size != size:
            given = description.preprocessing.image_size
            raise InputError(f"{folder / DESCRIPTION} has image_size {given}, but {description.arch} takes {size}")
        plain = {task: task not in description.plain for task in head.tasks}
        built = {t: Classifier(classifiers[t], classifiers.get(f"biases/{t}"), n) for t, n in plain.items()}
        tower = encoder.build(encoder.state(weights))
        return SurgeryModel(tower, head, built, description.class_names, description).eval()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(f"{folder} lacks a file: {error.strerror or error}; export the model again") from None
    except OSError as error:
        raise files.access_error(error, folder, "ask its owner for permission, or export the model elsewhere") from None
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError, SafetensorError) as error:
        problem = " ".join(str(error).split())[:160]  # torch's is of several lines
        raise InputError(f"{folder / DESCRIPTION} does not fit its files ({problem}); export again") from None


def _check_values(file: Path, tensors: Iterable[Tensor]) -> None:
    for values in tensors:
        is_float = values.is_floating_point() or values.is_complex()
        if values.dtype != torch.float32 and (is_float or file.name != FILES[0]):  # a tower may count in integers
            raise InputError(f"{file} holds {values.dtype} weights and not float32; export the model again")
        if is_float and not values.isfinite().all():
            raise InputError(f"{file} holds NaN or infinite weights; export the model again")


def _read_description(folder: Path) -> ModelDescription:
    file = folder / DESCRIPTION
    try:
        files.refuse_links(folder)
        plain = files.read_json(file, _MOST_BYTES)
        schema = plain.get("schema") if isinstance(plain, dict) else None
        if type(schema) is int and schema > SCHEMA:
            raise InputError(f"{folder} has schema {schema}; this version reads up to {SCHEMA}")
        return files.decode(ModelDescription, plain)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(f"no model at {folder}: {error.strerror or error}; `probsurgery export` writes one") from None
    except OSError as error:
        raise files.access_error(error, folder, "`load_model` takes the folder that `export` wrote") from None
    except files.MalformedError as error:
        raise InputError(f"{file} does not describe a model ({error}); export it again") from None
