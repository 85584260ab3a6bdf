"""What a run of stage one works on: the request checked, models and images opened, before anything is written."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import count, product
from pathlib import Path

import torch

from probsurgery.pipeline.classifier import Classifier
from probsurgery.pipeline.config import ExtractConfig
from probsurgery.pipeline.datasets.corruptions import corrupt_images
from probsurgery.pipeline.datasets.pictures import DECODING
from probsurgery.pipeline.datasets.suites import Suite, check_names, load_suite, own_suite
from probsurgery.pipeline.datasets.tasks import Images, Task, open_images
from probsurgery.pipeline.device import choose_device
from probsurgery.pipeline.errors import InputError
from probsurgery.pipeline.extraction.distributed import Ranks
from probsurgery.pipeline.extraction.merges import MergeRequest, merge_requests
from probsurgery.pipeline.models.checkpoints import StateDict, digest
from probsurgery.pipeline.models.encoders import Encoder, get_encoder
from probsurgery.pipeline.models.sources import Weights
from probsurgery.pipeline.models.text_classifiers import load_classifiers
from probsurgery.pipeline.progress import Progress, no_progress
from probsurgery.pipeline.store.arrays import KINDS, ArraySpec
from probsurgery.pipeline.store.manifest import Identity, Manifest, MergeIdentity, TaskRecord
from probsurgery.pipeline.store.target import check_target


@dataclass(frozen=True, eq=False)
class RunPlan:
    """A run's models and images, checked, and where its features go."""

    config: ExtractConfig
    suite: str
    tasks: tuple[Task, ...]
    """Tasks whose experts are merged."""
    extracted: tuple[Task, ...]
    """Those of them that this run extracts."""
    requests: list[MergeRequest]
    images: Mapping[tuple[str, str], Images]
    """By split and task."""
    device: torch.device
    workers: int
    """Processes that decode images."""
    weights: Weights
    pretrained: StateDict
    classifiers: Mapping[str, Classifier]
    """Without those of tasks that have none."""
    checkpoints: Mapping[str, str]
    """Digests of the encoders' weights: `pretrained`, and each expert by its task."""

    def identity(self, merge: MergeIdentity) -> Identity:
        """The identity of the cache of one merge."""
        config = self.config
        return Identity(
            corruption=config.corrupt,
            arch=self.encoder.name,
            suite=self.suite,
            dim=self.dim,
            dtype=config.dtype,
            precision=config.precision if config.precision == "fp32" else f"{config.precision} weights",
            limit=config.limit,
            tasks=tuple(task.name for task in self.tasks),
            checkpoints=self.checkpoints,
            preprocessing=self.encoder.preprocessing.to_json(),
            encoder=self.encoder.description,
            merge=merge,
        )

    @property
    def encoder(self) -> Encoder:
        """What encodes the images, with each of the models' weights."""
        return self.weights.encoder

    @property
    def dim(self) -> int:
        """d, the features' width."""
        return self.encoder.dim

    @property
    def arrays(self) -> dict[str, ArraySpec]:
        """Every array that this run fills in each cache."""
        arrays = {}
        for (split, task), images in self.images.items():
            for kind in KINDS if self.config.pretrained else ("merged", "expert"):
                arrays[f"{split}/{task}/{kind}"] = ArraySpec((len(images), self.dim), self.config.dtype)
            if images.has_labels:
                arrays[f"{split}/{task}/labels"] = ArraySpec((len(images),), "int64")
        return arrays

    def open_images(self, name: str, split: str) -> Images:
        """Images of a merged task, which may be one that this run does not extract."""
        if (split, name) in self.images:
            return self.images[split, name]
        return _open(self.config, next(task for task in self.tasks if task.name == name), split)


def plan_run(config: ExtractConfig, ranks: Ranks, progress: Progress = no_progress) -> RunPlan:
    """Check a request and open everything that it names. Raises `InputError` for what is wrong with it.

    Of several ranks, the first alone compares it with the caches that are there. `progress` is told what is read.
    """
    suite, encoder, stem = chosen(config)
    tasks = suite.select(config.tasks)
    if config.only is not None:
        check_names(config.only, [task.name for task in tasks])
    extracted = tuple(task for task in tasks if config.only is None or task.name in config.only)
    requests = merge_requests(config, encoder, tasks, stem, whole_suite=len(tasks) == len(suite.tasks))
    device = choose_device(config.device, ranks.local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # otherwise every rank's pinned memory would take room on the first GPU
    splits = list(product(config.splits, extracted))
    done, total = count(), 2 + len(tasks) + len(splits)

    def begin(what: str) -> None:
        progress(next(done), total, what, unit="files")

    begin("reading the pre-trained encoder")
    weights = Weights(encoder, config.checkpoints, suite.places)
    pretrained = weights.pretrained()
    checkpoints = {"pretrained": digest(pretrained)}
    for request in requests:  # before another merge of this run learns, which takes long
        if request.chain is None:
            weights.merged(Path(request.name))
        elif request.chain.is_checkpoint:
            weights.own(request.name)
    begin("making classifiers")
    # A merge that learns needs the classifiers of all tasks.
    needed = tasks if any(request.learns for request in requests) else extracted
    classifiers = load_classifiers(weights, needed, device)
    for request, task in product(requests, needed):
        if request.classifies and task.name not in classifiers:
            advice = "choose another --merge, or --tasks without it"
            raise InputError(f"{request.name} learns from predictions, and {task.name} has no classifier; {advice}")
    for task in tasks:
        begin(f"reading the expert of {task.name}")
        checkpoints[task.name] = digest(weights.expert(task))
    images = {}
    for split, task in splits:
        begin(f"opening {task.name} ({split})")
        images[split, task.name] = _open(config, task, split)
    workers = decoding_workers(config, images.values(), ranks.local_size)
    models = (weights, pretrained, classifiers, checkpoints)
    plan = RunPlan(config, suite.name, tasks, extracted, requests, images, device, workers, *models)
    for request in requests if ranks.leads else ():
        manifest = check_target(request.path, plan.identity(request.identity), config.store, fresh=config.fresh)
        if manifest is not None:
            _check_data(request.path, manifest.tasks, plan)
            _check_decoding(request.path, manifest, plan)
    return plan


def chosen(config: ExtractConfig) -> tuple[Suite, Encoder, str]:
    """The suite of a run, its encoder, and what its caches' default names begin with.

    Raises `InputError` unless exactly one of the suite and `arch` names the encoder.
    """
    own = own_suite(config.arch) if config.arch else None
    suite = load_suite(config.suite or str(own))
    if suite.encoder is None:
        if config.arch is None:
            raise InputError(f"the suite {suite.name} names no encoder; give --arch")
        encoder = get_encoder(config.arch)
        return suite, encoder, encoder.name if suite.name == own else f"{encoder.name}-{suite.name}"
    if config.arch is not None:
        raise InputError(f"{suite.path} names its encoder, {suite.encoder.model}; leave --arch out")
    choice = suite.encoder
    return suite, get_encoder(choice.model, pooling=choice.pooling, projection=choice.projection), suite.name


def decoding_workers(config: ExtractConfig, images: Iterable[Images], ranks: int = 1) -> int:
    """Processes that decode for each of the ranks on this machine.

    Images that are pixels in memory need none: starting workers would take longer than preparing the images.
    """
    if config.workers is not None:
        return config.workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // ranks) if any(opened.decoding for opened in images) else 0


def _open(config: ExtractConfig, task: Task, split: str) -> Images:
    """One split of a task, with the run's corruption, if it has one."""
    images = open_images(task, split, config.data, config.limit, any_rows=config.any_rows)
    return corrupt_images(images, config.corrupt) if config.corrupt else images


def _check_data(path: Path, known: Mapping[str, TaskRecord], plan: RunPlan) -> None:
    """Raise `InputError` if a cache holds features of other images, or another classifier, than this run has."""
    for (split, name), images in plan.images.items():
        if name not in known:
            continue
        recorded = known[name].splits.get(split)
        if recorded and (recorded.rows, recorded.fingerprint) != (len(images), images.fingerprint):
            raise InputError(f"{path} was written from other images of {name} ({split}); use --fresh or --out")
        classifier = plan.classifiers.get(name)
        if known[name].classifier != (classifier.digest if classifier else ""):
            raise InputError(f"{path} was written with another classifier of {name}; use --fresh or --out")


def _check_decoding(path: Path, manifest: Manifest, plan: RunPlan) -> None:
    """Raise `InputError` if image files that are decoded now would join others that were decoded to other pixels."""
    now = {(split, name): images for (split, name), images in plan.images.items() if images.decoding}
    files = [key for key, images in now.items() if images.from_files]
    lacking = {tuple(name.split("/")[:2]) for name in plan.arrays if not _is_complete(manifest, name)}
    added = next((f"{name} ({split})" for split, name in files if (split, name) in lacking), None)
    recorded = [(s, name, record) for name, task in manifest.tasks.items() for s, record in task.splits.items()]
    for split, name, record in recorded if added else ():
        cannot_differ = (split, name) in now and (split, name) not in files
        if record.decoding != DECODING and not cannot_differ:
            raise InputError(
                f"{path} holds features of {name} ({split}) whose image files another version of probsurgery decoded, "
                f"perhaps to other pixels, and lacks {added}; use --fresh or another --out"
            )


def _is_complete(manifest: Manifest, array: str) -> bool:
    return array in manifest.arrays and None not in manifest.arrays[array].shards
