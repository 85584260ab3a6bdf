"""Stage two: cached features -> heads and results. The encoders are never touched, and no label reaches the fit."""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

from probsurgery.pipeline.config import FitConfig, HeadSettings, RidgeSettings
from probsurgery.pipeline.datasets.tasks import check_names
from probsurgery.pipeline.device import available_memory, choose_device
from probsurgery.pipeline.errors import InputError, ProbsurgeryError
from probsurgery.pipeline.fingerprints import differences, fingerprint
from probsurgery.pipeline.fitting.splits import LoadedTasks, seen_count
from probsurgery.pipeline.heads.head import Head, load_head, parameter_count, stack_params
from probsurgery.pipeline.merging import registry
from probsurgery.pipeline.store.cache import Cache
from probsurgery.pipeline.store.manifest import software
from probsurgery.pipeline.store.results import append_results, is_result, read_results
from probsurgery.pipeline.store.writer import require_writable
from probsurgery.pipeline.training.loop import Fitted, Job, Outcome
from probsurgery.pipeline.training.plan import Wanted, execute, make_plan
from probsurgery.pipeline.training.workers import Pool

Progress = Callable[[int, int], None]
"""Told how many head-steps are done, and how many there are in all."""


@dataclass(frozen=True)
class FitResult:
    """What was fitted for one setting, and how good it is on each task."""

    config: FitConfig
    """What was asked for, with the tasks that it stands for."""
    rows: list[dict]
    """One for each task, as in results.jsonl."""
    path: Path | None = None
    """The head's folder; None if heads are not kept."""
    repeated: bool = False
    """All of it was there already, and nothing was done."""
    fitted: int = 0
    """Heads fitted now."""
    failures: tuple[tuple[str, str], ...] = ()
    """Each head that could not be fitted, and why; its rows are missing."""

    @property
    def head(self) -> Head:
        """The head, read from its folder."""
        return load_head(self.path)


def fit(config: FitConfig, progress: Progress = lambda done, total: None) -> FitResult:
    """Run stage two for one setting, and keep its head.

    Raises `InputError` before anything is written if the cache lacks what is asked for, or if a head of that name
    exists with other settings, and `ProbsurgeryError` if a head cannot be fitted. The same request again returns what
    is there.
    """
    (result,) = fit_all([config], keep_heads=True, progress=progress)
    if result.failures:
        raise ProbsurgeryError("; ".join(failure_lines(result.failures)))
    return result


def fit_all(
    configs: Sequence[FitConfig],
    *,
    keep_heads: bool,
    progress: Progress = lambda done, total: None,
    finished: Callable[[FitConfig, dict], None] = lambda config, row: None,
) -> list[FitResult]:
    """Run stage two for several settings at once, of the same cache, tasks, split, device and place for results.

    A row is written to results.jsonl as soon as its head is fitted. What is there already is not fitted again, unless
    the head is to be kept and was not. `finished` is told of every row, old ones first. A head that fails leaves the
    others as they are. Raises `InputError` before anything is written.
    """
    common, cache = configs[0], Cache(configs[0].cache)
    device = choose_device(common.device)
    if common.tf32 and device.type != "cuda":
        raise InputError(f"--tf32 is for CUDA devices, and this fit runs on {device}")
    results = Path(common.results or cache.path)
    tasks = _tasks(cache, common)
    settings = [_Setting(replace(config, tasks=tasks), cache, results, keep_heads) for config in configs]
    kept = read_results(results)
    known = {(row.get("request"), row["task"]): row for row in kept}
    written = {_text(row) for row in kept} if keep_heads else set()
    for setting in settings:
        for row in setting.recall(known, written):
            finished(setting.config, row)
    wishes = [wish for setting in settings for wish in setting.missing]
    if wishes:
        require_writable(results / "heads" if keep_heads else results, "--results")
        with closing(_train(wishes, cache, device, progress)) as outcomes:
            for wish, outcome, planned, loaded in outcomes:
                for row in wish.setting.take(wish, outcome, planned, loaded):
                    finished(wish.setting.config, row)
    return [setting.result() for setting in settings]


def failure_lines(failures: Sequence[tuple[str, str]]) -> list[str]:
    """One line for each reason, with every head that it befell."""
    by_reason = defaultdict(list)
    for label, reason in failures:
        by_reason[reason].append(label)
    return [f"{', '.join(labels)}: {reason}" for reason, labels in by_reason.items()]


@dataclass(frozen=True, eq=False)
class _Wish:
    """One head that is asked for: of one task, or shared by several."""

    setting: _Setting
    tasks: tuple[str, ...]

    @cached_property
    def request(self) -> str:
        """Digest of what determines the head; results name it."""
        return fingerprint(_request(self.setting.config, self.setting.cache, self.tasks))

    @property
    def label(self) -> str:
        return f"{self.setting.name} of {' and '.join(self.tasks)}"


class _Setting:
    """One setting of a sweep: the heads that it asks for, and what is known of them so far."""

    def __init__(self, config: FitConfig, cache: Cache, results: Path, keep_heads: bool) -> None:
        tasks = config.tasks
        # Named after its tasks unless it has all that are merged: a head of those so far is not in the way then.
        name_tasks = (keep_heads or config.shared) and len(tasks) < len(cache.identity["tasks"])
        self.name = config.name or replace(config, tasks=tasks if name_tasks else None).default_name()
        self.config, self.cache, self.results = config, cache, results
        self.folder = results / "heads" / self.name if keep_heads else None
        self.wishes = [_Wish(self, group) for group in ([tasks] if config.shared else [(task,) for task in tasks])]
        self.missing: list[_Wish] = []
        self.rows: dict[str, dict] = {}
        self._fitted: dict[_Wish, tuple[Fitted, dict]] = {}
        self._taken = 0
        self._repeated = False
        self._failures: list[tuple[str, str]] = []

    def recall(self, known: dict[tuple[str, str], dict], written: set[str]) -> list[dict]:
        """Find what was done before, and note what is missing; gives the rows that are there."""
        if self.folder is not None and self.folder.exists():
            self._reopen(written)
            return list(self.rows.values())
        for wish in self.wishes:
            rows = {task: row for task in wish.tasks if (row := known.get((wish.request, task)))}
            self.rows |= rows
            if self.folder is not None or len(rows) < len(wish.tasks):
                self.missing.append(wish)
        self._repeated = not self.missing
        return list(self.rows.values())

    def take(self, wish: _Wish, outcome: Outcome, planned: dict, loaded: LoadedTasks) -> list[dict]:
        """Evaluate and write what has just been fitted; gives the rows that are new."""
        if isinstance(outcome, ProbsurgeryError):
            self._failures.append((wish.label, str(outcome)))
            return []
        self._taken += 1
        config, dim = self.config, self.cache.dim
        head = Head(config.head, wish.tasks, dim, outcome.params, config.shared)
        new = {
            task: loaded.evaluate(config, head, task) | _about(wish, task) | {"seconds": outcome.seconds} | planned
            for task in wish.tasks
            if task not in self.rows
        }
        self.rows |= new
        append_results(self.results, list(new.values()))
        if self.folder is not None:
            self._fitted[wish] = outcome, planned
            if len(self._fitted) == len(self.wishes):
                self._keep()
        return list(new.values())

    def _keep(self) -> None:
        """Write the head's folder, now that every part of it is there."""
        config = self.config
        parts = [(wish, *self._fitted[wish]) for wish in self.wishes]
        record = {
            "request": _request(config, self.cache, config.tasks),
            "results": [self.rows[task] for task in config.tasks],
            "fits": [
                {"tasks": wish.tasks, "penalty": part.penalty, "loss_curve": part.curve} | planned
                for wish, part, planned in parts
            ],
            "seconds": sum(part.seconds for _, part, _ in parts),
            "software": software(),
        }
        params = stack_params([part.params for _, part, _ in parts])
        self._fitted.clear()
        if not _write(Head(config.head, config.tasks, self.cache.dim, params, config.shared, record), self.folder):
            # The same request was fitted meanwhile.
            self._reopen({_text(row) for row in read_results(self.results)})

    def _reopen(self, written: set[str]) -> None:
        head = _existing(self.folder, _request(self.config, self.cache, self.config.tasks), self.results, written)
        self.rows = {row["task"]: row for row in head.record["results"]}
        self._repeated = True

    def result(self) -> FitResult:
        return FitResult(
            self.config,
            [self.rows[task] for task in self.config.tasks if task in self.rows],
            self.folder,
            repeated=self._repeated,
            fitted=self._taken,
            failures=tuple(self._failures),
        )


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
    request = {
        "head": config.head.kind,
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
    return request | ({"tf32": True} if config.tf32 else {})


def _text(row: dict) -> str:
    return json.dumps(row, sort_keys=True)


def _existing(folder: Path, request: dict, results: Path, written: set[str]) -> Head:
    """The head in a folder, which must be the one that is asked for; `written` is what results.jsonl holds."""
    head = load_head(folder)
    there, rows = head.record.get("request"), head.record.get("results")
    if not isinstance(there, dict) or not isinstance(rows, list) or not all(map(is_result, rows)):
        raise InputError(f"{folder / 'head.json'} is damaged; delete {folder} and fit again")
    differ = differences(there, request)
    if differ:
        raise InputError(
            f"{folder} exists with other settings (there / asked): {'; '.join(differ[:3])}; choose another --name, or "
            "delete it"
        )
    missing = [row for row in rows if _text(row) not in written]  # results.jsonl may have been lost or torn
    if missing:
        require_writable(results, "--results")
        append_results(results, missing)
    return head


def _train(
    wishes: Sequence[_Wish], cache: Cache, device: torch.device, progress: Progress
) -> Iterator[tuple[_Wish, Outcome, dict, LoadedTasks]]:
    """Fit every head that is asked for; gives each with its outcome and how it was planned, as stacks finish.

    Features that memory does not hold with ease are taken one task at a time, decoded once into a scratch file, and
    mapped from there.
    """
    runs = _runs(wishes)
    wishes, again = list(runs), []
    wanted = {wish: Wanted(_to_train(wish, cache), len(wish.tasks), cache.dim) for wish in wishes}
    total, done = sum(one.head_steps for one in wanted.values()), 0
    large = _held_bytes(wishes, cache) > min(map(available_memory, {device, torch.device("cpu")})) / 2
    groups = defaultdict(list)
    for wish in wishes:
        groups[wish.tasks if large else ()].append(wish)
    common = wishes[0].setting.config
    plans = {
        key: make_plan(
            [wanted[wish] for wish in group],
            device,
            workers=common.workers,
            tf32=common.tf32,
            held_bytes=0 if large and device.type == "cpu" else _held_bytes(group, cache),
        )
        for key, group in groups.items()
    }

    def count(head_steps: int) -> None:
        nonlocal done
        done += head_steps
        progress(done, total)

    workers = max(plan.workers for plan in plans.values())
    # Workers take seconds to start, so they do that while features are read.
    with Pool(workers) if workers else nullcontext() as pool:
        for key, group in groups.items():
            plan = plans[key]
            with tempfile.TemporaryDirectory() if large or plan.workers else nullcontext() as folder:
                loaded = LoadedTasks(cache, _tasks_of(group), common.fit_split, folder and Path(folder))
                jobs = [_job(wish, cache, loaded, runs[wish]) for wish in group]
                records = {
                    number: {"device": str(device), "plan": plan.record(stack, jobs[number].settings)}
                    for stack in plan.stacks
                    for number in stack
                }
                for number, outcome in execute(jobs, plan, pool if plan.workers else None, count):
                    yield group[number], outcome, records[number], loaded
                    for shorter in runs[group[number]]:
                        steps = shorter.setting.config.head.steps
                        if isinstance(outcome, ProbsurgeryError) or steps not in outcome.earlier:
                            again.append(shorter)
                            continue
                        record = records[number] | {"from_run_of": jobs[number].settings.steps}
                        yield shorter, outcome.earlier[steps], record, loaded
                    progress(done, total)
    if again:  # a longer run failed, which need not befall a shorter one
        yield from _train(again, cache, device, progress)


def _runs(wishes: Sequence[_Wish]) -> dict[_Wish, list[_Wish]]:
    """The wishes to train, each with those that differ in nothing but fewer steps: they are heads on its way."""
    runs = defaultdict(list)
    for wish in wishes:
        config = wish.setting.config
        alike = config.head if isinstance(config.head, RidgeSettings) else replace(config.head, steps=1)
        runs[replace(config, head=alike, name=None), wish.tasks].append(wish)
    found = {}
    for group in runs.values():
        longest = max(group, key=lambda wish: getattr(wish.setting.config.head, "steps", 0))
        found[longest] = [wish for wish in group if wish is not longest]
    return found


def _to_train(wish: _Wish, cache: Cache) -> HeadSettings:
    """The head's settings; online it takes a step for each row that it sees."""
    config = wish.setting.config
    if not config.online:
        return config.head
    return replace(config.head, steps=seen_count(config, cache.rows(wish.tasks[0], config.fit_split)))


def _tasks_of(wishes: Sequence[_Wish]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(task for wish in wishes for task in wish.tasks))


def _held_bytes(wishes: Sequence[_Wish], cache: Cache) -> int:
    """Memory of the features that these heads are fitted and evaluated on."""
    splits = dict.fromkeys(("test", wishes[0].setting.config.fit_split))
    return sum(3 * 4 * cache.dim * cache.rows(task, split) for task in _tasks_of(wishes) for split in splits)


def _job(wish: _Wish, cache: Cache, loaded: LoadedTasks, shorter: Sequence[_Wish]) -> Job:
    config = wish.setting.config
    rows = tuple(loaded.rows(config, task) for task in wish.tasks)
    stops = tuple(sorted(its.setting.config.head.steps for its in shorter))
    return Job(rows, _to_train(wish, cache), config.seed, config.online, stops)


def _about(wish: _Wish, task: str) -> dict:
    config, cache = wish.setting.config, wish.setting.cache
    identity = cache.identity
    return {
        "task": task,
        "head": wish.setting.name,
        "kind": config.head.kind,
        "settings": asdict(config.head),
        "shared": config.shared,
        "tasks": list(wish.tasks),
        "seed": config.seed,
        "protocol": config.protocol,
        "request": wish.request,
        "cache": cache.task_fingerprint(task),
        "arch": identity["arch"],
        "merge": registry.label(identity["merge"]),
        "parameters": parameter_count(config.head, cache.dim),
    }


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
