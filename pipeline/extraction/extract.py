"""Stage one: every image once through every encoder that needs it; features go to the store.

The path of an image: `loading.read_batches` decodes it, `encode.encode` maps it to features, `CacheWriter.write` stores
them. Several merges in one run share the decoding and the experts' features, and each has a cache of its own. Features
that a cache beside it holds already are taken from there (`store.siblings`). Several ranks share the shards
(`distributed`).
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cache, partial
from itertools import accumulate, product
from pathlib import Path

import msgspec.structs
import numpy as np
import torch
from torch import nn

from probsurgery.pipeline.config import ExtractConfig
from probsurgery.pipeline.datasets.corruptions import checked
from probsurgery.pipeline.datasets.tasks import Task
from probsurgery.pipeline.device import multiplies_bf16
from probsurgery.pipeline.errors import ProbsurgeryError
from probsurgery.pipeline.extraction.distributed import Ranks, joined
from probsurgery.pipeline.extraction.encode import Tally, Target, fill, shards_of
from probsurgery.pipeline.extraction.image_stream import image_stream
from probsurgery.pipeline.extraction.loading import lost_workers
from probsurgery.pipeline.extraction.merges import MergedModel, has_no_features, load_learned, make_merge, store_learned
from probsurgery.pipeline.extraction.run_plan import RunPlan, decoding_workers, plan_run
from probsurgery.pipeline.merging.vectors import ImageStream, Machine
from probsurgery.pipeline.progress import Progress, no_progress
from probsurgery.pipeline.store.arrays import shard_rows
from probsurgery.pipeline.store.lock import locked
from probsurgery.pipeline.store.manifest import Manifest, Origin, Run, SplitRecord, described
from probsurgery.pipeline.store.siblings import take_from_siblings
from probsurgery.pipeline.store.target import check_target
from probsurgery.pipeline.store.writer import CacheWriter

_WORTH_A_NOTE = 60
"""Seconds of encoding from which a faster way is worth a line."""
Opened = Sequence[tuple[MergedModel, CacheWriter]]
"""The merged models of a run, each with the cache that its features go to."""


@dataclass
class Extraction(Tally):
    """What a run of stage one did."""

    caches: list[Path] = field(default_factory=list)
    taken: dict[str, int] = field(default_factory=dict)
    """Forward passes that were saved: rows of features taken from other caches, by the name of the cache."""
    notes: list[str] = field(default_factory=list)
    """What a user should know of this run: images left out, precision."""


@dataclass(frozen=True)
class _Work:
    """One task and split, and its arrays that lack shards."""

    task: Task
    split: str
    rows: int
    targets: list[Target]


def extract(config: ExtractConfig, progress: Progress = no_progress) -> Extraction:
    """Run stage one. Continues where an interrupted run of the same settings stopped.

    Under torchrun, every rank calls this with the same settings, and each encodes its share of the shards; `progress`
    and the result are of use on rank 0 alone. Raises `InputError` before anything is written if the request cannot be
    met, or if a cache of other settings is where this one would go.
    """
    if config.corrupt is not None:
        config = replace(config, corrupt=checked(config.corrupt))
    with lost_workers(), joined() as ranks:
        result = Extraction()
        with result.timed("prepare"):
            # Rank 0 goes first: the others find what it downloads, and the classifiers that it makes.
            make_plan = partial(plan_run, config, ranks, progress)
            plan = ranks.lead(make_plan, then=make_plan)
        result.caches = [request.path for request in plan.requests]
        with ExitStack() as locks:
            opened = ranks.lead(
                lambda: _open_caches(plan, locks, result, progress), then=lambda: _join_caches(plan, ranks)
            )
            if ranks.size > 1:  # shares are computed from what was missing before any rank wrote
                ranks.total([0], meanwhile=lambda: None)
            _fill_caches(plan, opened, ranks, result, progress)
        return result


def _open_caches(plan: RunPlan, locks: ExitStack, result: Extraction, progress: Progress) -> Opened:
    """Merge, open the caches for writing, declare this run's arrays, and take what other caches hold of them."""
    for request in plan.requests:  # all of them, before the first is changed
        locks.enter_context(locked(request.path))
    with result.timed("merge"):
        models = _merged_models(plan, progress)
    targets = []
    for model in models:
        fresh = plan.config.fresh or (model.is_new and has_no_features(model.request))
        target = model.request.path, plan.identity(model.identity), plan.config.store
        check_target(*target, fresh=fresh)  # all of them, before the first is changed
        targets.append((target, fresh))
    opened = []
    for (target, fresh), model in zip(targets, models, strict=True):
        opened.append((model, CacheWriter.begin(*target, fresh=fresh)))
        store_learned(opened[-1][1], model)
    taken: dict[tuple[str, int, str], tuple[str, int]] = {}
    for model, writer in opened:
        _register(writer, plan)
        writer.declare(plan.arrays)
        rows, problems = take_from_siblings(writer, list(plan.arrays), skip_bad=plan.config.skip_bad)
        # The merges of one run would have shared the passes of the other encoders.
        taken |= {(*k, model.request.name if k[0].endswith("merged") else ""): row for k, row in rows.items()}
        result.notes += [f"{problem}: they were encoded again" for problem in problems]
    for name, count in taken.values():
        result.taken[name] = result.taken.get(name, 0) + count
    return opened


def _merged_models(plan: RunPlan, progress: Progress) -> list[MergedModel]:
    """The run's merged models; those that learn are read from their caches if an earlier run has learned them."""
    open_images = cache(plan.open_images)

    def open_stream() -> ImageStream:
        return image_stream(
            plan.encoder,
            open_images,
            {task.name: plan.classifiers[task.name] for task in plan.tasks if task.name in plan.classifiers},
            plan.device,
            decoding_workers(plan.config, plan.images.values()),  # the other ranks wait meanwhile
            skip_bad=plan.config.skip_bad,
            progress=partial(progress, unit="steps"),
        )

    known = [
        None if plan.config.fresh else load_learned(request, plan.identity(request.identity), plan.weights)
        for request in plan.requests
    ]
    for request, learned in zip(plan.requests, known, strict=True):
        if request.learns and learned is None:
            for task, split in product(plan.tasks, request.splits):  # before the first merge learns, which takes long
                open_images(task.name, split)
    models = []
    for done, (request, learned) in enumerate(zip(plan.requests, known, strict=True)):
        progress(done, len(plan.requests), f"merging by {request.name}", unit="merges")
        machine = Machine(plan.device, progress)
        model = learned or make_merge(request, plan.weights, plan.pretrained, plan.tasks, open_stream, machine)
        if model.is_new:
            images = {}
            for split, task in product(request.splits, plan.tasks):
                key = task.name if len(request.splits) == 1 else f"{split}/{task.name}"
                images[key] = open_images(task.name, split).fingerprint
            model = replace(model, record=msgspec.structs.replace(model.record, images=images))
        models.append(model)
    return models


def _join_caches(plan: RunPlan, ranks: Ranks) -> Opened:
    """What the first rank has opened; the merged models that it has learned are read from there."""
    opened = []
    for request in plan.requests:
        model = load_learned(request, plan.identity(request.identity), plan.weights)
        if model is None and request.is_kept:
            raise ProbsurgeryError(
                f"rank {ranks.rank} does not find the weights that rank 0 has merged in {request.path}"
            )
        model = model or make_merge(request, plan.weights, plan.pretrained, plan.tasks, lambda: None)
        opened.append((model, CacheWriter.join(request.path, plan.identity(model.identity), ranks.rank)))
    return opened


def _register(writer: CacheWriter, plan: RunPlan) -> None:
    """Note in the manifest what this run adds and what it is made from, and store the classifiers."""
    tasks = dict(writer.manifest.tasks)
    own: dict[str, np.ndarray] = {}
    for task in plan.extracted:
        new, arrays = described(plan.classifiers.get(task.name), task.name, task.class_names, task.title)
        own |= arrays
        record = tasks.get(task.name, new)
        images = {split: plan.images[split, task.name] for split in plan.config.splits}
        splits = {
            split: SplitRecord(len(i), i.fingerprint, decoding=i.decoding, labels=i.has_labels)
            for split, i in images.items()
        }
        origins = {split: Origin(opened.source, opened.class_order) for split, opened in images.items()}
        merged = {"splits": {**splits, **record.splits}, "origins": {**record.origins, **origins}}
        merged |= {name: getattr(new, name) for name in ("classes", "class_names", "title")}  # a suite may rename them
        tasks[task.name] = msgspec.structs.replace(record, **merged)
    writer.update(files={**writer.manifest.files, **plan.weights.files}, tasks=tasks)
    writer.request([f"{split}/{name}" for split, name in plan.images])
    writer.add_whole(own)


def _fill_caches(plan: RunPlan, opened: Opened, ranks: Ranks, result: Extraction, progress: Progress) -> None:
    """Encode what the caches lack; of several ranks, this one's share."""
    work, writers = _missing_work(plan, opened), [writer for _, writer in opened]
    share = _share(work, ranks)
    total = sum(len(shard_rows(number, item.rows)) for item in work for number in shards_of(item.targets))

    def show(what: str) -> None:
        done = result.images
        if ranks.size > 1 and ranks.leads:
            for writer in writers:
                writer.collect()
            done += _rows_by_others(work, share)
        progress(done, total, what)

    towers: dict[str, nn.Module] = {}
    for item in share:
        _load_towers(towers, item, plan, opened)
        images = plan.images[item.split, item.task.name]
        fill(plan, images, item.targets, towers, result, partial(show, item.task.name))
    if ranks.size > 1:
        with result.timed("wait"):
            counts = ranks.total([result.images, result.passes], meanwhile=lambda: show("waiting for other ranks"))
        result.images, result.passes = counts
    if not ranks.leads:
        return
    for writer in writers:
        writer.finish()
        if any(writer.missing(target.array) for item in work for target in item.targets if target.writer is writer):
            raise ProbsurgeryError(f"{writer.path} lacks shards that other ranks should have written; run this again")
    if work or result.taken:
        seconds = {phase: round(value, 3) for phase, value in result.seconds.items()}
        cuda, cpu = plan.device.type == "cuda", f"cpu, {torch.get_num_threads()} threads"
        run = Run(
            images=result.images,
            passes=result.passes,
            taken=result.taken,
            ranks=ranks.size,
            seconds=seconds,
            device=torch.cuda.get_device_name(plan.device) if cuda else cpu,
        )
        for writer in writers:
            writer.update(runs=(*writer.manifest.runs, run))
    result.notes += _notes(writers[0].manifest)
    is_slow = result.seconds["encode"] > _WORTH_A_NOTE
    if plan.config.precision == "fp32" and is_slow and multiplies_bf16(plan.device):
        gain = "--precision bf16 encoded ViT-B/32 more than twice as fast, to features that differ by 1 %"
        result.notes.append(f"this processor multiplies bf16 numbers: {gain}")


def _missing_work(plan: RunPlan, opened: Opened) -> list[_Work]:
    """The arrays that lack shards, over all caches, by task and split."""
    work = []
    for task, split in product(plan.extracted, plan.config.splits):
        targets = []
        for (model, writer), array in product(opened, plan.arrays):
            prefix, _, kind = array.rpartition("/")
            if prefix == f"{split}/{task.name}" and (shards := writer.missing(array)):
                tower = f"merged {model.request.name}" if kind == "merged" else kind
                targets.append(Target(writer, array, tower, shards))
        if targets:
            work.append(_Work(task, split, len(plan.images[split, task.name]), targets))
    return work


def _share(work: list[_Work], ranks: Ranks) -> list[_Work]:
    """This rank's part of the work: consecutive shards with its share of the rows, so that it loads few experts."""
    if ranks.size == 1:
        return work
    shards = [(i, number) for i, item in enumerate(work) for number in shards_of(item.targets)]
    sizes = [len(shard_rows(number, work[i].rows)) for i, number in shards]
    middles = [end - size / 2 for end, size in zip(accumulate(sizes), sizes, strict=True)]
    own = {s for s, middle in zip(shards, middles, strict=True) if int(ranks.size * middle / sum(sizes)) == ranks.rank}
    share = []
    for i, item in enumerate(work):
        targets = [replace(t, shards={number for number in t.shards if (i, number) in own}) for t in item.targets]
        share.append(replace(item, targets=[target for target in targets if target.shards]))
    return [item for item in share if item.targets]


def _rows_by_others(work: list[_Work], share: list[_Work]) -> int:
    """Images that the other ranks have done so far."""
    own = {(item.task.name, item.split): set(shards_of(item.targets)) for item in share}
    rows = 0
    for item in work:
        missing = set().union(*(target.writer.missing(target.array) for target in item.targets))
        done = set(shards_of(item.targets)) - own.get((item.task.name, item.split), set()) - missing
        rows += sum(len(shard_rows(number, item.rows)) for number in done)
    return rows


def _load_towers(towers: dict[str, nn.Module], item: _Work, plan: RunPlan, opened: Opened) -> None:
    """Build the towers that a task needs; its expert's replaces the last one, the others stay from task to task."""
    towers.pop("expert", None)
    states = {"pretrained": plan.pretrained} | {f"merged {model.request.name}": model.state for model, _ in opened}
    for name in {target.encoder for target in item.targets} - {"labels"} - towers.keys():
        state = plan.weights.expert(item.task) if name == "expert" else states[name]
        towers[name] = plan.encoder.build(state).to(plan.device)


def _notes(manifest: Manifest) -> list[str]:
    """What a user should know of a finished run."""
    notes = []
    for name, task in manifest.tasks.items():
        for split, data in task.splits.items():
            if data.skipped:
                rows = ", ".join(list(data.skipped)[:5]) + (", ..." if len(data.skipped) > 5 else "")
                notes.append(f"{name} ({split}): {len(data.skipped)} images left out, rows {rows}")
            order = task.origins[split].class_order if split in task.origins else ""
            if "unknown" in order:
                notes.append(f"{name} ({split}): the order of the classes could not be checked ({order})")
    if manifest.precision:
        largest = max(manifest.precision.values())
        notes.append(f"features differ from fp32 by at most {largest:.2%} of their length on the first batches")
    return notes
