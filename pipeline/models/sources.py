"""Where an architecture's weights come from: the Hub, the package, or a folder in any of the common layouts."""

from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from types import MappingProxyType

from msgspec.structs import replace
from torch import Tensor

from probsurgery.pipeline import hub
from probsurgery.pipeline.datasets.tasks import Task
from probsurgery.pipeline.errors import InputError
from probsurgery.pipeline.files import MalformedError, SourceFile, read_json
from probsurgery.pipeline.models.checkpoints import (
    INDEX,
    LazyMapping,
    StateDict,
    check_state,
    read_tensors,
    refuse_adapter,
    shards,
)
from probsurgery.pipeline.models.encoders import MAX_CONFIG_BYTES, Encoder, get_encoder

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", f".safetensors{INDEX}", f".bin{INDEX}")


class Weights:
    """The checkpoints of an encoder: the pre-trained tower and an expert for each task.

    `folder` can have these layouts, also mixed, at its top or under the model's name (`ViT-B-32`): plain names
    (`pretrained.safetensors`, `<task>.pt`, ...); folders as the Hub's client writes them, or its cache; the
    task-vectors code's `zeroshot.pt` and `<Task>/finetuned.pt`. Without a folder, the published weights are used.
    `given` says where some of them are instead, by task or `pretrained`: a file, a folder of a model, or
    `hf:owner/name`, of which `folder` may have a copy. Every state dict returned has been checked against the encoder;
    `InputError` names the first key that differs.
    """

    def __init__(
        self, encoder: Encoder | str, folder: str | Path | None = None, given: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        self.encoder = get_encoder(encoder) if isinstance(encoder, str) else encoder
        self.row = self.encoder.arch
        self.folder = Path(folder) if folder is not None else self.row.folder
        self.given = given
        if self.folder is None and self.row.expert_repo is None and not given:
            raise InputError(f"no experts of {self.encoder.name} are published; give --checkpoints FOLDER")
        if self.folder is not None and not self.folder.is_dir():
            raise InputError(f"no folder of checkpoints at {self.folder}; --checkpoints takes a folder")
        self.files: dict[str, SourceFile] = {}
        """Every file read so far, by its content: `pretrained`, a task, `classifier <task>`, `merged <name>`."""
        self._paths: dict[str, Path] = {}
        self._checked: set[Path] = set()
        self._shapes = self.encoder.shapes

        model = self.row.open_clip.removesuffix("-quickgelu")
        self.places: tuple[Path, ...] = (self.folder, self.folder / model) if self.folder else ()
        """Where to look for files: the folder, and the folder in it that has the model's name."""
        self.names = list(self._shapes)
        """Names of a tower's tensors, in order."""

    @cached_property
    def pretrained_file(self) -> Path:
        """The checkpoint that the experts were fine-tuned from."""
        stems, repo = ["pretrained", "zeroshot"], self.row.pretrained_repo
        own = self.encoder.own_weights
        found = self.folder is not None and self._look(self.folder, [*stems, *_names(repo)], repo) is not None
        if own is None or found or "pretrained" in self.given:
            return self._file("pretrained", stems, repo)
        path = own()
        self.record("pretrained", path, repo or str(path.absolute()))
        return path

    def pretrained(self) -> StateDict:
        """The tower that the experts were fine-tuned from."""
        state = self.load(self.pretrained_file)
        return {name: state[name] for name in self.names}

    def expert(self, task: Task) -> Mapping[str, Tensor]:
        """The tower that was fine-tuned on a task."""
        suffix, published = task.expert_suffix, self.row.expert_repo
        repo = published.format(suffix) if published and suffix else None
        titles = [f"{task.title}/finetuned", f"{task.title}Val/finetuned"] if task.title else []
        return self.load(self._file(task.name, [task.name, *titles], repo))

    def experts(self, tasks: Sequence[Task]) -> Mapping[str, Mapping[str, Tensor]]:
        """The experts by task, each opened on access, so that no more than one needs to be in memory."""
        return LazyMapping({task.name: partial(self.expert, task) for task in tasks})

    def own(self, name: str) -> Mapping[str, Tensor]:
        """Another tower of the folder, such as `traditional-mtl`."""
        if self.folder is None:
            problem = f"no {name} checkpoint of {self.encoder.name} is published"
            raise InputError(f"{problem}; put {name}.safetensors in --checkpoints")
        return self.load(self._file(name, [name], None))

    def merged(self, path: Path) -> Mapping[str, Tensor]:
        """A merged checkpoint from elsewhere: a file, or the folder of a model."""
        state, file = self.load(path), hub.weights_in(path)
        self.record(f"merged {path.stem}", file, file.name)
        return state

    def load(self, path: Path) -> Mapping[str, Tensor]:
        """Any checkpoint of this encoder, in its own names and float32, read tensor by tensor if possible."""
        path = hub.weights_in(path)
        tensors = read_tensors(path)
        if path.name in hub.ADAPTERS and path != self.pretrained_file:
            state = self._adapted(path, tensors)
        else:
            refuse_adapter(tensors, path)
            state = self.encoder.state(tensors, lambda: self._projection)
        if path not in self._checked:
            check_state(state, self._shapes, str(path), self.encoder.name)
            self._check_config(path)
            self._checked.add(path)
        return state

    def _adapted(self, path: Path, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The pre-trained tower with an adapter merged into it."""
        from probsurgery.pipeline.models.adapters import merged_adapter
        from probsurgery.pipeline.models.transformers_encoder import TransformersEncoder

        if not isinstance(self.encoder, TransformersEncoder):
            problem = (
                f"{path.parent} is an adapter, and adapters are for models of transformers, not {self.encoder.name}"
            )
            raise InputError(f"{problem}; name the model as the encoder, or merge it with peft's merge_and_unload()")
        return merged_adapter(path.parent, tensors, self.pretrained(), self.encoder)

    def record(self, content: str, path: Path, source: str) -> None:
        """Add a file to `files`. Raises `InputError` if it differs from the Hub's digest of it."""
        self.files[content] = replace(hub.checked_digest(path), source=source)
        for shard in shards(path):
            self.files[f"{content} {shard.name}"] = replace(hub.checked_digest(shard), source=source)

    @cached_property
    def _projection(self) -> Tensor:
        """The pre-trained visual projection (width, d)."""
        state = self.encoder.state(read_tensors(self.pretrained_file))
        name = self.encoder.projection
        if name is None or name not in state:
            raise InputError(f"{self.pretrained_file} lacks the visual projection, and so do the experts' checkpoints")
        return state[name]

    def _check_config(self, path: Path) -> None:
        """Compare the config.json beside a checkpoint, if there is one that can be read."""
        try:
            config = read_json(path.parent / "config.json", MAX_CONFIG_BYTES)
        except (OSError, MalformedError):
            return
        if isinstance(config, dict):
            self.encoder.check_config(config, path)

    def _file(self, content: str, stems: Sequence[str], repo: str | None) -> Path:
        if content not in self._paths:
            place = self.given.get(content, "")
            repo = place.removeprefix("hf:") if place.startswith("hf:") else repo
            if place and not place.startswith("hf:"):
                path, source = hub.weights_in(Path(place)), place
            elif self.folder is None:
                if repo is None:
                    problem = f"no checkpoint of {content!r} of {self.encoder.name} is published"
                    raise InputError(f"{problem}; say where it is in the suite, or give --checkpoints FOLDER")
                path, source = hub.download(repo, "--checkpoints"), repo
                if path.name in hub.ADAPTERS:
                    hub.download(repo, "--checkpoints", (hub.ADAPTER_CONFIG,))
            else:
                path = self._find(self.folder, content, stems, repo)
                source = str(path.relative_to(self.folder))
            self.record(content, path, source)
            self._paths[content] = path
        return self._paths[content]

    def _find(self, folder: Path, content: str, stems: Sequence[str], repo: str | None) -> Path:
        """The first file that exists, of all names that the layouts allow. Raises `InputError` if there is none."""
        candidates = [*stems, *_names(repo)]
        if path := self._look(folder, candidates, repo):
            return path
        tried = [f"{stem}{SUFFIXES[0]}" if "/" not in stem else f"{stem}.pt" for stem in candidates]
        content_of_folder = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
        raise InputError(
            f"no checkpoint of {content!r} in {folder}; looked for {', '.join(tried)} and the like, "
            f"also in {self.places[-1].name}/; the folder holds: {content_of_folder}"
        )

    def _look(self, folder: Path, candidates: Sequence[str], repo: str | None) -> Path | None:
        for stem in (place / stem for place in self.places for stem in candidates):
            files = [stem.with_name(stem.name + suffix) for suffix in SUFFIXES]
            files += [stem / name for name in (*hub.WEIGHT_FILES, *hub.ADAPTERS)]
            if path := next(filter(Path.is_file, files), None):
                return path
        return hub.cached(repo, folder) if repo else None


def _names(repo: str | None) -> list[str]:
    """Names under which a repository may lie in a folder."""
    return [repo.split("/")[-1], repo] if repo else []
