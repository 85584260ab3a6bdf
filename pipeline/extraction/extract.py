"""Stage one: every image once through every encoder that needs it; features go to the store.

The path of an image: `reader.read_batches` decodes it, `encode.encode` maps it to features, `CacheWriter.write` keeps
them. Several merges in one run share the decoding and the experts' features, and each has a cache of its own. What a
cache beside it holds already is taken from there (`reuse`). Several ranks share the shards out among them (`ranks`).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor, nn

from probsurgery.pipeline.config import ExtractConfig
from probsurgery.pipeline.datasets.corruptions import checked, corrupt_images
from probsurgery.pipeline.datasets.tasks import Images, Task, check_names, open_images, select_tasks
from probsurgery.pipeline.device import choose_device
from probsurgery.pipeline.errors import InputError, ProbsurgeryError
from probsurgery.pipeline.extraction import merges
from probsurgery.pipeline.extraction.distributed import Ranks, joined
from probsurgery.pipeline.extraction.encode import Tally, Target, fill, parts_of
from probsurgery.pipeline.extraction.image_stream import samples_of
from probsurgery.pipeline.extraction.loading import default_workers
from probsurgery.pipeline.extraction.merges import MergedModel, Request
from probsurgery.pipeline.merging.registry import Samples
from probsurgery.pipeline.models import architectures
from probsurgery.pipeline.models.checkpoints import StateDict, digest
from probsurgery.pipeline.models.sources import Weights
from probsurgery.pipeline.store.formats import part_range
from probsurgery.pipeline.store.siblings import take_from_siblings
from probsurgery.pipeline.store.writer import CacheWriter, check_target, locked

Progress = Callable[..., None]
"""Told how many images are done, how many there are in all, and what is being worked on; with `unit="steps"`, how many
steps or images a merge has learned from."""


@dataclass
class Extraction(Tally):
    """What a run of stage one did."""

    caches: list[Path] = field(default_factory=list)
    taken: dict[str, int] = field(default_factory=dict)
    """Forward passes that were saved: rows of features taken from other caches, by the name of the cache."""
    notes: list[str] = field(default_factory=list)
    """What a user should know of this run: images left out, precision."""


_Work = tuple[Task, str, list[Target]]
"""A task and a split, and what is to be filled of them."""


def extract(config: ExtractConfig, progress: Progress = lambda done, total, what, unit="": None) -> Extraction:
    """Run stage one. Goes on where an interrupted run of the same settings stopped.

    Under torchrun, every rank calls this with the same settings, and each encodes its share of the shards; `progress`
    and the result are of use on rank 0 alone. Raises `InputError` before anything is written if the request cannot be
    met, or if a cache of other settings is where this one would go.
    """
    if config.corrupt is not None:
        config = replace(config, corrupt=checked(config.corrupt))
    with joined() as ranks:
        result = Extraction()
        with result.timed("prepare"):
            # Rank 0 goes first: what it downloads, and the classifiers that it makes, are there for the others.
            plan = ranks.lead(partial(_prepare, config, ranks), all_follow=True)
        result.caches = [request.path for request in plan.requests]
        with contextlib.ExitStack() as locks:
            models, writers = ranks.lead(lambda: _open(config, plan, locks, result, progress)) or _join(plan, ranks)
            if ranks.size > 1:  # a share is of what was lacking before any rank wrote
                ranks.total([0], meanwhile=lambda: None)
            _run(config, replace(plan, merges=models), writers, ranks, result, progress)
        return result


@dataclass(frozen=True)
class _Plan:
    """What a run works on: models and images, checked, and where features go."""

    tasks: tuple[Task, ...]
    now: tuple[Task, ...]
    """Those to extract now."""
    device: torch.device
    weights: Weights
    pretrained: StateDict
    classifiers: dict[str, Tensor]
    images: dict[tuple[str, str], Images]
    """By split and task."""
    requests: list[Request]
    identity: dict
    """What all the caches' identities have in common: all but the merge."""
    merges: list[MergedModel] = field(default_factory=list)

    def identity_of(self, about: dict) -> dict:
        """The identity of the cache of one merge."""
        return self.identity | {"merge": about}


def _prepare(config: ExtractConfig, ranks: Ranks) -> _Plan:
    row = architectures.get_arch(config.arch)
    tasks = select_tasks(row.suite, config.tasks)
    if config.only is not None:
        check_names(config.only, [task.name for task in tasks])
    now = tuple(task for task in tasks if config.only is None or task.name in config.only)
    requests = merges.requests(config, tasks, whole_suite=len(tasks) == len(select_tasks(row.suite, None)))
    device = choose_device(config.device, ranks.local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # pinned memory would else take room on the first GPU, in every rank
    weights = Weights(config.arch, config.checkpoints)
    pretrained = weights.pretrained()
    # A merge that learns needs those of all tasks.
    classifiers = weights.classifiers(tasks if any(request.learns for request in requests) else now, device)
    digests = {"pretrained": digest(pretrained)}
    digests |= {name: digest(expert) for name, expert in weights.experts(tasks).items()}
    images = {(split, task.name): _images(config, task, split) for split in config.splits for task in now}
    plan = _Plan(
        tasks, now, device, weights, pretrained, classifiers, images, requests, _identity(config, tasks, digests)
    )
    for request in requests if ranks.leads else ():
        known = check_target(request.path, plan.identity_of(request.about), config.store, fresh=config.fresh)
        if known is not None:
            _check_data(request.path, known["tasks"], images, classifiers)
    return plan


def _open(
    config: ExtractConfig, plan: _Plan, locks: contextlib.ExitStack, result: Extraction, progress: Progress
) -> tuple[list[MergedModel], list[CacheWriter]]:
    """Merge, open the caches for writing, declare what this run adds, and take what other caches hold of it."""
    for request in plan.requests:  # all of them, before the first is changed
        locks.enter_context(locked(request.path))
    models = []
    with result.timed("merge"):
        open_task = functools.cache(partial(_open_task, config, plan))
        samples = partial(_samples, config, plan, open_task, progress)
        for request in plan.requests:
            known = None if config.fresh else merges.kept(request, plan.identity_of(request.about), plan.weights)
            models.append(known or merges.make(request, plan.weights, plan.pretrained, plan.tasks, samples))
            if models[-1].keep:
                split = request.about["settings"]["split"]
                images = {task.name: open_task(task.name, split).fingerprint for task in plan.tasks}
                models[-1].record["images"] = images
    targets = [
        (m.path, plan.identity_of(m.about), config.store, config.fresh or (m.keep and merges.is_blank(request)))
        for request, m in zip(plan.requests, models, strict=True)
    ]
    for path, identity, store, fresh in targets:
        check_target(path, identity, store, fresh=fresh)
    writers = []
    for (path, identity, store, fresh), model in zip(targets, models, strict=True):
        writers.append(CacheWriter.begin(path, identity, store, fresh=fresh))
        merges.keep(writers[-1], model)
    plan = replace(plan, merges=models)
    taken = {}
    for writer, merge in zip(writers, plan.merges, strict=True):
        _register(writer, plan.now, plan.images, plan.classifiers, plan.weights.files)
        arrays = _arrays(config, plan)
        writer.declare(arrays)
        reused = take_from_siblings(writer, list(arrays), skip_bad=config.skip_bad)
        # The merges of one run would have shared the passes of the others' encoders.
        taken |= {(*key, merge.name if key[0].endswith("merged") else ""): rows for key, rows in reused.rows.items()}
        result.notes += [f"{problem}: it was encoded anew" for problem in reused.damaged]
    for cache, rows in taken.values():
        result.taken[cache] = result.taken.get(cache, 0) + rows
    return models, writers


def _join(plan: _Plan, ranks: Ranks) -> tuple[list[MergedModel], list[CacheWriter]]:
    """What the first rank has opened, with the merged models: those that it has learned are kept there."""
    models = []
    for request in plan.requests:
        known = merges.kept(request, plan.identity_of(request.about), plan.weights) if request.learns else None
        if known is None and request.learns:
            raise ProbsurgeryError(f"rank {ranks.rank} does not find what rank 0 has learned in {request.path}")
        models.append(known or merges.make(request, plan.weights, plan.pretrained, plan.tasks, lambda: None))
    return models, [CacheWriter.join(model.path, plan.identity_of(model.about), ranks.rank) for model in models]


def _samples(
    config: ExtractConfig, plan: _Plan, open_task: Callable[[str, str], Images], progress: Progress
) -> Samples:
    """Images of all merged tasks, for a merge that learns."""
    classifiers = {task.name: plan.classifiers[task.name] for task in plan.tasks}
    return samples_of(
        config.arch,
        open_task,
        classifiers,
        plan.device,
        _workers(config, Ranks()),
        skip_bad=config.skip_bad,
        progress=partial(progress, unit="steps"),
    )


def _open_task(config: ExtractConfig, plan: _Plan, name: str, split: str) -> Images:
    """Images of a merged task, which may be one that is not extracted now."""
    task = next(task for task in plan.tasks if task.name == name)
    known = plan.images.get((split, name))
    return known or _images(config, task, split)


def _images(config: ExtractConfig, task: Task, split: str) -> Images:
    opened = open_images(task, split, config.data, config.limit, any_rows=config.any_rows)
    return corrupt_images(opened, config.corrupt) if config.corrupt else opened


def _arrays(config: ExtractConfig, plan: _Plan) -> dict[str, dict]:
    """Every array that this run fills in each cache, as `{"shape", "dtype"}`."""
    dim = architectures.model_config(config.arch)["embed_dim"]
    kinds = ("merged", "expert", "pretrained") if config.pretrained else ("merged", "expert")
    arrays = {}
    for (split, task), images in plan.images.items():
        arrays |= {f"{split}/{task}/{kind}": {"shape": [len(images), dim], "dtype": config.dtype} for kind in kinds}
        arrays[f"{split}/{task}/labels"] = {"shape": [len(images)], "dtype": "int64"}
    return arrays


def _run(
    config: ExtractConfig,
    plan: _Plan,
    writers: Sequence[CacheWriter],
    ranks: Ranks,
    result: Extraction,
    progress: Progress,
) -> None:
    """Encode what the caches lack; of several ranks, this one's share."""
    work = [
        (task, split, targets)
        for task in plan.now
        for split in config.splits
        if (targets := _targets(config, writers, plan, task, split))
    ]
    total = _rows_of(work, plan)
    share = _share(work, plan, ranks)

    def show(what: str, images: int) -> None:
        if ranks.size > 1 and ranks.leads:
            for writer in writers:
                writer.collect()
            images += _rows_by_others(work, share, plan)
        progress(images, total, what)

    towers: dict[str, nn.Module] = {}
    for task, split, targets in share:
        _load_towers(towers, targets, config.arch, plan, task)
        images, workers = plan.images[split, task.name], _workers(config, ranks)
        fill(config, images, targets, towers, plan.device, workers, result, partial(show, task.name))
    if ranks.size > 1:
        own = result.images
        with result.timed("wait"):
            counts = ranks.total([own, result.passes], meanwhile=lambda: show("waiting for other ranks", own))
        result.images, result.passes = counts
    if not ranks.leads:
        return
    for writer in writers:
        writer.finish()
        if any(writer.pending(target.array) for _, _, targets in work for target in targets if target.writer is writer):
            raise ProbsurgeryError(f"{writer.path} lacks shards that other ranks should have written; run this again")
    if work or result.taken:
        run = {"images": result.images, "passes": result.passes, "taken": result.taken, "ranks": ranks.size}
        run |= {"seconds": {k: round(v, 3) for k, v in result.seconds.items()}, "device": _device_name(plan.device)}
        for writer in writers:
            writer.manifest.setdefault("runs", []).append(run)
            writer.save()
    result.notes += _notes(writers[0].manifest)


def _rows_of(work: list[_Work], plan: _Plan) -> int:
    """Images of the parts that are lacking."""
    return sum(
        len(part_range(part, len(plan.images[split, task.name])))
        for task, split, targets in work
        for part in parts_of(targets)
    )


def _share(work: list[_Work], plan: _Plan, ranks: Ranks) -> list[_Work]:
    """This rank's part of the work: a run of shards with its share of the rows, so that it loads few experts."""
    if ranks.size == 1:
        return work
    shards = [(i, part) for i, (_, _, targets) in enumerate(work) for part in parts_of(targets)]
    sizes = [len(part_range(part, len(plan.images[work[i][1], work[i][0].name]))) for i, part in shards]
    middles = [end - size / 2 for end, size in zip(accumulate(sizes), sizes, strict=True)]
    own = {s for s, middle in zip(shards, middles, strict=True) if int(ranks.size * middle / sum(sizes)) == ranks.rank}
    share = []
    for i, (task, split, targets) in enumerate(work):
        kept = [replace(target, parts={part for part in target.parts if (i, part) in own}) for target in targets]
        kept = [target for target in kept if target.parts]
        if kept:
            share.append((task, split, kept))
    return share


def _rows_by_others(work: list[_Work], share: list[_Work], plan: _Plan) -> int:
    """Images that the other ranks have done so far."""
    mine = {(task.name, split): set(parts_of(targets)) for task, split, targets in share}
    done = []
    for task, split, targets in work:
        waiting = set().union(*(target.writer.pending(target.array) for target in targets))
        parts = set(parts_of(targets)) - mine.get((task.name, split), set()) - waiting
        done.append((task, split, [replace(targets[0], parts=parts)]))
    return _rows_of(done, plan)


def _identity(config: ExtractConfig, tasks: Sequence[Task], digests: dict[str, str]) -> dict:
    # What was not corrupted has the identity that it had before there was a word for it.
    return ({"corruption": config.corrupt} if config.corrupt else {}) | {
        "arch": config.arch,
        "suite": tasks[0].suite,
        "dim": architectures.model_config(config.arch)["embed_dim"],
        "dtype": config.dtype,
        "precision": config.precision,
        "limit": config.limit,
        "tasks": [task.name for task in tasks],
        "checkpoints": digests,
        "preprocessing": architectures.preprocessing(config.arch),
    }


def _data(images: Images) -> dict:
    return {"rows": len(images), "fingerprint": images.fingerprint}


def _check_data(path: Path, known: dict, images: dict[tuple[str, str], Images], classifiers: dict[str, Tensor]) -> None:
    """Raise `InputError` if a cache holds features of other images, or another classifier, than this run has."""
    for (split, name), opened in images.items():
        about = known.get(name, {"classifier": digest({"": classifiers[name]}), "splits": {}})
        held = about["splits"].get(split, {})
        if _data(opened) != {name: held.get(name, value) for name, value in _data(opened).items()}:
            raise InputError(f"{path} was written from other images of {name} ({split}); use --fresh or --out")
        if about["classifier"] != digest({"": classifiers[name]}):
            raise InputError(f"{path} was written with another classifier of {name}; use --fresh or --out")


def _register(
    writer: CacheWriter,
    tasks: Sequence[Task],
    images: dict[tuple[str, str], Images],
    classifiers: dict[str, Tensor],
    files: dict[str, dict],
) -> None:
    """Note in the manifest what this run adds and what it is made from, and keep the classifiers."""
    writer.manifest.setdefault("files", {}).update(files)
    for task in tasks:
        about = {"classes": len(task.class_names), "class_names": list(task.class_names), "splits": {}}
        about["classifier"] = digest({"": classifiers[task.name]})
        about = writer.manifest["tasks"].setdefault(task.name, about)
        for (split, name), opened in images.items():
            if name == task.name:
                about["splits"].setdefault(split, _data(opened))
                origin = {"source": opened.source, "class_order": opened.class_order}
                about.setdefault("origins", {})[split] = origin
    writer.request([f"{split}/{name}" for split, name in images])
    names = {f"classifiers/{task.name}": classifiers[task.name].numpy() for task in tasks}
    writer.declare({name: {"shape": list(c.shape), "dtype": "float32"} for name, c in names.items()})
    for name, classifier in names.items():
        if writer.pending(name):
            writer.write(0, {name: classifier})


def _targets(
    config: ExtractConfig, writers: Sequence[CacheWriter], plan: _Plan, task: Task, split: str
) -> list[Target]:
    """The arrays of one task and split that lack parts, over all caches."""
    targets = []
    for writer, merge in zip(writers, plan.merges, strict=True):
        for array in _arrays(config, plan):
            prefix, _, kind = array.rpartition("/")
            parts = writer.pending(array) if prefix == f"{split}/{task.name}" else set()
            if parts:
                targets.append(Target(writer, array, f"merged {merge.name}" if kind == "merged" else kind, parts))
    return targets


def _load_towers(towers: dict[str, nn.Module], targets: Sequence[Target], arch: str, plan: _Plan, task: Task) -> None:
    """Have the towers ready that the targets need; the expert is the task's, the others stay from task to task."""
    needed = {target.encoder for target in targets} - {"labels"}
    towers.pop("expert", None)
    if "expert" in needed:
        towers["expert"] = architectures.build_visual(arch, plan.weights.expert(task)).to(plan.device)
    states = {"pretrained": plan.pretrained} | {f"merged {merge.name}": merge.state for merge in plan.merges}
    for name in needed & states.keys() - towers.keys():
        towers[name] = architectures.build_visual(arch, states[name]).to(plan.device)


def _workers(config: ExtractConfig, ranks: Ranks) -> int:
    """Processes that decode. The mini suite's images are in memory and small: starting workers takes longer."""
    if config.workers is not None:
        return config.workers
    return 0 if config.arch == "mini" else max(1, default_workers() // ranks.local_size)


def _notes(manifest: dict) -> list[str]:
    """What is worth saying of a finished run."""
    notes = []
    for task, about in manifest["tasks"].items():
        for split, data in about["splits"].items():
            if data.get("skipped"):
                rows = ", ".join(list(data["skipped"])[:5]) + (", ..." if len(data["skipped"]) > 5 else "")
                notes.append(f"{task} ({split}): {len(data['skipped'])} images left out, rows {rows}")
            order = about.get("origins", {}).get(split, {}).get("class_order", "")
            if "unknown" in order:
                notes.append(f"{task} ({split}): the order of the classes could not be checked ({order})")
    if "precision" in manifest:
        largest = max(manifest["precision"].values())
        notes.append(f"features differ from fp32 by at most {largest:.2%} of their length on the first batches")
    return notes


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
