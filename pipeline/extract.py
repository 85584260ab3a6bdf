"""Stage one: every image once through every encoder that needs it; features go to the store.

The path of an image: `reader.read_batches` decodes it, `_encode` maps it to features, `CacheWriter.write` keeps them.
Several merges in one run share the decoding and the experts' features, and each has a cache of its own.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from probsurgery.pipeline import encoders, merging
from probsurgery.pipeline.backends import SHARD_ROWS
from probsurgery.pipeline.checkpoints import StateDict, digest
from probsurgery.pipeline.config import ExtractConfig
from probsurgery.pipeline.device import choose_device
from probsurgery.pipeline.errors import InputError, ProbsurgeryError
from probsurgery.pipeline.reader import default_workers, read_batches
from probsurgery.pipeline.store import CacheWriter, check_target, locked
from probsurgery.pipeline.tasks import Images, Task, check_names, open_images, select_tasks
from probsurgery.pipeline.weights import Weights

Progress = Callable[[int, int, str], None]
"""Told how many images are done, how many there are in all, and what is being worked on."""

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
_MOST_DIFFERENCE = 0.1


@dataclass
class Extraction:
    """What a run of stage one did."""

    caches: list[Path]
    images: int = 0
    """Images that were encoded; 0 if everything was there already."""
    notes: list[str] = field(default_factory=list)
    """What a user should know of this run: images left out, precision."""
    seconds: dict[str, float] = field(
        default_factory=lambda: {"prepare": 0.0, "read": 0.0, "encode": 0.0, "write": 0.0}
    )
    """Wall time spent on checkpoints, merging and opening data sets; waiting for images; encoding; waiting for the
    writer. What the main thread waits for images is what reading costs beyond what the workers do meanwhile."""


@dataclass(frozen=True)
class _Merge:
    """One merged model and where its cache goes."""

    name: str
    path: Path
    state: StateDict
    about: dict
    """Method, settings and digest, as kept in the identity."""


@dataclass(frozen=True)
class _Target:
    """One array to be filled: which encoder's features, and which of its parts are lacking."""

    writer: CacheWriter
    array: str
    encoder: str
    parts: set[int]


def extract(config: ExtractConfig, progress: Progress = lambda done, total, what: None) -> Extraction:
    """Run stage one. Goes on where an interrupted run of the same settings stopped.

    Raises `InputError` before anything is written if the request cannot be met, or if a cache of other settings is
    where this one would go.
    """
    begun = time.perf_counter()
    row = encoders.get_arch(config.arch)
    tasks = select_tasks(row.suite, config.tasks)
    if config.only is not None:
        check_names(config.only, [task.name for task in tasks])
    now = tuple(task for task in tasks if config.only is None or task.name in config.only)
    paths = _cache_paths(config, tasks, whole_suite=len(tasks) == len(select_tasks(row.suite, None)))
    device = choose_device(config.device)
    weights = Weights(config.arch, config.checkpoints)
    pretrained = weights.pretrained()
    classifiers = weights.classifiers(now, device)
    digests = {"pretrained": digest(pretrained)}
    for task, expert in zip(tasks, weights.experts(tasks), strict=True):
        digests[task.name] = digest(expert)
    images = {
        (split, task.name): open_images(task, split, config.data, config.limit, any_rows=config.any_rows)
        for split in config.splits
        for task in now
    }
    merges = [_merge(name, path, weights, pretrained, tasks) for name, path in paths.items()]
    identities = [_identity(config, tasks, digests, merge) for merge in merges]
    for merge, identity in zip(merges, identities, strict=True):
        known = check_target(merge.path, identity, config.store, fresh=config.fresh)
        if known is not None:
            _check_data(merge.path, known["tasks"], images, classifiers)

    result = Extraction([merge.path for merge in merges])
    result.seconds["prepare"] = time.perf_counter() - begun
    with contextlib.ExitStack() as stack:
        for merge in merges:  # all of them, before the first is changed
            stack.enter_context(locked(merge.path))
        writers = [
            CacheWriter.begin(merge.path, identity, config.store, fresh=config.fresh)
            for merge, identity in zip(merges, identities, strict=True)
        ]
        for writer in writers:
            _register(writer, now, images, classifiers, weights.files)
        work = [
            (task, split, targets)
            for task in now
            for split in config.splits
            if (targets := _targets(config, writers, merges, task, split, len(images[split, task.name])))
        ]
        total = sum(_rows_of(targets, len(images[s, t.name])) for t, s, targets in work)
        towers: dict[str, nn.Module] = {}
        for task, split, targets in work:
            _load_towers(towers, targets, config.arch, merges, weights, pretrained, task, device)
            opened = images[split, task.name]
            _check_precision(config, opened, targets, towers, device)
            _fill(config, opened, targets, towers, device, result, lambda n, t=task: progress(n, total, t.name))
        for writer in writers if work else ():
            run = {"images": result.images, "seconds": {k: round(v, 3) for k, v in result.seconds.items()}}
            writer.manifest.setdefault("runs", []).append(run | {"device": _device_name(device)})
            writer.save()
        result.notes = _notes(writers[0].manifest)
    return result


def _cache_paths(config: ExtractConfig, tasks: Sequence[Task], *, whole_suite: bool) -> dict[str, Path]:
    """Where each merge's cache goes, by the merge as it was asked for."""
    paths = {}
    for merge in config.merges:
        if merge not in merging.METHODS and not Path(merge).is_file():
            raise InputError(
                f"unknown merge {merge!r}; choose from: {', '.join(merging.METHODS)}, "
                "or the path of a merged checkpoint"
            )
        name = merge if merge in merging.METHODS else Path(merge).stem
        subset = "" if whole_suite else "_" + "+".join(task.name for task in tasks)
        paths[merge] = Path(config.out or Path(config.root) / f"{config.arch}_{name}{subset}")
    if len(set(paths.values())) < len(paths):
        raise InputError("two of the merges would go to one cache; rename one of the checkpoints")
    return paths


def _merge(name: str, path: Path, weights: Weights, pretrained: StateDict, tasks: Sequence[Task]) -> _Merge:
    if name in merging.METHODS:
        state = merging.merge(name, pretrained, weights.experts(tasks))
        about = {"method": name, "settings": merging.METHODS[name].settings}
    else:
        state, about = weights.load(Path(name)), {"method": "file", "settings": {}}
    return _Merge(name, path, state, about | {"digest": digest(state)})


def _identity(config: ExtractConfig, tasks: Sequence[Task], digests: dict[str, str], merge: _Merge) -> dict:
    return {
        "arch": config.arch,
        "suite": tasks[0].suite,
        "dim": encoders.model_config(config.arch)["embed_dim"],
        "dtype": config.dtype,
        "precision": config.precision,
        "limit": config.limit,
        "tasks": [task.name for task in tasks],
        "checkpoints": digests,
        "merge": merge.about,
        "preprocessing": encoders.preprocessing(config.arch),
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
    config: ExtractConfig,
    writers: Sequence[CacheWriter],
    merges: Sequence[_Merge],
    task: Task,
    split: str,
    rows: int,
) -> list[_Target]:
    """The arrays of one task and split that lack parts, over all caches."""
    dim = encoders.model_config(config.arch)["embed_dim"]
    targets = []
    for writer, merge in zip(writers, merges, strict=True):
        sources = {"merged": f"merged {merge.name}", "expert": "expert"}
        if config.pretrained:
            sources["pretrained"] = "pretrained"
        prefix = f"{split}/{task.name}/"
        arrays = {prefix + kind: {"shape": [rows, dim], "dtype": config.dtype} for kind in sources}
        arrays[prefix + "labels"] = {"shape": [rows], "dtype": "int64"}
        writer.declare(arrays)
        for kind, encoder in (sources | {"labels": "labels"}).items():
            parts = writer.pending(prefix + kind)
            if parts:
                targets.append(_Target(writer, prefix + kind, encoder, parts))
    return targets


def _load_towers(
    towers: dict[str, nn.Module],
    targets: Sequence[_Target],
    arch: str,
    merges: Sequence[_Merge],
    weights: Weights,
    pretrained: StateDict,
    task: Task,
    device: torch.device,
) -> None:
    """Have the towers ready that the targets need; the expert is the task's, the others stay from task to task."""
    needed = {target.encoder for target in targets} - {"labels"}
    towers.pop("expert", None)
    if "expert" in needed:
        towers["expert"] = encoders.build_visual(arch, weights.expert(task)).to(device)
    states = {"pretrained": pretrained} | {f"merged {merge.name}": merge.state for merge in merges}
    for name in needed & states.keys() - towers.keys():
        towers[name] = encoders.build_visual(arch, states[name]).to(device)


def _parts_of(targets: Sequence[_Target]) -> list[int]:
    return sorted(set().union(*(target.parts for target in targets)))


def _part_range(part: int, rows: int) -> range:
    return range(part * SHARD_ROWS, min(rows, (part + 1) * SHARD_ROWS))


def _batches(config: ExtractConfig, parts: Sequence[int], rows: int) -> list[range]:
    """Rows of each batch; none crosses a part."""
    size = config.batch_size
    return [
        window[i : i + size]
        for part in parts
        for window in [_part_range(part, rows)]
        for i in range(0, len(window), size)
    ]


def _workers(config: ExtractConfig) -> int:
    """Processes that decode. The mini suite's images are in memory and small: starting workers takes longer."""
    if config.workers is not None:
        return config.workers
    return 0 if config.arch == "mini" else default_workers()


def _rows_of(targets: Sequence[_Target], rows: int) -> int:
    return sum(len(_part_range(part, rows)) for part in _parts_of(targets))


def _fill(
    config: ExtractConfig,
    images: Images,
    targets: Sequence[_Target],
    towers: dict[str, nn.Module],
    device: torch.device,
    result: Extraction,
    progress: Callable[[int], None],
) -> None:
    """Encode the lacking parts of one task and split and write them, part by part.

    A part is written by a thread while the next is encoded, so that an encoder waits for a slow disk only if the disk
    is slower than it.
    """
    parts = _parts_of(targets)
    batches = read_batches(images, config.arch, _batches(config, parts, len(images)), _workers(config), device)
    clock = time.perf_counter
    with ThreadPoolExecutor(max_workers=1) as thread:
        writing: Future | None = None
        for part in parts:
            here = [target for target in targets if part in target.parts]
            names = {target.encoder for target in here} - {"labels"}
            encoded: dict[str, list[Tensor]] = {name: [] for name in names}
            rows = _part_range(part, len(images))
            bad: dict[int, str] = {}
            for _ in range(0, len(rows), config.batch_size):
                start = clock()
                batch, undecoded = next(batches)
                result.seconds["read"] += clock() - start
                if undecoded and not config.skip_bad:
                    row, problem = next(iter(undecoded.items()))
                    name = here[0].array.rpartition("/")[0]
                    raise ProbsurgeryError(
                        f"image {row} of {name} cannot be decoded: {problem}; mend it, or leave such images out with "
                        "--skip-bad"
                    )
                bad |= undecoded
                start = clock()
                for name in names:
                    encoded[name].append(_encode(towers[name], batch, config.precision))
                result.seconds["encode"] += clock() - start
                result.images += len(batch)
                progress(result.images)
            start = clock()
            values = {name: torch.cat(blocks).cpu().numpy() for name, blocks in encoded.items()}
            result.seconds["encode"] += clock() - start
            start = clock()
            if writing is not None:
                writing.result()
            writing = thread.submit(_write, config, images.labels, here, part, rows, values, bad)
            result.seconds["write"] += clock() - start
        start = clock()
        if writing is not None:
            writing.result()
        result.seconds["write"] += clock() - start


def _write(
    config: ExtractConfig,
    labels: np.ndarray,
    targets: Sequence[_Target],
    part: int,
    rows: range,
    values: dict[str, np.ndarray],
    bad: dict[int, str],
) -> None:
    """Write one part of every target. Rows of images that were left out are NaN, and their labels -1."""
    left_out = [row - rows.start for row in bad]
    kept = labels[rows.start : rows.stop].copy()
    kept[left_out] = -1
    split, task, _ = targets[0].array.split("/")
    for writer in {id(target.writer): target.writer for target in targets}.values():
        stored = {}
        for target in targets:
            if target.writer is not writer:
                continue
            if target.encoder == "labels":
                stored[target.array] = kept
                continue
            stored[target.array] = _for_store(values[target.encoder], config.dtype, target.array, rows.start)
            stored[target.array][left_out] = np.nan
        if bad:
            skipped = writer.manifest["tasks"][task]["splits"][split].setdefault("skipped", {})
            skipped.update({str(row): problem for row, problem in bad.items()})
        writer.write(part, stored)


def _for_store(values: np.ndarray, dtype: str, array: str, first_row: int) -> np.ndarray:
    """Features as they are kept. Raises `ProbsurgeryError` if the encoder, or the type, made one NaN or infinite."""
    with np.errstate(over="ignore"):
        stored = values.astype(dtype)
    bad = np.flatnonzero(~np.isfinite(stored).all(-1))
    if len(bad):
        raise ProbsurgeryError(
            f"features {array} are NaN or infinite in row {first_row + bad[0]}; "
            "try --precision fp32 and --dtype float32, and check that checkpoint"
        )
    return stored


def _check_precision(
    config: ExtractConfig,
    images: Images,
    targets: Sequence[_Target],
    towers: dict[str, nn.Module],
    device: torch.device,
) -> None:
    """Compare the first batch with fp32, and keep the relative difference |z - z32| / |z32| in the manifests.

    Raises `ProbsurgeryError` if an encoder's is above `_MOST_DIFFERENCE`, which rounding alone does not make.
    """
    if config.precision == "fp32":
        return
    first = _batches(config, _parts_of(targets), len(images))[:1]
    batch, _ = next(read_batches(images, config.arch, first, 0, device))
    for target in targets:
        if target.encoder == "labels":
            continue
        exact = _encode(towers[target.encoder], batch, "fp32")
        difference = ((_encode(towers[target.encoder], batch, config.precision) - exact).norm() / exact.norm()).item()
        if not difference <= _MOST_DIFFERENCE:
            raise ProbsurgeryError(
                f"{config.precision} changes the first features of {target.array} by {difference:.1%} of their length; "
                "use --precision fp32"
            )
        target.writer.manifest.setdefault("precision", {})[target.array] = difference


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


@torch.inference_mode()
def _encode(tower: nn.Module, images: Tensor, precision: str) -> Tensor:
    """Images (B, 3, size, size) -> features (B, d) in float32, not normalised."""
    if precision == "fp32":
        # cuDNN would else compute the patch embedding in TF32.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            return tower(images).float()
    with torch.autocast(images.device.type, _AUTOCAST[precision]):
        return tower(images).float()
