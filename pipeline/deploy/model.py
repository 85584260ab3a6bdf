"""The result, usable: merged encoder, heads and classifiers as one module, from a cache or from a folder of its own."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from probsurgery.pipeline.config import ProbSettings, head_settings
from probsurgery.pipeline.datasets.tasks import select_tasks
from probsurgery.pipeline.errors import InputError, first_line, unknown
from probsurgery.pipeline.extraction.merges import Request, kept, make
from probsurgery.pipeline.files import refuse_links
from probsurgery.pipeline.fingerprints import file_digest
from probsurgery.pipeline.heads.head import Head, load_head
from probsurgery.pipeline.heads.kinds import HEADS, prob_distribution
from probsurgery.pipeline.merging.coefficients import read_coefficients
from probsurgery.pipeline.merging.registry import Samples
from probsurgery.pipeline.models import architectures
from probsurgery.pipeline.models.checkpoints import digest
from probsurgery.pipeline.models.sources import Weights
from probsurgery.pipeline.store.cache import Cache
from probsurgery.pipeline.store.manifest import COEFFICIENTS, MERGED, learned_files, software

SCHEMA = 1
FILES = ("merged.safetensors", "heads.safetensors", "classifiers.safetensors")
_MOST_BYTES = 2**24
"""Of model.json."""


class SurgeryModel(nn.Module):
    """A merged encoder with a head and a classifier for each task.

    `model(images, "mnist")` takes images (B, 3, size, size), as `model.transform` makes them, and gives logits (B, C).
    """

    def __init__(
        self,
        encoder: nn.Module,
        head: Head,
        classifiers: Mapping[str, Tensor],
        class_names: Mapping[str, Sequence[str]],
        about: dict,
    ) -> None:
        super().__init__()
        self.encoder, self.settings, self.tasks, self.shared = encoder, head.settings, head.tasks, head.shared
        self.class_names = {task: tuple(class_names[task]) for task in head.tasks}
        self.about = about
        """Architecture, preprocessing and where all of it is from."""
        self.transform: Callable[[Image.Image], Tensor] = architectures.transform_of(about["preprocessing"])
        for name, values in head.params.items():
            self.register_buffer(f"head_{name}", values)
        for number, task in enumerate(head.tasks):  # a task's name may not be a buffer's
            self.register_buffer(f"classifier_{number}", classifiers[task])

    def forward(self, images: Float[Tensor, "B 3 s s"], task: str) -> Float[Tensor, "B C"]:
        """Logits of the task's classes."""
        return self.classify(self.correct(self.encoder(images), task), task)

    def features(self, images: Float[Tensor, "B 3 s s"], task: str) -> Float[Tensor, "B d"]:
        """Corrected features, not normalised."""
        return self.correct(self.encoder(images), task)

    def correct(self, merged: Float[Tensor, "B d"], task: str) -> Float[Tensor, "B d"]:
        """Merged features with the task's estimated bias subtracted."""
        z = merged.float().unsqueeze(0)
        return (z - HEADS[self.settings.kind].correction(self._params(task), z))[0]

    def classify(self, corrected: Float[Tensor, "B d"], task: str) -> Float[Tensor, "B C"]:
        """Logits from corrected features."""
        return F.normalize(corrected, dim=-1) @ getattr(self, f"classifier_{self._index(task)}").T

    def sigma(self, merged: Float[Tensor, "B d"], task: str) -> Float[Tensor, " B"]:
        """The correction's predicted standard deviation, root mean square over dimensions, from merged features.

        Raises `InputError` for heads that predict none.
        """
        if not isinstance(self.settings, ProbSettings):
            raise InputError(f"{self.settings.kind} heads have no sigma; ProbSurgery's have")
        _, log_var = prob_distribution(self._params(task), merged.float().unsqueeze(0))
        return log_var[0].exp().mean(-1).sqrt()

    def _index(self, task: str) -> int:
        if task not in self.tasks:
            raise unknown("task", task, self.tasks)
        return self.tasks.index(task)

    def _params(self, task: str) -> dict[str, Tensor]:
        index = self._index(task)  # of a shared head too: it has no classifier for other tasks
        index = 0 if self.shared else index
        names = HEADS[self.settings.kind].shapes(self.settings, self.about["dim"])
        return {name: getattr(self, f"head_{name}")[index : index + 1] for name in names}

    def save(self, folder: str | Path, also: Callable[[Path], object] = lambda folder: None) -> None:
        """Write the model to a new folder: model.json, three safetensors files, and what `also` writes there.

        The folder appears whole or not at all. Raises `InputError` if it exists.
        """
        folder = Path(folder)
        if folder.exists():
            raise InputError(f"{folder} exists; choose another --out, or delete it")
        try:
            folder.absolute().parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder.absolute().parent, prefix=".", suffix=".partial") as partial:
                written = Path(partial) / folder.name
                written.mkdir()
                self._write(written)
                also(written)
                written.rename(folder)
        except (OSError, SafetensorError) as error:
            raise InputError(f"cannot write {folder}: {first_line(error)}; choose another --out") from None

    def _write(self, folder: Path) -> None:
        names = HEADS[self.settings.kind].shapes(self.settings, self.about["dim"])
        tensors = {
            "merged.safetensors": dict(self.encoder.state_dict()),
            "heads.safetensors": {name: getattr(self, f"head_{name}") for name in names},
            "classifiers.safetensors": {task: getattr(self, f"classifier_{i}") for i, task in enumerate(self.tasks)},
        }
        for name, its in tensors.items():
            save_file({key: value.detach().cpu().contiguous() for key, value in its.items()}, folder / name)
        about = {"schema": SCHEMA, "head": self.settings.kind, "settings": asdict(self.settings)}
        about |= {"tasks": list(self.tasks), "shared": self.shared, "class_names": self.class_names} | self.about
        about["files"] = {name: file_digest(folder / name) for name in FILES}
        (folder / "model.json").write_text(json.dumps(about, indent=1) + "\n")


def load_model(folder: str | Path) -> SurgeryModel:
    """Read what `SurgeryModel.save` (and `probsurgery export`) wrote; nothing in it is executed.

    Raises `InputError` if there is none, if it is of a newer schema, or if a file is not as it was written.
    """
    folder = Path(folder)
    try:
        refuse_links(folder)
        if (folder / "model.json").stat().st_size > _MOST_BYTES:
            raise InputError(f"{folder / 'model.json'} is too large to describe a model; export it again")
        about = json.loads((folder / "model.json").read_text())
    except OSError as error:
        raise InputError(f"no model at {folder}: {error.strerror or error}; `probsurgery export` writes one") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{folder / 'model.json'} is damaged: {first_line(error)}; export it again") from None
    if not isinstance(about, dict) or type(about.get("schema")) is not int:
        raise InputError(f"{folder / 'model.json'} does not describe a model; export it again")
    if about["schema"] > SCHEMA:
        raise InputError(f"{folder} has schema {about['schema']}; this version reads up to {SCHEMA}")
    try:
        for name in FILES:
            if file_digest(folder / name) != about["files"][name]:
                raise InputError(f"{folder / name} is not as it was written; export the model again")
        encoder, params, classifiers = (load_file(folder / name) for name in FILES)
        settings = head_settings(about["head"], **about["settings"])
        head = Head(settings, tuple(about["tasks"]), about["dim"], params, about["shared"])
        kept_about = {key: about[key] for key in ("arch", "dim", "preprocessing", "merge", "cache", "software")}
        stack = 1 if head.shared else len(head.tasks)
        expected = {n: (stack, *shape) for n, shape in HEADS[about["head"]].shapes(settings, head.dim).items()}
        expected |= {task: (len(about["class_names"][task]), head.dim) for task in head.tasks}
        found = {name: tuple(values.shape) for name, values in (params | classifiers).items()}
        if found != expected:
            raise InputError(f"{folder} does not hold the heads and classifiers of model.json; export it again")
        if not all(values.isfinite().all() for values in (encoder | params | classifiers).values()):
            raise InputError(f"{folder} holds NaN or infinite weights; export the model again")
        tower = architectures.build_visual(about["arch"], encoder)
        return SurgeryModel(tower, head, classifiers, about["class_names"], kept_about).eval()
    except OSError as error:
        raise InputError(f"{folder} lacks a file: {error.strerror or error}; export the model again") from None
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{folder / 'model.json'} lacks or garbles {first_line(error)}; export it again") from None


def assemble(
    cache: str | Path,
    head: str | Path,
    checkpoints: str | None = None,
    merged: Path | None = None,
    results: Path | None = None,
) -> SurgeryModel:
    """The model that a cache and one of its heads stand for.

    A cache keeps features and not weights, so the encoder is merged again from the checkpoints, unless the merge was
    learned, and must come out as it was. `head` is a name under heads/ or a folder; `merged` is the checkpoint of a
    merge that was made elsewhere. Raises `InputError` if the checkpoints are others, or the head was fitted on others'
    features.
    """
    opened = Cache(cache)
    fitted = _head(opened, head, results)
    tasks = select_tasks(opened.identity["suite"], opened.identity["tasks"])
    weights = Weights(opened.identity["arch"], checkpoints)
    state = _merged(opened, weights, tasks, merged)
    if digest(state) != opened.identity["merge"].get("digest"):
        where = merged or weights.folder or "the published place"
        raise InputError(
            f"the checkpoints in {where} do not merge to what {opened.path} was made from; give --checkpoints as for "
            "its `probsurgery extract`"
        )
    about = {"arch": opened.identity["arch"], "dim": opened.dim, "preprocessing": opened.identity["preprocessing"]}
    about |= {"merge": opened.identity["merge"], "cache": opened.fingerprint, "software": software()}
    classifiers = {task: opened.classifier(task) for task in fitted.tasks}
    names = {task: opened.manifest["tasks"][task]["class_names"] for task in fitted.tasks}
    return SurgeryModel(architectures.build_visual(about["arch"], state), fitted, classifiers, names, about).eval()


def _head(cache: Cache, name: str | Path, results: Path | None) -> Head:
    folder = (results or cache.path) / "heads"
    path = folder / name if (folder / name).is_dir() else Path(name)
    if not path.is_dir():
        held = sorted(p.name for p in folder.iterdir() if not p.name.startswith(".")) if folder.is_dir() else []
        raise unknown("head", str(name), held or ["(none is kept; `probsurgery fit` keeps one)"])
    head = load_head(path)
    rows = head.record.get("results")
    rows = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    known = {row.get("task"): row.get("cache") for row in rows}
    for task in head.tasks:
        cache.require(task)
        if known.get(task) != cache.task_fingerprint(task):
            raise InputError(f"the head at {path} was fitted on other features of {task} than {cache.path} holds")
    return head


def _merged(cache: Cache, weights: Weights, tasks: Sequence, file: Path | None) -> Mapping[str, Tensor]:
    merge = cache.identity["merge"]
    if merge["method"] == "file":
        if file is None:
            raise InputError(f"{cache.path} is of a merged checkpoint; say where it is with --merged FILE")
        return weights.load(file)
    if file is not None:
        raise InputError(f"--merged is for caches of a merged checkpoint; {cache.path} was merged by {merge['method']}")
    held = learned_files(cache.manifest)
    given = COEFFICIENTS in held and MERGED not in held
    coefficients = read_coefficients(cache.path / COEFFICIENTS) if given else None
    about = {key: value for key, value in merge.items() if key != "digest"}
    request = Request(merge["method"], cache.path, about, coefficients)
    known = kept(request, cache.identity, weights)
    if known is None and request.learns:
        raise InputError(f"{cache.path / MERGED} is gone or damaged; run the same `probsurgery extract` again")
    return known.state if known else make(request, weights, weights.pretrained(), tasks, _no_samples).state


def _no_samples() -> Samples:
    raise AssertionError("a merge that learns is kept with its cache")


@dataclass(frozen=True)
class Prediction:
    """What a model says of one image."""

    image: str
    classes: tuple[tuple[str, float], ...]
    """The likeliest, with probabilities in [0, 1]."""
    sigma: float | None
    """Of ProbSurgery heads: the correction's predicted standard deviation, root mean square over dimensions."""


@torch.inference_mode()
def predict(
    model: SurgeryModel, task: str, images: Sequence[Path], device: torch.device | str = "cpu", top: int = 3
) -> list[Prediction]:
    """Classify image files. Raises `InputError` naming the first that is none."""
    if task not in model.tasks:
        raise unknown("task", task, model.tasks)
    names, model, predictions = model.class_names[task], model.to(device), []
    for start in range(0, len(images), 64):
        paths = images[start : start + 64]
        merged = model.encoder(torch.stack([_opened(model, path) for path in paths]).to(device))
        chances = model.classify(model.correct(merged, task), task).softmax(-1).cpu()
        probabilistic = isinstance(model.settings, ProbSettings) and model.settings.samples
        sigmas = model.sigma(merged, task).tolist() if probabilistic else [None] * len(merged)
        for path, chance, sigma in zip(paths, chances, sigmas, strict=True):
            best = chance.topk(min(top, len(chance)))
            classes = [names[i] if i < len(names) else str(i) for i in best.indices.tolist()]
            predictions.append(Prediction(str(path), tuple(zip(classes, best.values.tolist(), strict=True)), sigma))
    return predictions


def _opened(model: SurgeryModel, path: Path) -> Tensor:
    try:
        with Image.open(path) as image:
            return model.transform(image)
    except Exception as error:  # damaged image files raise anything in their decoders
        raise InputError(f"{path} is not an image that can be read: {first_line(error)}") from None
