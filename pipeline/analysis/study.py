"""The papers' analyses: named sets of settings, each fitted like a sweep and shown as one table."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from probsurgery.pipeline.analysis.labels import by_setting, encoder_accuracy, head_figures, head_label
from probsurgery.pipeline.analysis.tables import AVERAGE, BASELINE, Line, Table
from probsurgery.pipeline.config import LOSSES, SweepConfig
from probsurgery.pipeline.errors import InputError, unknown
from probsurgery.pipeline.fitting.fit import fit_all
from probsurgery.pipeline.progress import Progress, no_progress
from probsurgery.pipeline.store.cache import Cache
from probsurgery.pipeline.store.results import ResultRow

BOTH = ("surgery", "prob")
RANKS = (4, 8, 16, 32, 64)
STEPS = (50, 100, 250, 500, 1_000, 2_500, 5_000)
_Sweeps = Callable[[SweepConfig], Sequence[SweepConfig]]


@dataclass(frozen=True)
class Study:
    """One row of the table of studies."""

    title: str
    paper: str
    """Where the papers have it."""
    sweeps: _Sweeps
    """The sweeps of the study, as variants of a base that has the cache, the seeds and the tasks."""


def _one_sweep(**changes: Any) -> _Sweeps:
    return lambda base: [replace(base, **changes)]


def _protocols(base: SweepConfig) -> list[SweepConfig]:
    """Transductive, held-out, and fitted on train images if the cache has them for every task."""
    sweeps = [replace(base, head=BOTH, holdout=holdout) for holdout in (0.0, 0.2)]
    cache = Cache(base.cache)
    if all(cache.is_whole(task, "train") for task in base.tasks or cache.tasks("test")):
        sweeps.append(replace(base, head=BOTH, fit_split="train"))
    return sweeps


def _budgets(base: SweepConfig) -> list[SweepConfig]:
    """Equal budgets: both heads as published, and each with the other's width and steps.

    Surgery also with as many parameters as ProbSurgery (3 d h = 2 d r); ProbSurgery also without its noise, its KL
    divergence, or both, which leaves Surgery. Both as published with one optimiser for all tasks too. Beside them,
    corrections in closed form, and classifiers where every task has one to start at.
    """
    surgery, prob = (replace(base, head=(head,)) for head in BOTH)
    cache = Cache(base.cache)
    tasks = base.tasks or cache.tasks("test")
    has_classifiers = all(cache.manifest.tasks[task].classifier for task in tasks if task in cache.manifest.tasks)
    return [
        surgery,
        replace(surgery, values={"rank": (16, 128, 192), "steps": (5_000,)}),
        replace(prob, values={"hidden": (16,), "steps": (1_000, 5_000)}),
        replace(prob, values={"samples": (0, 1), "kl_weight": (0.0, 1e-4)}),
        replace(base, head=BOTH, values={"optimizer": ("joint",)}),
        replace(base, head=("ridge", "affine", "orthogonal", *(["classifier"] if has_classifiers else []))),
    ]


STUDIES: dict[str, Study] = {
    "rank": Study(
        "accuracy against Surgery's rank", "Surgery, Tab. 6", _one_sweep(head=("surgery",), values={"rank": RANKS})
    ),
    "width": Study(
        "accuracy against ProbSurgery's width and KL weight",
        "ProbSurgery's ablations",
        _one_sweep(values={"hidden": (32, 64, 128, 256), "kl_weight": (0.0, 1e-5, 1e-4, 1e-3)}),
    ),
    "steps": Study(
        "accuracy against training steps, from one run of each head", "", _one_sweep(head=BOTH, values={"steps": STEPS})
    ),
    "data": Study(
        "accuracy against the share of the images that the fit sees",
        "Surgery, Tab. 4",
        _one_sweep(head=BOTH, fraction=(0.01, 0.05, 0.1, 1.0)),
    ),
    "online": Study(
        "each image once, in order of arrival, one at a time",
        "Surgery, Tab. 5",
        _one_sweep(head=BOTH, fraction=(0.1, 0.5, 1.0), online=True),
    ),
    "shared": Study(
        "one head for all tasks against one for each",
        "ProbSurgery, one-to-all",
        lambda base: [replace(base, head=BOTH, shared=shared) for shared in (False, True)],
    ),
    "samples": Study(
        "accuracy against noise samples in a step; 0: no noise", "", _one_sweep(values={"samples": (0, 1, 2, 5)})
    ),
    "loss": Study("accuracy under each loss", "Surgery's ablations", _one_sweep(head=BOTH, values={"loss": LOSSES})),
    "protocol": Study("evaluated on the images that were fitted, and on others", "", _protocols),
    "budget": Study("equal width and steps: which part of the gain is the probabilistic one?", "", _budgets),
}


@dataclass(frozen=True)
class StudyResult:
    """A study's table, and how many heads were fitted for it."""

    table: Table
    fitted: int
    """Heads fitted now; the others were there already, or failed."""
    failures: tuple[tuple[str, str], ...]
    """Each head that could not be fitted, and why."""


def study(name: str, base: SweepConfig, progress: Progress = no_progress) -> StudyResult:
    """Fit the heads of a study that are not among the results yet.

    `base` gives the cache, seeds, tasks, device and place for results. Raises `InputError` for an unknown study, or if
    every head failed.
    """
    if name not in STUDIES:
        raise unknown("study", name, STUDIES)
    # Sweeps of a study may overlap; the features of one split are loaded at a time.
    configs = dict.fromkeys(config for sweep in STUDIES[name].sweeps(base) for config in sweep.expand())
    results = []
    for split in dict.fromkeys(config.fit_split for config in configs):
        of_split = [config for config in configs if config.fit_split == split]
        results += fit_all(of_split, keep_heads=base.keep_heads, progress=progress)
    failures = tuple(failure for result in results for failure in result.failures)
    table = _table(name, base, [row for result in results for row in result.rows])
    return StudyResult(table, sum(result.fitted for result in results), failures)


def _table(name: str, base: SweepConfig, rows: Sequence[ResultRow]) -> Table:
    """The encoders and every setting, under one protocol after the other."""
    if not rows:
        raise InputError(f"the study {name} has no result: every head failed")
    cache = Cache(base.cache)
    tasks = [task for task in cache.identity.tasks if any(row.task == task for row in rows)]
    protocols = list(dict.fromkeys(row.base_protocol for row in rows))
    lines: list[Line] = []
    for protocol in protocols:
        protocol_rows = [row for row in rows if row.base_protocol == protocol]
        suffix = f" ({protocol})" if len(protocols) > 1 else ""
        for encoder in ("individual", "merged"):
            values = encoder_accuracy(protocol_rows, tasks, encoder)
            if not any(line.values == values for line in lines):
                lines.append(Line(f"{encoder}{suffix}", values, BASELINE))
        for setting in by_setting(protocol_rows):
            lines.append(Line(f"+ {head_label(setting[0])}{suffix}", head_figures(setting, tasks).line_values))
    seeds = f"{len(base.seed)} seeds" if len(base.seed) > 1 else f"seed {base.seed[0]}"
    title = STUDIES[name].title
    title = f"{title[0].upper()}{title[1:]} ({cache.path}: {'; '.join(protocols)}, {seeds}); accuracy in %"
    return Table(title, dict.fromkeys([*tasks, AVERAGE], ".1f") | {"bias": ".4f"}, tuple(lines))
