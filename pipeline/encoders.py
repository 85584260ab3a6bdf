"""Architectures: where their weights are published, the open_clip tower they build, and classifiers from text."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from probsurgery.pipeline.checkpoints import (
    StateDict,
    check_state,
    find_checkpoint,
    lacks_projection,
    read_tensors,
    to_visual,
)
from probsurgery.pipeline.errors import InputError, first_line, unknown
from probsurgery.pipeline.tasks import Task

MINI = Path(__file__).parent / "mini"


@dataclass(frozen=True)
class Arch:
    """One row of the table of architectures."""

    suite: str
    """Tasks that its published experts were fine-tuned on."""
    open_clip: str
    """Name of open_clip's configuration. The `-quickgelu` ones: OpenAI's weights need QuickGELU, and `ViT-B-32` and the
    like build plain GELU, which loads without an error and gives wrong features."""
    pretrained_repo: str | None = None
    """Hugging Face model whose image tower the experts were fine-tuned from."""
    expert_repo: str | None = None
    """Hugging Face models of the experts; `{}` stands for the task's suffix."""
    folder: Path | None = None
    """Folder of checkpoints that ships with the package."""
    config: Path | None = None
    """open_clip configuration that ships with the package; None: open_clip knows it by its name."""


ARCHS: dict[str, Arch] = {
    "mini": Arch("mini", "mini", folder=MINI / "weights", config=MINI / "mini.json"),
    "vitb32": Arch("clip8", "ViT-B-32-quickgelu", "openai/clip-vit-base-patch32", "tanganke/clip-vit-base-patch32_{}"),
    "vitb16": Arch("clip8", "ViT-B-16-quickgelu", "openai/clip-vit-base-patch16", "tanganke/clip-vit-base-patch16_{}"),
    "vitl14": Arch(
        "clip8", "ViT-L-14-quickgelu", "openai/clip-vit-large-patch14", "tanganke/clip-vit-large-patch14_{}"
    ),
}


def get_arch(name: str) -> Arch:
    """An architecture by name. Raises `InputError` for an unknown one."""
    if name not in ARCHS:
        raise unknown("arch", name, ARCHS)
    return ARCHS[name]


def model_config(arch: str) -> dict:
    """open_clip's configuration of an architecture: embed_dim d, the two towers, QuickGELU."""
    row = get_arch(arch)
    if row.config is not None:
        return json.loads(row.config.read_text())
    import open_clip

    return open_clip.get_model_config(row.open_clip)


def preprocessing(arch: str) -> dict:
    """What is done to an image before the encoder, as kept in a cache's identity."""
    import open_clip

    size = model_config(arch)["vision_cfg"]["image_size"]
    mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    return {"image_size": size, "resize": "shortest", "interpolation": "bicubic", "mean": list(mean), "std": list(std)}


def image_transform(arch: str) -> Callable:
    """PIL image -> tensor (3, size, size): open_clip's resize, centre crop, RGB and normalisation."""
    import open_clip

    p = preprocessing(arch)
    return open_clip.image_transform(
        p["image_size"],
        is_train=False,
        mean=tuple(p["mean"]),
        std=tuple(p["std"]),
        resize_mode=p["resize"],
        interpolation=p["interpolation"],
    )


def _empty_tower(arch: str) -> nn.Module:
    """The image tower without memory behind its parameters."""
    import open_clip

    with torch.device("meta"):
        return open_clip.CLIP(**model_config(arch)).visual


def expected_shapes(arch: str) -> dict[str, torch.Size]:
    """Names and shapes of the image tower's parameters."""
    return {name: tensor.shape for name, tensor in _empty_tower(arch).state_dict().items()}


def build_visual(arch: str, state: StateDict) -> nn.Module:
    """The image tower with these weights: images (B, 3, size, size) -> features (B, d), after the projection and not
    normalised, which is what open_clip's `encode_image` returns."""
    tower = _empty_tower(arch)
    tower.load_state_dict(state, strict=True, assign=True)
    return tower.eval().requires_grad_(False)


class Weights:
    """The checkpoints of an architecture: the pre-trained tower, an expert for each task, the classifiers.

    `folder` holds `pretrained`, one file for each task and, if classifiers are not to be made from text,
    `classifiers.safetensors`; see `checkpoints.find_checkpoint`. Without one, the published weights are used.
    Every state dict returned has been checked against the architecture; `InputError` names the first key that differs.
    """

    def __init__(self, arch: str, folder: str | Path | None = None) -> None:
        self.arch = arch
        self.row = get_arch(arch)
        self.folder = Path(folder) if folder is not None else self.row.folder
        if self.folder is not None and not self.folder.is_dir():
            raise InputError(f"no folder of checkpoints at {self.folder}; --checkpoints takes a folder")
        self._shapes = expected_shapes(arch)

    def pretrained(self) -> StateDict:
        """The tower that the experts were fine-tuned from."""
        return self.load(self._file("pretrained", self.row.pretrained_repo))

    def expert(self, task: Task) -> StateDict:
        """The tower that was fine-tuned on a task."""
        return self.load(self._file(task.name, self.row.expert_repo, task.expert_suffix))

    def experts(self, tasks: Sequence[Task]) -> Iterator[StateDict]:
        """The experts one at a time, so that no more than one needs to be in memory."""
        return (self.expert(task) for task in tasks)

    def load(self, path: Path) -> StateDict:
        """Any checkpoint of this architecture, in open_clip's names and float32."""
        held = read_tensors(path)
        state = to_visual(held, self._projection if lacks_projection(held) else None)
        check_state(state, self._shapes, str(path))
        return state

    @cached_property
    def _projection(self) -> Tensor:
        """The pre-trained visual projection (width, d)."""
        path = self._file("pretrained", self.row.pretrained_repo)
        state = to_visual(read_tensors(path))
        if "proj" not in state:
            raise InputError(f"{path} lacks the visual projection, which the experts' checkpoints leave out too")
        return state["proj"]

    def _file(self, name: str, repo: str | None, suffix: str = "") -> Path:
        if self.folder is not None:
            return find_checkpoint(self.folder, name)
        return _download(repo.format(suffix))

    def classifiers(self, tasks: Sequence[Task], device: torch.device) -> dict[str, Tensor]:
        """Zero-shot classifiers (C, d) of the tasks: from the folder if it holds them, else from the text tower."""
        file = self.folder / "classifiers.safetensors" if self.folder is not None else None
        if self.row.config is not None and not file.is_file():
            raise InputError(f"{self.folder} holds no classifiers.safetensors, which {self.arch} needs")
        if file is None or not file.is_file():
            return text_classifiers(self.arch, tasks, device)
        held = read_tensors(file)
        dim = model_config(self.arch)["embed_dim"]
        for task in tasks:
            if task.name not in held:
                raise InputError(f"{file} has no classifier of {task.name!r}; it holds: {', '.join(held)}")
            shape = (len(task.class_names), dim)
            if held[task.name].shape != shape:
                raise InputError(
                    f"{file}: {task.name!r} has shape {tuple(held[task.name].shape)}, not (C, d) = {shape}"
                )
        return {task.name: held[task.name].float() for task in tasks}


def _download(repo: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    for name in ("model.safetensors", "pytorch_model.bin"):
        try:
            return Path(hf_hub_download(repo, name))
        except LocalEntryNotFoundError as error:
            problem: Exception = error
            break
        except EntryNotFoundError as error:
            problem = error
        except Exception as error:  # the hub client raises its own, httpx's and the OS's errors for one cause: no file
            problem = error
            break
    raise InputError(
        f"cannot get the checkpoint {repo} from Hugging Face ({first_line(problem)}); check the connection, or give "
        "--checkpoints FOLDER"
    )


@torch.no_grad()
def text_classifiers(arch: str, tasks: Sequence[Task], device: torch.device) -> dict[str, Tensor]:
    """Zero-shot classifiers (C, d) from OpenAI's text tower.

    Each class name in each of the task's templates is embedded and normalised; the mean over templates is normalised
    again, and multiplied by exp(logit_scale).
    """
    import open_clip

    row = get_arch(arch)
    try:
        model = open_clip.create_model(row.open_clip, pretrained="openai", device=device)
    except Exception as error:  # as in `_download`
        raise InputError(
            f"cannot get OpenAI's text tower for {arch} ({first_line(error)}); check the connection, or put "
            "classifiers.safetensors into --checkpoints FOLDER"
        ) from None
    tokenizer = open_clip.get_tokenizer(row.open_clip)
    scale = model.logit_scale.exp()
    made = {}
    for task in tasks:
        weights = open_clip.build_zero_shot_classifier(
            model.eval(), tokenizer, task.class_names, task.templates, device=device
        )
        made[task.name] = (scale * weights.T).float().cpu().contiguous()
    return made
