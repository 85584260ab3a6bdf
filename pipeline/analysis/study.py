"""The papers' analyses: named sets of settings, fitted as a sweep is, and one table for each."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from probsurgery.pipeline.analysis.report import AVERAGE, encoder_line, head_label, head_values, setting_of
from probsurgery.pipeline.analysis.tables import BASELINE, Line, Table
from probsurgery.pipeline.config import LOSSES, FitConfig, SweepConfig
from probsurgery.pipeline.errors import InputError, unknown
from probsurgery.pipeline.fitting.fit import Progress, fit_all
from probsurgery.pipeline.store.cache import Cache

BOTH = ("surgery", "prob")
STEPS = (50, 100, 250, 500, 1_000, 2_500, 5_000)


@dataclass(frozen=True)
class Study:
    """One row of the table of studies."""

    title: str
    paper: str
    """Where the papers have it."""
    parts: Callable[[SweepConfig], Sequence[SweepConfig]]
    """Its sweeps, as variants of one that has the cache, the seeds and the tasks."""


def _one(**changes: object) -> Callable[[SweepConfig], Sequence[SweepConfig]]:
    return lambda base: [replace(base, **changes)]


def _protocols(base: SweepConfig) -> list[SweepConfig]:
    """Train images only where the cache has them for every task that is fitted."""
    parts = [replace(base, head=BOTH, holdout=holdout) for holdout in (0.0, 0.2)]
    cache = Cache(base.cache)
    if all(cache.is_whole(task, "train") for task in base.tasks or cache.tasks("test")):
        parts.append(replace(base, head=BOTH, fit_split="train"))
    return parts


def _budgets(base: SweepConfig) -> list[SweepConfig]:
    """Both heads as published; Surgery with ProbSurgery's width and steps, and with as many parameters (3 d h = 2 d r);
    ProbSurgery with Surgery's; and without its noise, its KL divergence, or both, which leaves Surgery."""
    surgery, prob = (replace(base, head=(head,)) for head in BOTH)
    return [
        surgery,
        replace(surgery, values={"rank": (16, 128, 192), "steps": (5_000,)}),
        replace(prob, values={"hidden": (16,), "steps": (1_000, 5_000)}),
        replace(prob, values={"samples": (0, 1), "kl_weight": (0.0, 1e-4)}),
    ]


STUDIES: dict[str, Study] = {
    "rank": Study(
        "accuracy against Surgery's rank",
        "Surgery, Tab. 6",
        _one(head=("surgery",), values={"rank": (4, 8, 16, 32, 64)}),
    ),
    "width": Study(
        "accuracy against ProbSurgery's width and KL weight",
        "ProbSurgery's ablations",
        _one(values={"hidden": (32, 64, 128, 256), "kl_weight": (0.0, 1e-5, 1e-4, 1e-3)}),
    ),
    "steps": Study(
        "accuracy against training steps, from one run of each head", "", _one(head=BOTH, values={"steps": STEPS})
    ),
    "data": Study(
        "accuracy against the share of the images that the fit sees",
        "Surgery, Tab. 4",
        _one(head=BOTH, fraction=(0.01, 0.05, 0.1, 1.0)),
    ),
    "online": Study(
        "each image once, in order of arrival, one at a time",
        "Surgery, Tab. 5",
        _one(head=BOTH, fraction=(0.1, 0.5, 1.0), online=True),
    ),
    "shared": Study(
        "one head for all tasks against one for each",
        "ProbSurgery, one-to-all",
        lambda base: [replace(base, head=BOTH, shared=shared) for shared in (False, True)],
    ),
    "samples": Study("accuracy against draws in a step; 0: no noise", "", _one(values={"samples": (0, 1, 2, 5)})),
    "loss": Study("accuracy under each loss", "Surgery's ablations", _one(head=BOTH, values={"loss": LOSSES})),
    "protocol": Study("evaluated on the images that were fitted, and on others", "", _protocols),
    "budget": Study("equal width and steps: which part of the gain is the probabilistic one?", "", _budgets),
}


@dataclass(frozen=True)
class StudyResult:
    """A study's table, and how it went."""

    name: str
    table: Table
    fitted: int
    """Heads fitted now; the others were there already, or failed."""
    failures: tuple[tuple[str, str], ...]


def study(name: str, base: SweepConfig, progress: Progress = lambda done, total: None) -> StudyResult:
    """Fit what a study asks for and is not among the results yet. `base` gives cache, seeds, tasks, device, results.

    Raises `InputError` for an unknown study.
    """
    if name not in STUDIES:
        raise unknown("study", name, STUDIES)
    configs = [config for part in STUDIES[name].parts(base) for config in part.expand()]
    configs = list(dict.fromkeys(configs))  # parts may overlap
    by_split: dict[str, list[FitConfig]] = defaultdict(list)
    for config in configs:
        by_split[config.fit_split].append(config)
    results = []
    for its in by_split.values():  # the features of one split at a time
        results += fit_all(its, keep_heads=base.keep_heads, progress=progress)
    failures = tuple(failure for result in results for failure in result.failures)
    rows = [row for result in results for row in result.rows]
    return StudyResult(name, _table(name, base, rows), sum(result.fitted for result in results), failures)


def _table(name: str, base: SweepConfig, rows: list[dict]) -> Table:
    if not rows:
        raise InputError(f"the study {name} has no result: every head failed")
    cache = Cache(base.cache)
    tasks = [task for task in cache.identity["tasks"] if any(row["task"] == task for row in rows)]
    protocols = list(dict.fromkeys(row["protocol"].partition(", fraction")[0] for row in rows))
    by_setting: dict[tuple[str, str], list[dict]] = defaultdict(list)
    for row in rows:
        by_setting[setting_of(row), row["protocol"]].append(row)
    lines = []
    for protocol in protocols:
        own = [row for row in rows if row["protocol"].partition(", fraction")[0] == protocol]
        suffix = f" ({protocol})" if len(protocols) > 1 else ""
        for kind in ("individual", "merged"):
            values = encoder_line(own, tasks, kind)
            if not any(line.values == values for line in lines):
                lines.append(Line(f"{kind}{suffix}", values, BASELINE))
        for its in by_setting.values():
            if its[0] in own:
                values, bias = head_values(its, tasks)
                values |= {"bias": bias[AVERAGE]} if AVERAGE in bias else {}
                lines.append(Line(head_label(its[0]) + suffix, values))
    seeds = f", {len(base.seed)} seeds" if len(base.seed) > 1 else f", seed {base.seed[0]}"
    title = STUDIES[name].title
    title = f"{title[0].upper()}{title[1:]} ({cache.path}: {'; '.join(protocols)}{seeds}); accuracy in %"
    return Table(title, dict.fromkeys([*tasks, AVERAGE], ".1f") | {"bias": ".4f"}, tuple(lines))
