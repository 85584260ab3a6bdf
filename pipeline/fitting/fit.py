"""Stage two: cached features -> heads and results. The encoders are never touched, and no label reaches the fit."""

from collections import defaultdict
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, closing, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from probsurgery.pipeline.classifier import Classifier
from probsurgery.pipeline.config import FitConfig
from probsurgery.pipeline.device import available_memory, choose_device
from probsurgery.pipeline.errors import InputError, ProbsurgeryError
from probsurgery.pipeline.files import replaced
from probsurgery.pipeline.fitting.requests import (
    HeadRequest,
    RecordedResults,
    chosen_tasks,
    description,
    existing_record,
    head_requests,
    training_runs,
)
from probsurgery.pipeline.fitting.scale import with_scale
from probsurgery.pipeline.fitting.splits import LoadedTasks
from probsurgery.pipeline.heads.head import FitRecord, Head, TrainingRecord, load_head, recorded
from probsurgery.pipeline.heads.kinds import Params, stack_params
from probsurgery.pipeline.merging.registry import merge_label
from probsurgery.pipeline.progress import Progress, no_progress
from probsurgery.pipeline.store.cache import Cache
from probsurgery.pipeline.store.claims import claimed
from probsurgery.pipeline.store.lock import require_writable
from probsurgery.pipeline.store.manifest import software
from probsurgery.pipeline.store.results import ResultRow, TrainingPlan
from probsurgery.pipeline.store.scratch import remove_abandoned, scratch_folder
from probsurgery.pipeline.store.target import refuse_own_files
from probsurgery.pipeline.training.batches import Job
from probsurgery.pipeline.training.loop import Fitted
from probsurgery.pipeline.training.plan import StepCounter, execute, make_plan
from probsurgery.pipeline.training.workers import Pool

_MOST_CLAIMS = 2_000
"""Heads that are claimed one by one; those of a larger sweep are claimed by setting."""
_TrainedHead = tuple[Fitted, list[ResultRow]]
"""A head that was trained, and its row of results for each of its tasks."""


@dataclass(frozen=True)
class FitResult:
    """What was fitted for one configuration, and how good it is on each task."""

    config: FitConfig
    """The configuration, with its tasks filled in."""
    rows: list[ResultRow]
    """One for each task, as in results.jsonl."""
    path: Path | None = None
    """The head's folder; None if heads are not kept."""
    repeated: bool = False
    """Whether everything existed already and nothing was done."""
    fitted: int = 0
    """Heads fitted now."""
    failures: tuple[tuple[str, str], ...] = ()
    """(label, reason) of each head that could not be fitted; its rows are missing."""

    @property
    def head(self) -> Head:
        """The head, read from its folder. Raises `InputError` if heads were not kept."""
        if self.path is None:
            raise InputError("the heads of this run were not kept; sweep with `keep_heads`, or fit this setting")
        return load_head(self.path)


def fit(config: FitConfig, progress: Progress = no_progress) -> FitResult:
    """Run stage two for one configuration, and keep its head.

    The same request again returns what exists. Raises `InputError` before anything is written if the cache lacks what
    is asked for, or if a head of that name exists with other settings, and `ProbsurgeryError` if a head cannot be
    fitted.
    """
    (result,) = fit_all([with_scale(config)], keep_heads=True, progress=progress)
    if result.failures:
        raise ProbsurgeryError("; ".join(failure_lines(result.failures)))
    return result


def fit_all(
    configs: Sequence[FitConfig],
    *,
    keep_heads: bool,
    progress: Progress = no_progress,
    finished: Callable[[FitResult], None] = lambda result: None,
) -> list[FitResult]:
    """Run stage two for several configurations that agree in cache, tasks, split, device and folder of results.

    Results come in the order of the configurations; `finished` is called with each as soon as it is complete. A row is
    written to results.jsonl as soon as its head is fitted. A head whose rows exist is not fitted again, unless it is to
    be kept and was not. A head that fails does not affect the others. Raises `InputError` before anything is written.
    """
    common, cache = configs[0], Cache(configs[0].cache)
    device = choose_device(common.device)
    if common.tf32 and device.type != "cuda":
        raise InputError(f"--tf32 is for CUDA devices, and this fit runs on {device}")
    folder = Path(common.results or cache.path)
    refuse_own_files(folder, "--results")
    recorded = RecordedResults(folder)
    tasks = chosen_tasks(cache, common)
    fits = [_Fit(replace(config, tasks=tasks), cache, recorded, keep_heads=keep_heads) for config in configs]
    with ExitStack() as claims:
        if any(each.missing for each in fits):
            require_writable(recorded.folder / "heads" if keep_heads else recorded.folder, "--results")
            claims.enter_context(claimed(recorded.folder, _claims(fits, keep_heads=keep_heads)))
            recorded = RecordedResults(recorded.folder)  # another process may have finished some before the claim
            fits = [_Fit(each.config, cache, recorded, keep_heads=keep_heads) for each in fits]
        for each in fits:
            if not each.missing:
                finished(each.result())
        owners = {request: each for each in fits for request in each.missing}
        if owners:
            remove_abandoned()
            with closing(_train(list(owners), cache, device, progress)) as outcomes:
                for request, outcome in outcomes:
                    owner = owners[request]
                    owner.take(request, outcome)
                    if not owner.missing:
                        finished(owner.result())
    return [each.result() for each in fits]


def _claims(fits: Sequence["_Fit"], *, keep_heads: bool) -> dict[str, str]:
    """What these fits claim, by what determines it, with what a message calls it."""
    requests = [request for each in fits for request in each.missing]
    if len(requests) > _MOST_CLAIMS:  # the time that claims take grows with their square
        labels = {"".join(r.digest for r in each.missing): each.missing[0].name for each in fits if each.missing}
    else:
        labels = {request.digest: request.label for request in requests}
    if keep_heads:  # a name is taken once, whatever its settings
        labels |= {f"heads/{request.name}": f"the head {request.name}" for request in requests}
    return labels


def failure_lines(failures: Sequence[tuple[str, str]]) -> list[str]:
    """One line per failure reason, listing the affected heads."""
    by_reason = defaultdict(list)
    for label, reason in failures:
        by_reason[reason].append(label)
    return [f"{', '.join(labels)}: {reason}" for reason, labels in by_reason.items()]


class _Fit:
    """The fit of one configuration: the heads that it asks for, and the results so far."""

    def __init__(self, config: FitConfig, cache: Cache, recorded: RecordedResults, *, keep_heads: bool) -> None:
        self.config, self._cache, self._recorded = config, cache, recorded
        self._requests = head_requests(config, cache, keep_heads=keep_heads)
        self._folder = recorded.folder / "heads" / self._requests[0].name
        self._keep_heads = keep_heads
        self.missing: list[HeadRequest] = []
        """Requests that are still to be trained."""
        self._rows: dict[str, ResultRow] = {}
        self._trained: dict[HeadRequest, _TrainedHead] = {}
        self._fitted = 0
        self._repeated = False
        self._failures: list[tuple[str, str]] = []
        if keep_heads and self._folder.exists():
            self._reopen()
            return
        for request in self._requests:
            rows = recorded.rows_of(request)
            self._rows |= rows
            if keep_heads or len(rows) < len(request.tasks):
                self.missing.append(request)
        self._repeated = not self.missing

    def take(self, request: HeadRequest, outcome: _TrainedHead | ProbsurgeryError) -> None:
        """Write the rows of a request that has been trained, and the head's folder after the last one."""
        self.missing.remove(request)
        if isinstance(outcome, ProbsurgeryError):
            self._failures.append((request.label, str(outcome)))
            return
        self._fitted += 1
        _, rows = outcome
        new = [row for row in rows if row.task not in self._rows]
        self._rows |= {row.task: row for row in new}
        self._recorded.append(new)
        if self._keep_heads:
            self._trained[request] = outcome
            if len(self._trained) == len(self._requests):
                self._write_head()

    def _write_head(self) -> None:
        config, tasks = self.config, self.config.known_tasks
        heads = [self._trained[request] for request in self._requests]
        record = FitRecord(
            request=description(config, self._cache, tasks),
            results=tuple(self._rows[task] for task in tasks),
            fits=tuple(
                TrainingRecord(
                    tasks=row.tasks,
                    penalty=fitted.penalty,
                    loss_curve=tuple(fitted.curve),
                    device=row.device,
                    plan=row.plan,
                    from_run_of=row.from_run_of,
                )
                for fitted, (row, *_) in heads
            ),
            seconds=sum(fitted.seconds for fitted, _ in heads),
            software=software(),
        )
        head = _head(config, self._cache, tasks, [fitted.params for fitted, _ in heads], record)
        self._trained.clear()
        try:
            with self._recorded.writing(), replaced(self._folder, shared=True) as partial:
                self._folder.parent.mkdir(exist_ok=True)
                partial.mkdir()
                head.save(partial)
        except OSError:
            if not self._folder.is_dir():
                raise
            # Another process has written a head of this name meanwhile.
            self._recorded = RecordedResults(self._recorded.folder)
            self._reopen()

    def _reopen(self) -> None:
        record = existing_record(self._folder, description(self.config, self._cache, self.config.known_tasks))
        self._recorded.restore(record.results)
        self._rows = {row.task: row for row in record.results}
        self._repeated = True

    def result(self) -> FitResult:
        """The result so far."""
        return FitResult(
            self.config,
            [self._rows[task] for task in self.config.known_tasks if task in self._rows],
            self._folder if self._keep_heads else None,
            repeated=self._repeated,
            fitted=self._fitted,
            failures=tuple(self._failures),
        )


def _train(
    requests: Sequence[HeadRequest], cache: Cache, device: torch.device, progress: Progress
) -> Generator[tuple[HeadRequest, _TrainedHead | ProbsurgeryError], None, None]:
    """Train and evaluate the head of every request. Yields each with its head or its error, as stacks finish.

    If the features of all tasks would take half of the memory, the requests are grouped by their tasks, and the
    features of each group are decoded once into scratch files and mapped from there.
    """
    common, runs = requests[0].config, training_runs(requests)
    memory = min(map(available_memory, {device, torch.device("cpu")}))
    is_large = _feature_bytes(requests, cache) > memory / 2
    groups = defaultdict(list)
    for request in runs:
        groups[request.tasks if is_large else ()].append(request)
    plans = [
        make_plan(
            [request.workload for request in group],
            device,
            workers=common.workers,
            tf32=common.tf32,
            held_bytes=0 if is_large and device.type == "cpu" else _feature_bytes(group, cache),
        )
        for group in groups.values()
    ]
    counter = StepCounter(sum(request.workload.head_steps for request in runs), progress)
    retries = []
    processes = max(plan.processes for plan in plans)
    # Processes take seconds to start, so they are started before features are read.
    with Pool(processes) if processes else nullcontext() as pool:
        for group, plan in zip(groups.values(), plans, strict=True):
            with scratch_folder() if is_large or plan.processes else nullcontext() as scratch:
                loaded = LoadedTasks(cache, _tasks_of(group), common.fit_split, scratch)
                jobs = [_job(request, loaded, runs[request]) for request in group]
                stacks = {number: stack for stack in plan.stacks for number in stack}
                for number, outcome in execute(jobs, plan, pool if plan.processes else None, counter):
                    request = group[number]
                    if isinstance(outcome, ProbsurgeryError):
                        yield request, outcome
                        retries += runs[request]  # a shorter run may succeed
                    else:
                        shorter = {r: outcome.earlier[r.workload.settings.steps] for r in runs[request]}
                        record = plan.record(stacks[number], request.workload.settings)
                        for trained, fitted in ({request: outcome} | shorter).items():
                            yield trained, (fitted, _rows(trained, fitted, loaded, device=str(device), plan=record))
                    counter()  # ridge takes no step, and what is shown beside the steps may have changed
    if retries:
        yield from _train(retries, cache, device, progress)


def _feature_bytes(requests: Sequence[HeadRequest], cache: Cache) -> int:
    """Memory of the features that these heads are fitted and evaluated on, of all encoders."""
    splits = {"test", requests[0].config.fit_split}
    return sum(3 * 4 * cache.dim * cache.rows(task, split) for task in _tasks_of(requests) for split in splits)


def _tasks_of(requests: Sequence[HeadRequest]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(task for request in requests for task in request.tasks))


def _job(request: HeadRequest, loaded: LoadedTasks, shorter: Sequence[HeadRequest]) -> Job:
    config = request.config
    rows = tuple(loaded.rows(config, task) for task in request.tasks)
    stops = tuple(other.workload.settings.steps for other in shorter)
    settings, tasks = request.workload.settings, request.workload.tasks_in_round
    place = loaded.cache.identity.tasks.index(request.tasks[0]) if tasks > 1 else 0
    return Job(rows, settings, config.seed, config.online, stops, place, tasks)


def _head(
    config: FitConfig, cache: Cache, tasks: tuple[str, ...], params: Sequence[Params], record: FitRecord | None = None
) -> Head:
    """The head of what was trained, each a stack of one: for each task, or shared."""
    if config.head.corrects_features:
        return Head(config.head, tasks, cache.dim, stack_params(params), config.shared, record)
    classifiers = {
        task: Classifier(own["weight"][0], own["bias"][0], cache.manifest.tasks[task].normalise)
        for task, own in zip(tasks, params, strict=True)
    }
    return Head(config.head, tasks, cache.dim, {}, record=record, classifiers=classifiers)


def _rows(
    request: HeadRequest, fitted: Fitted, loaded: LoadedTasks, *, device: str, plan: TrainingPlan
) -> list[ResultRow]:
    """Evaluate a head that was trained on this device by this plan: a row for each of its tasks."""
    config, cache = request.config, loaded.cache
    merge = cache.identity.merge
    head = _head(config, cache, request.tasks, [fitted.params])
    rows = []
    for task in request.tasks:
        eval_rows, accuracy, bias = loaded.evaluate(config, head, task)
        row = ResultRow(
            fit_rows=len(loaded.rows(config, task)),
            eval_rows=eval_rows,
            accuracy=accuracy,
            bias=bias,
            task=task,
            head=request.name,
            kind=config.head.kind,
            settings=recorded(config.head),
            shared=config.shared,
            tasks=request.tasks,
            seed=config.seed,
            protocol=config.protocol,
            request=request.digest,
            cache=cache.task_fingerprint(task),
            arch=cache.identity.arch,
            merge=merge_label(merge.method, merge.settings, merge.name),
            parameters=request.workload.parameters,
            seconds=fitted.seconds,
            from_run_of=fitted.from_run_of,
            device=device,
            plan=plan,
        )
        rows.append(row)
    return rows
