"""From configurations to requests for single heads, and what exists of them already."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from probsurgery.pipeline.config import FitConfig, changed_settings
from probsurgery.pipeline.datasets.suites import check_names
from probsurgery.pipeline.errors import InputError, ProbsurgeryError
from probsurgery.pipeline.fingerprints import differences, fingerprint
from probsurgery.pipeline.fitting.splits import seen_count
from probsurgery.pipeline.heads.head import FitRecord, load_head, recorded
from probsurgery.pipeline.store import manifest as manifests
from probsurgery.pipeline.store.cache import Cache
from probsurgery.pipeline.store.claims import held_open
from probsurgery.pipeline.store.lock import require_writable
from probsurgery.pipeline.store.results import ResultRow, append_results, read_results
from probsurgery.pipeline.training.plan import Workload


@dataclass(frozen=True, eq=False)
class HeadRequest:
    """One head that is asked for: of one task, or shared by several."""

    config: FitConfig
    """The configuration that asks for it, with its tasks filled in."""
    name: str
    """Name of the configuration, and of the folder that heads are kept in."""
    tasks: tuple[str, ...]
    workload: Workload
    """With the settings as they are trained: online, one step for each row that the head sees."""
    digest: str
    """Digest of what determines the head; rows of results carry it as `request`."""

    @property
    def label(self) -> str:
        """What messages call the head."""
        return f"{self.name} of {' and '.join(self.tasks)}"


def chosen_tasks(cache: Cache, config: FitConfig) -> tuple[str, ...]:
    """The tasks to fit, in the order of the cache. Raises `InputError` unless the splits that they need are whole."""
    if config.tasks is None:
        tasks = cache.tasks("test")
        if not tasks:
            raise InputError(f"{cache.path} holds no task; run `probsurgery extract`")
    else:
        check_names(config.tasks, cache.identity.tasks)
        tasks = tuple(task for task in cache.identity.tasks if task in config.tasks)
    for task in tasks:
        cache.require(task, "test")
        cache.require(task, config.fit_split)
    return tasks


def head_requests(config: FitConfig, cache: Cache, *, keep_heads: bool) -> tuple[HeadRequest, ...]:
    """The heads that a configuration, with its tasks filled in, asks for, in the order of the tasks."""
    # Named after its tasks unless these are all that are merged. While a cache is being extracted, a head of the tasks
    # so far does not take the name of the head of all tasks.
    by_tasks = (keep_heads or config.shared) and len(config.known_tasks) < len(cache.identity.tasks)
    name = config.name or replace(config, tasks=config.tasks if by_tasks else None).default_name()
    if not config.head.corrects_features:
        lacking = [task for task in config.known_tasks if not cache.manifest.tasks[task].classifier]
        if lacking:
            raise InputError(
                f"{cache.path} holds no classifier of {', '.join(lacking)}, at which a classifier head starts; leave "
                f"{'it' if len(lacking) == 1 else 'them'} out with --tasks, or fit another kind of head"
            )
    requests = []
    for tasks in [config.known_tasks] if config.shared else [(task,) for task in config.known_tasks]:
        settings = config.head
        if config.online:
            steps = seen_count(config, cache.rows(tasks[0], config.fit_split))
            settings = changed_settings(settings, steps=steps)
        batches = (tasks, config.seed, config.fraction, config.holdout, config.online)
        joint = settings.optimizer == "joint"
        in_round = len(cache.identity.tasks) if joint else 1
        classes = 0 if settings.corrects_features else cache.manifest.arrays[f"classifiers/{tasks[0]}"].shape[0]
        workload = Workload(settings, len(tasks), cache.dim, batches, in_round, classes)
        requests.append(HeadRequest(config, name, tasks, workload, fingerprint(description(config, cache, tasks))))
    return tuple(requests)


def description(config: FitConfig, cache: Cache, tasks: Sequence[str]) -> dict[str, Any]:
    """What determines a head, in JSON's types. Equal descriptions give the same head."""
    values = {
        "head": config.head.kind,
        "settings": recorded(config.head),
        "tasks": list(tasks),
        "shared": config.shared,
        "seed": config.seed,
        "protocol": config.protocol,
        "data": {
            task: [cache.task_fingerprint(task, split) for split in dict.fromkeys(("test", config.fit_split))]
            for task in tasks
        },
    }
    joint = {"joint_tasks": list(cache.identity.tasks)} if config.head.optimizer == "joint" else {}
    return values | joint | ({"tf32": True} if config.tf32 else {})


def training_runs(requests: Sequence[HeadRequest]) -> dict[HeadRequest, list[HeadRequest]]:
    """The requests to train, each with those that differ from it in fewer steps only.

    The heads of the latter are copied during the longer run.
    """
    groups = defaultdict(list)
    for request in requests:
        config, head = request.config, request.config.head
        alike = replace(config, head=changed_settings(head, steps=1), name=None) if head.is_trained else request
        groups[alike, request.tasks].append(request)
    longest = [max(group, key=lambda request: request.workload.head_steps) for group in groups.values()]
    return {run: [r for r in group if r is not run] for run, group in zip(longest, groups.values(), strict=True)}


def existing_record(folder: Path, wanted: dict[str, Any]) -> FitRecord:
    """The record of the head in a folder. Raises `InputError` if its description is not the one that is `wanted`."""
    head = load_head(folder)
    if head.record is None or {row.task for row in head.record.results} != set(head.tasks):
        raise InputError(f"{folder / 'head.json'} is damaged; delete {folder} and fit again")
    differ = differences(head.record.request, wanted)
    if differ:
        raise InputError(
            f"{folder} exists with other settings (there / asked): {'; '.join(differ[:3])}; choose another --name, or "
            "delete it"
        )
    return head.record


class RecordedResults:
    """The rows of results.jsonl in a folder, as they were when this was made, and the way to add some."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._known = [path for path in (folder, folder / manifests.FILE) if path.exists()]
        rows = read_results(folder)
        self._by_request = {(row.request, row.task): row for row in rows}
        self._by_head = {(row.request, row.task, row.head): row for row in rows}

    def rows_of(self, request: HeadRequest) -> dict[str, ResultRow]:
        """The rows of a head, by task, whatever name it had."""
        keys = {task: (request.digest, task) for task in request.tasks}
        return {task: self._by_request[key] for task, key in keys.items() if key in self._by_request}

    def restore(self, rows: Sequence[ResultRow]) -> None:
        """Append those of the rows that are missing: results.jsonl may have been deleted, or cut off by a kill."""
        missing = [row for row in rows if self._by_head.get((row.request, row.task, row.head)) != row]
        if missing:
            require_writable(self.folder, "--results")
            self.append(missing)

    def append(self, rows: Sequence[ResultRow]) -> None:
        """Add rows to results.jsonl. Raises `ProbsurgeryError` as `writing` does."""
        with self.writing():
            append_results(self.folder, rows)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Keep the folder as it is while something is written to it.

        Raises `ProbsurgeryError` if it, or the cache that it was, has been removed meanwhile, and does not bring it
        back.
        """
        if not self._known:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._known.append(self.folder)
        try:
            with held_open(self.folder):
                if not all(map(Path.exists, self._known)):
                    raise FileNotFoundError
                yield
        except FileNotFoundError:
            if all(map(Path.exists, self._known)):
                raise
            raise ProbsurgeryError(
                f"{self.folder} was removed while heads were fitted into it; what was there is gone"
            ) from None
