"""Where an architecture's checkpoints come from: the Hub, the package, or a folder in any layout that people have."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from probsurgery.pipeline import hub
from probsurgery.pipeline.datasets.tasks import Task
from probsurgery.pipeline.errors import InputError
from probsurgery.pipeline.fingerprints import fingerprint
from probsurgery.pipeline.models import architectures
from probsurgery.pipeline.models.checkpoints import (
    StateDict,
    VisualState,
    check_state,
    digest,
    lacks_projection,
    read_tensors,
    to_classifier,
    to_text,
)

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")


class Weights:
    """The checkpoints of an architecture: the pre-trained tower, an expert for each task, the classifiers.

    `folder` can have these layouts, also mixed, at its top or under the model's name (`ViT-B-32`): plain names
    (`pretrained.safetensors`, `<task>.pt`, ...); folders as the Hub's client makes them, or its cache; the task-vectors
    code's `zeroshot.pt`, `<Task>/finetuned.pt` and `head_<Task>.pt`. Without one, the published weights are used.
    Every state dict returned has been checked against the architecture; `InputError` names the first key that differs.
    """

    def __init__(self, arch: str, folder: str | Path | None = None) -> None:
        self.arch = arch
        self.row = architectures.get_arch(arch)
        self.folder = Path(folder) if folder is not None else self.row.folder
        if self.folder is None and self.row.expert_repo is None:
            raise InputError(f"no experts of {arch} are published; give --checkpoints FOLDER")
        if self.folder is not None and not self.folder.is_dir():
            raise InputError(f"no folder of checkpoints at {self.folder}; --checkpoints takes a folder")
        self.files: dict[str, dict] = {}
        """Every file read so far, by what it holds: where it is from, its size, its digest."""
        self._located: dict[str, Path] = {}
        self._checked: set[Path] = set()
        self._shapes = architectures.expected_shapes(arch)

    @property
    def names(self) -> list[str]:
        """Names of a tower's tensors, in order."""
        return list(self._shapes)

    def pretrained(self) -> StateDict:
        """The tower that the experts were fine-tuned from."""
        state = self.load(self._pretrained_file)
        return {name: state[name] for name in self._shapes}

    def expert(self, task: Task) -> Mapping[str, Tensor]:
        """The tower that was fine-tuned on a task."""
        repo = self.row.expert_repo and self.row.expert_repo.format(task.expert_suffix)
        titles = [f"{task.title}/finetuned", f"{task.title}Val/finetuned"] if task.title else []
        return self.load(self._file(task.name, [task.name, *titles], repo))

    def experts(self, tasks: Sequence[Task]) -> Mapping[str, Mapping[str, Tensor]]:
        """The experts by task, each opened when it is asked for, so that no more than one needs to be in memory."""
        return OnRequest({task.name: partial(self.expert, task) for task in tasks})

    def own(self, name: str) -> Mapping[str, Tensor]:
        """A tower of the folder by its name, that is no expert: `traditional-mtl`."""
        if self.folder is None:
            raise InputError(
                f"no {name} checkpoint of {self.arch} is published; put {name}.safetensors in --checkpoints"
            )
        return self.load(self._file(name, [name], None))

    def merged(self, path: Path) -> Mapping[str, Tensor]:
        """A merged checkpoint that was made elsewhere."""
        state = self.load(path)
        self.files[f"merged {path.stem}"] = {"source": path.name, **hub.checked_digest(path)}
        return state

    def load(self, path: Path) -> Mapping[str, Tensor]:
        """Any checkpoint of this architecture, in open_clip's names and float32, tensor by tensor where it can be."""
        held = read_tensors(path)
        state = VisualState(held, self._projection if lacks_projection(held) else None)
        if path not in self._checked:
            check_state(state, self._shapes, str(path), self.arch)
            self._check_activation(path)
            self._checked.add(path)
        return state

    @cached_property
    def _pretrained_file(self) -> Path:
        return self._file("pretrained", ["pretrained", "zeroshot"], self.row.pretrained_repo)

    @cached_property
    def _projection(self) -> Tensor:
        """The pre-trained visual projection (width, d)."""
        state = VisualState(read_tensors(self._pretrained_file))
        if "proj" not in state:
            raise InputError(
                f"{self._pretrained_file} lacks the visual projection, which the experts' checkpoints leave out too"
            )
        return state["proj"]

    def _check_activation(self, path: Path) -> None:
        """A wrong activation loads without an error and gives wrong features; transformers notes which one it is."""
        try:
            config = json.loads((path.parent / "config.json").read_text())
            theirs = config.get("vision_config", config).get("hidden_act")
        except (OSError, ValueError, AttributeError):
            return
        quick = architectures.model_config(self.arch).get("quick_gelu", False)
        if theirs in ("quick_gelu", "gelu") and quick != (theirs == "quick_gelu"):
            wanted = "a -quickgelu architecture" if theirs == "quick_gelu" else "an architecture without QuickGELU"
            raise InputError(f"{path} was trained with {theirs}, which {self.arch} has not; choose {wanted}")

    def _file(self, what: str, stems: Sequence[str], repo: str | None) -> Path:
        if what not in self._located:
            path = hub.download(repo, "--checkpoints") if self.folder is None else self._find(what, stems, repo)
            source = repo if self.folder is None else str(path.relative_to(self.folder))
            self.files[what] = {"source": source, **hub.checked_digest(path)}
            self._located[what] = path
        return self._located[what]

    def _find(self, what: str, stems: Sequence[str], repo: str | None) -> Path:
        """The first file that is there of those that the layouts would have."""
        folder, looked = self.folder, []
        inner = self.row.open_clip.removesuffix("-quickgelu")
        stems = [*stems, *((repo.split("/")[-1], repo) if repo else ())]
        for base in (folder, folder / inner):
            for stem in stems:
                files = [base / f"{stem}{suffix}" for suffix in SUFFIXES] + [base / stem / n for n in hub.WEIGHT_FILES]
                for path in files:
                    if path.is_file():
                        return path
                looked.append(f"{stem}{SUFFIXES[0]}" if "/" not in stem else f"{stem}.pt")
        found = repo and hub.cached(repo, folder)
        if found:
            return found
        held = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
        raise InputError(
            f"no checkpoint of {what!r} in {folder}; looked for {', '.join(dict.fromkeys(looked))} and the like, "
            f"also in {inner}/; the folder holds: {held}"
        )

    def classifiers(self, tasks: Sequence[Task], device: torch.device) -> dict[str, Tensor]:
        """Zero-shot classifiers (C, d): the folder's where it has them, else made with the pre-trained text tower."""
        found: dict[str, Tensor] = {}
        for task in tasks:
            classifier = self._kept_classifier(task)
            if classifier is not None:
                shape = (len(task.class_names), architectures.model_config(self.arch)["embed_dim"])
                if classifier.shape != shape:
                    where = self.files[f"classifier {task.name}"]["source"]
                    raise InputError(
                        f"{where}: the classifier of {task.name!r} has shape {tuple(classifier.shape)}, "
                        f"not (C, d) = {shape}"
                    )
                if not classifier.isfinite().all():
                    raise InputError(f"the classifier of {task.name!r} in {self.folder} holds NaN or infinite weights")
                found[task.name] = classifier.float().contiguous()
        return found | self._text_classifiers([task for task in tasks if task.name not in found], device)

    def _kept_classifier(self, task: Task) -> Tensor | None:
        if self.folder is None:
            return None
        for base in (self.folder, self.folder / self.row.open_clip.removesuffix("-quickgelu")):
            path = base / "classifiers.safetensors"
            held = read_tensors(path) if path.is_file() else {}
            if task.name in held:
                return self._noted(task, path, held[task.name])
            for title in (task.title, f"{task.title}Val") if task.title else ():
                path = base / f"head_{title}.pt"
                if path.is_file():
                    try:
                        return self._noted(task, path, to_classifier(read_tensors(path)))
                    except InputError as error:
                        raise InputError(f"{path}: {str(error).removeprefix(f'{path} ')}") from None
        return None

    def _noted(self, task: Task, path: Path, classifier: Tensor) -> Tensor:
        self.files[f"classifier {task.name}"] = {
            "source": str(path.relative_to(self.folder)),
            **hub.checked_digest(path),
        }
        return classifier

    def _text_classifiers(self, tasks: Sequence[Task], device: torch.device) -> dict[str, Tensor]:
        """Classifiers from the pre-trained text tower, kept in the user's cache folder because they take minutes."""
        if not tasks:
            return {}
        if not all(task.templates for task in tasks):
            raise InputError(
                f"{self.folder} holds no classifier of {tasks[0].name!r} (classifiers.safetensors), and the task has "
                "no prompts to make one from"
            )
        path = self._pretrained_file
        text = to_text(read_tensors(path))
        if text is None and self.folder is not None and self.row.pretrained_repo is not None:
            path = hub.download(self.row.pretrained_repo, "--checkpoints")
            text = to_text(read_tensors(path))
        if text is None:
            raise InputError(
                f"{path} has no text tower, and {self.folder} holds neither classifiers.safetensors nor "
                f"head_{tasks[0].title}.pt; put one of them there"
            )
        check_state(text, architectures.text_shapes(self.arch), f"the text tower of {path}", self.arch)
        text = {name: tensor.float() for name, tensor in text.items()}
        tower, found, lacking = digest(text), {}, {}
        for task in tasks:
            self.files[f"classifier {task.name}"] = {"source": "text tower", "sha256": tower}
            key = fingerprint([self.row.open_clip, tower, task.class_names, task.templates])
            file = _user_cache() / "classifiers" / f"{key}.safetensors"
            kept = _read_kept(file, (len(task.class_names), text["text_projection"].shape[1]))
            if kept is None:
                lacking[task.name] = task, file
            else:
                found[task.name] = kept
        if lacking:
            made = architectures.text_classifiers(self.arch, text, [task for task, _ in lacking.values()], device)
            for name, (_, file) in lacking.items():
                _keep(file, made[name])
            found |= made
        return found


class OnRequest(Mapping):
    """Values that are made when they are asked for, each time."""

    def __init__(self, makers: dict[str, Callable[[], Mapping[str, Tensor]]]) -> None:
        self._makers = makers

    def __getitem__(self, name: str) -> Mapping[str, Tensor]:
        return self._makers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "probsurgery"


def _read_kept(path: Path, shape: tuple[int, int]) -> Tensor | None:
    try:
        kept = load_file(path)["classifier"]
    except Exception:  # not there, or not whole: it is made again
        return None
    return kept if kept.shape == shape and kept.isfinite().all() else None


def _keep(path: Path, classifier: Tensor) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        save_file({"classifier": classifier}, partial)
        partial.replace(path)
    except OSError:  # a full disk or a home that cannot be written costs time the next time, and nothing now
        pass
