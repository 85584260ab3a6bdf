"""Zero-shot classifiers: a checkpoint folder's own, or made from the pre-trained text tower and cached for the user."""

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from probsurgery.pipeline import hub
from probsurgery.pipeline.classifier import Classifier
from probsurgery.pipeline.datasets.tasks import Task
from probsurgery.pipeline.errors import InputError
from probsurgery.pipeline.files import SourceFile, replaced
from probsurgery.pipeline.fingerprints import fingerprint
from probsurgery.pipeline.models.checkpoints import StateDict, check_state, digest, read_tensors, to_classifier, to_text
from probsurgery.pipeline.models.encoders import Encoder
from probsurgery.pipeline.models.open_clip_encoder import OpenClipEncoder
from probsurgery.pipeline.models.sources import Weights
from probsurgery.pipeline.models.transformers_encoder import TransformersEncoder
from probsurgery.pipeline.models.transformers_text import TransformersText
from probsurgery.pipeline.store.arrays import bad_rows
from probsurgery.pipeline.store.manifest import described


def load_classifiers(weights: Weights, tasks: Sequence[Task], device: torch.device) -> dict[str, Classifier]:
    """Classifiers by task: the suite's, the folder's, or zero-shot ones from the pre-trained text tower.

    A folder holds them as `classifiers.safetensors` (`<task>`, and `<task>.bias` if there is one), or as the
    task-vectors code's `head_<Task>.pt`. They take normalised features. A task whose suite wants none has none.
    """
    classifiers, missing = {}, []
    for task in tasks:
        if task.classifier is False:
            continue
        classifier = _from_file(weights, task) if task.classifier else _from_folder(weights, task)
        if classifier is None:
            missing += [task] if task.templates or task.labels else []
            continue
        shape = (len(task.class_names) or len(classifier.weight), weights.encoder.dim)
        if classifier.weight.shape != shape:
            raise InputError(
                f"{weights.files[f'classifier {task.name}'].source}: the classifier of {task.name!r} has shape "
                f"{tuple(classifier.weight.shape)}, not (C, d) = {shape}"
            )
        classifiers[task.name] = classifier
        for name, values in described(classifier, task.name)[1].items():
            bad, wrong = bad_rows(name, values, 0)
            if len(bad):
                where = f"the classifier of {task.name!r} in {task.classifier or weights.folder}"
                first = repr(task.class_names[bad[0]]) if task.class_names else f"row {bad[0]}"
                raise InputError(f"{where} has rows that are {wrong}, the first is {first}'s")
    built = _from_text_tower(weights, missing, device) if missing else {}
    return classifiers | {name: Classifier(weight) for name, weight in built.items()}


def _from_file(weights: Weights, task: Task) -> Classifier:
    """The classifier that a task's suite names."""
    path = hub.weights_in(Path(str(task.classifier)))
    if not path.is_file():
        raise InputError(f"the classifier of {task.name}, {path}, is not a file; name the file with its weight")
    weights.record(f"classifier {task.name}", path, str(path))
    return to_classifier(read_tensors(path), path, normalise=task.normalise is not False)


def _from_folder(weights: Weights, task: Task) -> Classifier | None:
    for place in weights.places:
        heads = [place / f"head_{title}.pt" for title in (task.title, f"{task.title}Val") if task.title]
        for path in filter(Path.is_file, (place / "classifiers.safetensors", *heads)):
            tensors = read_tensors(path)
            if path in heads or task.name in tensors:
                weights.record(f"classifier {task.name}", path, str(path.relative_to(weights.places[0])))
                if path in heads:
                    return to_classifier(tensors, path)
                return to_classifier(_of_task(tensors, task.name), path)
    return None


def _of_task(tensors: Mapping[str, Tensor], task: str) -> dict[str, Tensor]:
    names = {"weight": task, "bias": f"{task}.bias"}
    return {part: tensors[name] for part, name in names.items() if name in tensors}


def _from_text_tower(weights: Weights, tasks: Sequence[Task], device: torch.device) -> dict[str, Tensor]:
    """Classifiers from the pre-trained text tower, cached in the user's cache folder because they take minutes."""
    if without := next((task.name for task in tasks if not task.templates), None):
        raise InputError(
            f"{weights.folder or 'the suite'} holds no classifier of {without!r} (in --checkpoints: "
            "classifiers.safetensors; in a suite: `classifier`, false for none, or `templates` to make one from)"
        )
    tower = _text_tower(weights, tasks[0], device)
    files: dict[str, Path] = {}
    kept: dict[str, Tensor] = {}
    for task in tasks:
        weights.files[f"classifier {task.name}"] = SourceFile(source="text tower", sha256=tower.digest)
        key = fingerprint([weights.row.open_clip, *tower.key, task.class_names, task.templates])
        if (folder := user_cache()) is None:
            continue
        files[task.name] = folder / "classifiers" / f"{key}.safetensors"
        if (classifier := _read_cached(files[task.name], (len(task.class_names), tower.dim))) is not None:
            kept[task.name] = classifier
    missing = [task for task in tasks if task.name not in kept]
    built = tower.classifiers(missing) if missing else {}
    for name, file in files.items():
        if name in built:
            with suppress(OSError):  # on a full disk or in a read-only home, it is built again next time
                file.parent.mkdir(parents=True, exist_ok=True)
                with replaced(file, shared=True) as beside:
                    save_file({"classifier": built[name]}, beside)
    return kept | built


@dataclass(frozen=True)
class _TextTower:
    """A text tower that classifiers are made with."""

    digest: str
    """Of its weights."""
    key: tuple[str, ...]
    """What the classifiers depend on beside the prompts."""
    dim: int
    classifiers: Callable[[Sequence[Task]], dict[str, Tensor]]


def _text_tower(weights: Weights, task: Task, device: torch.device) -> _TextTower:
    """That of the pre-trained checkpoint, or of the published model. Raises `InputError` if there is none."""
    path, repo, encoder = weights.pretrained_file, weights.row.pretrained_repo, weights.encoder
    if isinstance(encoder, TransformersEncoder):
        own = TransformersText(encoder, path)
        make = partial(zero_shot, own, own.tokens, own.logit_scale, device=device)
        return _TextTower(own.digest, (own.digest, *own.tokenizer_digests), own.dim, make)
    text = to_text(read_tensors(path))
    if text is None and weights.folder is not None and repo is not None:
        path = hub.download(repo, "--checkpoints")
        text = to_text(read_tensors(path))
    if text is None:
        raise InputError(
            f"{path} has no text tower to make a classifier of {task.name} from; name a file by `classifier` in "
            f"the suite, or put classifiers.safetensors or head_{task.title or task.name}.pt into --checkpoints"
        )
    check_state(text, text_shapes(encoder), f"the text tower of {path}", encoder.name)
    text = {name: tensor.float() for name, tensor in text.items()}
    tower, dim = digest(text), text["text_projection"].shape[1]
    return _TextTower(tower, (tower,), dim, lambda tasks: build_classifiers(encoder, text, tasks, device))


def user_cache() -> Path | None:
    """The user's cache folder; None for a user without a home, such as a number given to a container."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "probsurgery"
    except RuntimeError:
        return None


def _read_cached(path: Path, shape: tuple[int, int]) -> Tensor | None:
    try:
        classifier = load_file(path)["classifier"]
    except Exception:  # missing or damaged: it is built again
        return None
    return classifier if classifier.shape == shape and classifier.isfinite().all() else None


def text_shapes(encoder: Encoder) -> dict[str, torch.Size]:
    """Names and shapes of the text tower's parameters, including the logit scale."""
    with torch.device("meta"):
        return {n: t.shape for n, t in _clip(encoder).state_dict().items() if not n.startswith("visual.")}


def build_classifiers(
    encoder: Encoder, text: StateDict, tasks: Sequence[Task], device: torch.device
) -> dict[str, Tensor]:
    """Zero-shot classifiers (C, d) from a text tower with the shapes of `text_shapes`."""
    import open_clip

    model = _clip(encoder)
    missing, unexpected = model.load_state_dict(text, strict=False)  # of the whole model, only the text tower is used
    assert not unexpected
    assert all(name.startswith("visual.") for name in missing)
    # OpenAI's tokenizer, which every `CLIP` was trained with.
    tokenizer = open_clip.SimpleTokenizer(context_length=model.context_length)
    return zero_shot(model.eval(), tokenizer, text["logit_scale"], tasks, device=device)


@torch.no_grad()
def zero_shot(
    model: nn.Module,
    tokenizer: Callable[[Sequence[str]], Tensor],
    logit_scale: Tensor,
    tasks: Sequence[Task],
    *,
    device: torch.device,
) -> dict[str, Tensor]:
    """Zero-shot classifiers (C, d) by task.

    Each class name in each of the task's templates is embedded and normalised; the mean over templates is normalised
    again, and multiplied by exp(logit_scale).
    """
    import open_clip

    model, scale, classifiers = model.to(device), logit_scale.to(device).exp(), {}
    for task in tasks:
        prompts = (task.class_names, task.templates)
        weights = open_clip.build_zero_shot_classifier(model, tokenizer, *prompts, device=device)
        classifiers[task.name] = (scale * weights.T).float().cpu().contiguous()
    return classifiers


def _clip(encoder: Encoder) -> nn.Module:
    import open_clip

    config = encoder.config if isinstance(encoder, OpenClipEncoder) else {}
    if "text_cfg" not in config or "hf_model_name" in config["text_cfg"] or config.get("custom_text"):
        raise InputError(
            f"classifiers of {encoder.name} cannot be made here; put classifiers.safetensors into --checkpoints"
        )
    return open_clip.CLIP(**config)
