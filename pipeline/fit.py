"""Stage two: cached features -> heads and results. The encoders are never touched, and no label reaches the fit."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from probsurgery.pipeline.config import FitConfig, differences, head_kind
from probsurgery.pipeline.device import choose_device
from probsurgery.pipeline.errors import InputError
from probsurgery.pipeline.heads import Head, load_head, parameter_count, stack_params
from probsurgery.pipeline.metrics import accuracy, representation_bias
from probsurgery.pipeline.store import Cache, TaskData, load_task, require_writable, software
from probsurgery.pipeline.tasks import check_names
from probsurgery.pipeline.train import Fitted, Job, Rows, fit_heads, generator, head_steps

Progress = Callable[[int, int], None]
"""Told how many head-steps are done, and how many there are in all."""


@dataclass(frozen=True)
class FitResult:
    """A fitted head and how good it is on each task."""

    head: Head
    path: Path
    rows: list[dict]
    """One for each task, as in results.jsonl."""
    repeated: bool = False
    """The same head was there already, and nothing was done."""


def fit(config: FitConfig, progress: Progress = lambda done, total: None) -> FitResult:
    """Run stage two for one setting.

    Raises `InputError` before anything is written if the cache lacks what is asked for, or if a head of that name
    exists with other settings. The same request again returns what is there.
    """
    cache = Cache(config.cache)
    tasks = _tasks(cache, config)
    # Named after its tasks unless it has all that are merged: a head of those extracted so far is not in the way then.
    config = replace(config, tasks=None if len(tasks) == len(cache.identity["tasks"]) else tasks)
    device = choose_device(config.device)
    name = config.name or config.default_name()
    results = Path(config.results or cache.path)
    folder = results / "heads" / name
    request = _request(config, cache, tasks)
    if folder.exists():
        return _existing(folder, request, results)
    require_writable(folder, "--results")

    data = {task: load_task(cache, task) for task in tasks}
    splits = {task: _split_rows(config, data[task]) for task in tasks}
    jobs = _jobs(config, cache, data, splits)
    total, done = sum(map(head_steps, jobs)), 0

    def count(steps: int) -> None:
        nonlocal done
        done += steps
        progress(done, total)

    start = time.perf_counter()
    fitted = fit_heads(jobs, device, count)
    seconds = time.perf_counter() - start
    head = Head(config.head, tasks, cache.dim, stack_params([f.params for f in fitted]), config.shared)
    fit_rows = {rows.task: len(rows.merged) for job in jobs for rows in job.rows}
    rows = [
        _evaluate(head, data[task], splits[task][1])
        | _about(config, cache, name, task, seconds / len(jobs))
        | {"fit_rows": fit_rows[task], "device": str(device)}
        for task in tasks
    ]
    record = {"request": request, "results": rows, "fits": _fits(jobs, fitted), "software": software()}
    record["seconds"] = seconds
    head = replace(head, record=record)
    if not _write(head, folder):  # the same request was fitted meanwhile
        return _existing(folder, request, results)
    _append(results, rows)
    return FitResult(head, folder, rows)


def _tasks(cache: Cache, config: FitConfig) -> tuple[str, ...]:
    """The tasks to fit, in the order of the cache; each is whole in the splits that the fit needs."""
    if config.tasks is None:
        tasks = cache.tasks("test")
        if not tasks:
            raise InputError(f"{cache.path} holds no task; run `probsurgery extract`")
    else:
        check_names(config.tasks, cache.identity["tasks"])
        tasks = tuple(task for task in cache.identity["tasks"] if task in config.tasks)
    for task in tasks:
        cache.require(task, "test")
        cache.require(task, config.fit_split)
    return tasks


def _request(config: FitConfig, cache: Cache, tasks: Sequence[str]) -> dict:
    """What determines a head: two requests that are equal here give the same head."""
    return {
        "head": head_kind(config.head),
        "settings": asdict(config.head),
        "tasks": list(tasks),
        "shared": config.shared,
        "seed": config.seed,
        "protocol": config.protocol,
        "data": {
            task: [cache.task_fingerprint(task, split) for split in dict.fromkeys(("test", config.fit_split))]
            for task in tasks
        },
    }


def _existing(folder: Path, request: dict, results: Path) -> FitResult:
    head = load_head(folder)
    there, rows = head.record.get("request"), head.record.get("results")
    if not isinstance(there, dict) or not isinstance(rows, list) or not all(map(_is_result, rows)):
        raise InputError(f"{folder / 'head.json'} is damaged; delete {folder} and fit again")
    differ = differences(there, request)
    if differ:
        raise InputError(
            f"{folder} exists with other settings (there / asked): {'; '.join(differ[:3])}; choose another --name, or "
            "delete it"
        )
    kept = read_results(results)
    # A fit that was killed between the head and its rows left the rows in the head's record alone.
    missing = [row for row in rows if row not in kept]
    if missing:
        require_writable(results, "--results")
        _append(results, missing)
    return FitResult(head, folder, rows, repeated=True)


def _split_rows(config: FitConfig, data: TaskData) -> tuple[Tensor, Tensor]:
    """Numbers of the test rows that may be fitted, and of those that are evaluated on."""
    rows = len(data.merged)
    order = torch.randperm(rows, generator=generator(data.task, config.seed, "holdout"))
    kept = round(config.holdout * rows)
    if config.holdout and not 0 < kept < rows:
        raise InputError(
            f"--holdout {config.holdout:g} of the {rows} rows of task {data.task} leaves none to "
            f"{'evaluate on' if not kept else 'fit'}"
        )
    seen, held_out = order[kept:].sort().values, order[:kept].sort().values
    return _fraction(config, data.task, seen), held_out if kept else torch.arange(rows)


def _fraction(config: FitConfig, task: str, rows: Tensor) -> Tensor:
    if config.fraction == 1:
        return rows
    order = torch.randperm(len(rows), generator=generator(task, config.seed, "fraction"))
    return rows[order[: max(1, round(config.fraction * len(rows)))].sort().values]


def _jobs(
    config: FitConfig, cache: Cache, data: dict[str, TaskData], splits: dict[str, tuple[Tensor, Tensor]]
) -> list[Job]:
    """One job for each head: merged and expert features only."""
    rows = []
    for task, its in data.items():
        if config.fit_split == "train":
            merged, expert = (cache.features(task, kind, "train") for kind in ("merged", "expert"))
            seen = _fraction(config, task, torch.arange(len(merged)))
        else:
            merged, expert, seen = its.merged, its.expert, splits[task][0]
        rows.append(Rows(task, merged[seen], expert[seen]))
    groups = [tuple(rows)] if config.shared else [(r,) for r in rows]
    return [Job(group, config.head, config.seed) for group in groups]


def _evaluate(head: Head, data: TaskData, rows: Tensor) -> dict:
    """Accuracy in [0, 1] and bias of each kind of features on these rows."""
    labels, expert, merged = data.labels[rows], data.expert[rows], data.merged[rows]
    corrected = head(merged, data.task)
    features = {"individual": expert, "merged": merged, "head": corrected}
    if data.pretrained is not None:
        features = {"pretrained": data.pretrained[rows]} | features
    return {
        "eval_rows": len(rows),
        "accuracy": {kind: accuracy(values, data.classifier, labels) for kind, values in features.items()},
        "bias": {
            "before": representation_bias(merged, expert),
            "after": representation_bias(corrected, expert),
        },
    }


def _about(config: FitConfig, cache: Cache, name: str, task: str, seconds: float) -> dict:
    identity = cache.identity
    return {
        "task": task,
        "head": name,
        "kind": head_kind(config.head),
        "settings": asdict(config.head),
        "shared": config.shared,
        "seed": config.seed,
        "protocol": config.protocol,
        "cache": cache.task_fingerprint(task),
        "arch": identity["arch"],
        "merge": identity["merge"]["method"],
        "parameters": parameter_count(config.head, cache.dim),
        "seconds": seconds,
    }


def _fits(jobs: Sequence[Job], fitted: Sequence[Fitted]) -> list[dict]:
    return [
        {"tasks": [r.task for r in job.rows], "threads": f.threads, "penalty": f.penalty, "loss_curve": f.curve}
        for job, f in zip(jobs, fitted, strict=True)
    ]


def _write(head: Head, folder: Path) -> bool:
    """Write a head's folder so that it appears at once or not at all; False if there is one by now."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".", suffix=".partial") as partial:
        written = Path(partial) / folder.name
        written.mkdir()
        head.save(written)
        try:
            written.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
            return False
    return True


def _append(results: Path, rows: Sequence[dict]) -> None:
    """Add rows to results.jsonl in one write; a torn last line, left by a kill, is closed first."""
    file = results / "results.jsonl"
    text = "".join(json.dumps(row) + "\n" for row in rows)
    with file.open("a+b") as out:
        if out.tell():
            out.seek(-1, os.SEEK_END)
            if out.read(1) != b"\n":
                text = "\n" + text
        out.write(text.encode())


def read_results(folder: Path) -> list[dict]:
    """Rows of results.jsonl; lines that a kill left torn, or that hold something else, are passed over."""
    try:
        lines = (folder / "results.jsonl").read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    rows = []
    for line in lines:
        with contextlib.suppress(ValueError, RecursionError):
            rows.append(json.loads(line))
    return [row for row in rows if _is_result(row)]


_NUMBER = (int, float)
_ROW = {"task": str, "head": str, "kind": str, "settings": dict, "shared": bool, "seed": int, "protocol": str}
_ROW |= {"cache": str, "parameters": int, "seconds": _NUMBER, "accuracy": dict, "bias": dict}


def _is_result(row: object) -> bool:
    """Whether a row has what a report reads of it."""
    if not isinstance(row, dict) or not all(isinstance(row.get(name), kind) for name, kind in _ROW.items()):
        return False
    figures = [row["accuracy"].get(kind) for kind in ("individual", "merged", "head")]
    figures += [row["bias"].get(when) for when in ("before", "after")]
    return all(isinstance(figure, _NUMBER) for figure in figures)
