"""Train the weights of the mini suite from scratch: `python -m probsurgery.pipeline.mini.make [--out DIR]`.

A small vision transformer (the base) is trained for a few steps on all train splits, with one linear classifier per
task. One expert per task is fine-tuned from it on that task alone, and one encoder on all tasks (traditional multi-task
learning), both with frozen classifiers. Test splits are read only at the end, for the record. Everything is seeded: the
same machine, library versions and number of threads give the same weights, others give similar ones."""

import argparse
import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

from probsurgery.pipeline.files import read_json, seal
from probsurgery.pipeline.heads import metrics
from probsurgery.pipeline.merging.registry import merge
from probsurgery.pipeline.mini import MINI_TASKS, load
from probsurgery.pipeline.models.encoders import get_encoder

HERE = Path(__file__).parent
State = dict[str, Tensor]
Data = Mapping[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Augment:
    """Random augmentation of a training image.

    `turn` is the largest angle in radians, `shift` the largest shift and `seen` the smallest and largest visible part
    of the picture, both as shares of its side, `light` the largest change of contrast and brightness."""

    mirror: bool = False
    turn: float = 0.0
    shift: float = 0.0
    seen: tuple[float, float] = (1.0, 1.0)
    light: float = 0.0


AUGMENT = {
    "mnist": Augment(turn=0.15, shift=0.08, seen=(0.9, 1.1)),
    "digits8": Augment(turn=0.15, shift=0.08, seen=(0.9, 1.1)),
    "fruit": Augment(mirror=True, turn=0.3, shift=0.15, seen=(0.5, 1.0), light=0.15),
    "street": Augment(mirror=True, turn=0.1, shift=0.15, seen=(0.6, 1.0), light=0.2),
    "xray": Augment(mirror=True, turn=0.1, shift=0.08, seen=(0.8, 1.1), light=0.15),
    "texture": Augment(mirror=True, shift=0.1, light=0.1),
    "landcover": Augment(mirror=True, turn=math.pi, shift=0.05, light=0.05),
}


@dataclass(frozen=True)
class Recipe:
    """Hyperparameters. The base is trained briefly on purpose: see the folder's README."""

    seed: int = 0
    logit_scale: float = 16.0
    weight_decay: float = 0.05
    base_steps: int = 400
    base_lr: float = 1e-3
    base_batch: int = 126
    expert_steps: int = 1200
    expert_lr: float = 3e-4
    expert_batch: int = 64
    expert_reach: float = 0.7
    augment: Mapping[str, Augment] = field(default_factory=lambda: AUGMENT)


def build_tower() -> nn.Module:
    """The visual tower of `mini.json`, newly initialised."""
    return open_clip.CLIP(**read_json(HERE / "mini.json", 2**20)).visual


def read_split(split: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Preprocessed images (N, 3, S, S) and labels (N,) by task."""
    transform, data = get_encoder("mini").preprocessing.transform, {}
    for task in MINI_TASKS:
        images, labels = load(task, split)
        data[task] = torch.stack([transform(image) for image in images]), torch.from_numpy(labels)
    return data


def augment(images: Tensor, how: Augment, generator: torch.Generator) -> Tensor:
    """(B, 3, S, S) -> (B, 3, S, S): each image with its own mirroring, rotation, zoom, shift and light."""

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator) * 2 - 1

    count = len(images)
    low, high = how.seen
    zoom = (low + high) / 2 + (high - low) / 2 * uniform(count)
    angle = how.turn * uniform(count)
    mirror = torch.sign(uniform(count)) if how.mirror else torch.ones(count)
    across, down = zoom * torch.cos(angle), zoom * torch.sin(angle)
    middle = how.shift * uniform(2, count) * 2
    theta = torch.stack([mirror * across, -mirror * down, middle[0], down, across, middle[1]], dim=1).view(count, 2, 3)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    contrast, brightness = (how.light * uniform(count, 1, 1, 1) for _ in range(2))
    return moved * (1 + contrast) + 2 * brightness


def logits(tower: nn.Module, images: Tensor, classifier: Tensor) -> Tensor:
    """(B, 3, S, S), (C, d) -> (B, C): normalised features times the classifier, whose rows include the logit scale."""
    return F.normalize(tower(images), dim=-1) @ classifier.T


def descend(
    parameters: Iterable[Tensor], loss_of: Callable[[], Tensor], steps: int, lr: float, weight_decay: float
) -> None:
    """AdamW with a warm-up over a tenth of the steps, then cosine decay to zero."""
    optimiser = torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, lr, total_steps=steps, pct_start=0.1, cycle_momentum=False
    )
    for _ in range(steps):
        optimiser.zero_grad()
        loss_of().backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        schedule.step()


def draw(data: tuple[Tensor, Tensor], count: int, how: Augment, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A random batch of `count` augmented images and their labels."""
    images, labels = data
    rows = torch.randint(len(labels), (count,), generator=generator)
    return augment(images[rows], how, generator), labels[rows]


def train_base(data: Data, recipe: Recipe) -> tuple[State, State]:
    """The tower and a classifier (C, d) per task, trained together on equal shares of every task."""
    generator = torch.Generator().manual_seed(recipe.seed)
    torch.manual_seed(recipe.seed)
    tower = build_tower().train()
    width: Any = tower.output_dim
    weights = {task: nn.Parameter(torch.randn(len(MINI_TASKS[task].class_names), width)) for task in data}
    share = recipe.base_batch // len(data)

    def loss_of() -> Tensor:
        batches = {task: draw(rows, share, recipe.augment[task], generator) for task, rows in data.items()}
        features = F.normalize(tower(torch.cat([images for images, _ in batches.values()])), dim=-1)
        losses = [
            F.cross_entropy(z @ unit_rows(weights[task], recipe).T, labels)
            for z, (task, (_, labels)) in zip(features.split(share), batches.items(), strict=True)
        ]
        return torch.stack(losses).mean()

    parameters = [*tower.parameters(), *weights.values()]
    descend(parameters, loss_of, recipe.base_steps, recipe.base_lr, recipe.weight_decay)
    return halved(tower.state_dict()), {task: unit_rows(rows.detach(), recipe) for task, rows in weights.items()}


def unit_rows(weight: Tensor, recipe: Recipe) -> Tensor:
    """(C, d) -> (C, d), every row scaled to the norm `logit_scale`."""
    return F.normalize(weight, dim=-1) * recipe.logit_scale


def train_expert(task: str, data: tuple[Tensor, Tensor], base: State, classifier: Tensor, recipe: Recipe) -> State:
    """The base fine-tuned on one task with a frozen classifier, then interpolated back towards the base.

    Weight interpolation as in WiSE-FT (Wortsman et al., CVPR 2022) at `expert_reach` keeps the experts mergeable.
    """
    generator = torch.Generator().manual_seed(recipe.seed + 1 + list(MINI_TASKS).index(task))
    tower = tower_of(base).train()

    def loss_of() -> Tensor:
        images, labels = draw(data, recipe.expert_batch, recipe.augment[task], generator)
        return F.cross_entropy(logits(tower, images, classifier), labels)

    descend(list(tower.parameters()), loss_of, recipe.expert_steps, recipe.expert_lr, recipe.weight_decay)
    return halved(merge("ta", base, [halved(tower.state_dict())], scale=recipe.expert_reach).state)


def train_mtl(data: Data, base: State, classifiers: State, recipe: Recipe) -> State:
    """The base fine-tuned on all tasks, with as many images of each as its expert is trained on."""
    generator = torch.Generator().manual_seed(recipe.seed + 1 + len(MINI_TASKS))
    tower = tower_of(base).train()

    def loss_of() -> Tensor:
        losses = []
        for task, rows in data.items():
            images, labels = draw(rows, recipe.expert_batch, recipe.augment[task], generator)
            losses.append(F.cross_entropy(logits(tower, images, classifiers[task]), labels))
        return torch.stack(losses).mean()

    descend(list(tower.parameters()), loss_of, recipe.expert_steps, recipe.expert_lr, recipe.weight_decay)
    return halved(tower.state_dict())


def halved(state: Mapping[str, Tensor]) -> State:
    """A copy in float16, as written to disk and used by every later step."""
    return {name: tensor.detach().to(torch.float16).contiguous() for name, tensor in state.items()}


def tower_of(state: Mapping[str, Tensor]) -> nn.Module:
    """A float32 tower with the weights `state`."""
    tower = build_tower()
    tower.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    return tower


@torch.inference_mode()
def accuracy(state: Mapping[str, Tensor], data: tuple[Tensor, Tensor], classifier: Tensor) -> float:
    """Share of correct answers in percent."""
    images, labels = data
    tower = tower_of(state).eval()
    features = torch.cat([tower(batch) for batch in images.split(512)])
    return 100 * metrics.accuracy(features, classifier, labels)


def evaluate(
    base: State, experts: Mapping[str, State], classifiers: State, mtl: State, test: Data
) -> dict[str, dict[str, float]]:
    """Test accuracy in percent by encoder and task, and the mean over tasks."""
    summed, averaged = (merge(method, base, experts).state for method in ("ta", "wa"))
    table = {}
    states: dict[str, Callable[[str], Mapping[str, Tensor]]] = {
        "pretrained": lambda task: base,
        "expert": lambda task: experts[task],
        "task_arithmetic": lambda task: summed,
        "weight_average": lambda task: averaged,
        "traditional_mtl": lambda task: mtl,
    }
    for name, state_of in states.items():
        row = {task: round(accuracy(state_of(task), rows, classifiers[task]), 2) for task, rows in test.items()}
        table[name] = {**row, "mean": round(sum(row.values()) / len(row), 2)}
    return table


def write(base: State, experts: Mapping[str, State], classifiers: State, mtl: State, folder: Path) -> list[Path]:
    """The safetensors files, in the order of the record."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {"pretrained": base, **experts, "classifiers": classifiers, "traditional-mtl": mtl}
    for name, tensors in files.items():
        (folder / f"{name}.safetensors").write_bytes(save(tensors))
    return [folder / f"{name}.safetensors" for name in files]


def make(folder: Path, recipe: Recipe) -> dict[str, Any]:
    """Train, write and evaluate. Returns the record, which is written next to the weights."""
    start = time.perf_counter()
    train = read_split("train")
    base, classifiers = train_base(train, recipe)
    report("base trained", start)
    experts = {}
    for task, rows in train.items():
        experts[task] = train_expert(task, rows, base, classifiers[task], recipe)
        report(f"expert {task} trained", start)
    mtl = train_mtl(train, base, classifiers, recipe)
    report("multi-task encoder trained", start)
    files = write(base, experts, classifiers, mtl, folder)
    test = read_split("test")
    record = {
        "command": "python -m probsurgery.pipeline.mini.make",
        "seconds": round(time.perf_counter() - start),
        "machine": {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "processor": platform.machine()},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "open_clip": open_clip.__version__,
        },
        "recipe": asdict(recipe),
        "tasks": {
            task: {
                "package": f"{MINI_TASKS[task].package}=={metadata.version(MINI_TASKS[task].package)}",
                "train_rows": len(train[task][1]),
                "test_rows": len(test[task][1]),
                "classes": len(MINI_TASKS[task].class_names),
            }
            for task in train
        },
        "test_accuracy": evaluate(base, experts, classifiers, mtl, test),
        "files": {path.name: seal(path).to_json() for path in files},
    }
    (folder / "record.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return record


def report(what: str, start: float) -> None:
    print(f"{time.perf_counter() - start:6.0f} s  {what}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the weights of the mini suite from scratch.")
    parser.add_argument("--out", type=Path, default=HERE / "weights", help="folder for the weights and their record")
    arguments = parser.parse_args()
    record = make(arguments.out, Recipe())
    for name, row in record["test_accuracy"].items():
        print(f"{name:16}" + "".join(f"{task} {value:.1f}  " for task, value in row.items()))
    total = sum(entry["bytes"] for entry in record["files"].values())
    print(f"{total / 1e6:.2f} MB in {len(record['files'])} files, {record['seconds']} s")


if __name__ == "__main__":
    main()
