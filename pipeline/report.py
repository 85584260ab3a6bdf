"""Results -> tables: accuracy and bias of every head kept with a cache, beside the encoders they stand between."""

from __future__ import annotations

import csv
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

from probsurgery.pipeline import merging
from probsurgery.pipeline.config import HEAD_SETTINGS, fingerprint, number
from probsurgery.pipeline.errors import InputError
from probsurgery.pipeline.results import read_results
from probsurgery.pipeline.store import Cache

BASELINES = ("pretrained", "individual", "merged")


@dataclass(frozen=True)
class Line:
    """One line of a table: a model's figure for each task, and their mean if it has all tasks."""

    label: str
    values: dict[str, float]
    mean: float | None


@dataclass(frozen=True)
class Cost:
    """What a head takes."""

    parameters: int
    """Of each head."""
    seconds: float
    """To fit all its tasks."""


@dataclass(frozen=True)
class Report:
    """What one cache's results of one protocol say."""

    cache: str
    arch: str
    merge: str
    protocol: str
    tasks: tuple[str, ...]
    accuracy: tuple[Line, ...]
    """In percent: the baselines, then the heads."""
    bias: tuple[Line, ...]
    """Mean absolute difference to the expert's features: merged, then each head."""
    won_back: dict[str, float]
    """For each head, the share of what merging loses to the experts that the head wins back: from the averages over
    tasks, on the rows that this head was evaluated on."""
    costs: dict[str, Cost]


def report(cache: str | Path, results: str | Path | None = None) -> list[Report]:
    """Tables of every result kept with a cache, one for each protocol.

    Results of another cache identity are left out. Raises `InputError` if there is no cache or no result.
    """
    opened = Cache(cache)
    folder = Path(results) if results is not None else opened.path
    tasks = {task: about["splits"] for task, about in opened.manifest["tasks"].items()}
    current = {task: opened.task_fingerprint(task) for task, splits in tasks.items() if "test" in splits}
    rows = [row for row in read_results(folder) if row["cache"] == current.get(row["task"])]
    # A head that was fitted anew has a later row.
    rows = list({(_setting(row), row["protocol"], row["task"]): row for row in rows}.values())
    if not rows:
        raise InputError(f"no results of this cache in {folder}; run `probsurgery fit --cache {opened.path}` first")
    protocols = dict.fromkeys(row["protocol"] for row in rows)
    return [_table(opened, p, [row for row in rows if row["protocol"] == p]) for p in protocols]


def published(arch: str) -> list[dict[str, str]]:
    """Published figures for an architecture: source, method, accuracy in % for each task and on average.

    They were measured by others, on other copies of the data; an empty text is a figure that was not given.
    """
    with (Path(__file__).parent / "data" / "published.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [{key: value for key, value in row.items() if key != "arch"} for row in rows if row["arch"] == arch]


def _table(cache: Cache, protocol: str, rows: Sequence[dict]) -> Report:
    tasks = tuple(t for t in cache.identity["tasks"] if any(row["task"] == t for row in rows))
    heads = defaultdict(list)
    for row in rows:
        heads[_setting(row)].append(row)
    labels = {setting: head_label(its[0]) for setting, its in heads.items()}
    count = Counter(labels.values())
    labels = {
        setting: label if count[label] == 1 else f"{label} [{heads[setting][0]['head']}]"
        for setting, label in labels.items()
    }

    accuracy = {
        _baseline_label(kind, cache): _by_task(rows, tasks, lambda row, kind=kind: row["accuracy"].get(kind))
        for kind in BASELINES
    }
    bias = {"merged (before)": _by_task(rows, tasks, lambda row: row["bias"]["before"])}
    for setting, its in heads.items():
        accuracy[labels[setting]] = _by_task(its, tasks, lambda row: row["accuracy"]["head"])
        bias[labels[setting]] = _by_task(its, tasks, lambda row: row["bias"]["after"])
    accuracy = {label: {t: 100 * v for t, v in values.items()} for label, values in accuracy.items() if values}
    lines = tuple(_line(label, values, tasks) for label, values in accuracy.items())
    return Report(
        str(cache.path),
        cache.identity["arch"],
        merging.label(cache.identity["merge"]),
        protocol,
        tasks,
        lines,
        tuple(_line(label, values, tasks) for label, values in bias.items()),
        {labels[setting]: won for setting, its in heads.items() if (won := _won_back(its, tasks)) is not None},
        {labels[setting]: cost(its) for setting, its in heads.items()},
    )


def _setting(row: dict) -> str:
    """What makes the heads of several tasks one line, whatever they are called: all but the task."""
    shared_by = row.get("tasks") if row["shared"] else None
    return fingerprint([row["kind"], row["settings"], row["seed"], shared_by, _is_tf32(row)])


def _is_tf32(row: dict) -> bool:
    return isinstance(row.get("plan"), dict) and row["plan"].get("precision") == "tf32"


def cost(rows: Sequence[dict]) -> Cost:
    """What the head of these rows, one for each of its tasks, takes."""
    counted = rows[:1] if rows[0]["shared"] else rows  # a shared head's seconds are in each of its rows
    return Cost(rows[0]["parameters"], sum(row["seconds"] for row in counted))


def _by_task(rows: Sequence[dict], tasks: Sequence[str], value) -> dict[str, float]:
    found = {task: [v for row in rows if row["task"] == task and (v := value(row)) is not None] for task in tasks}
    return {task: fmean(values) for task, values in found.items() if values}


def _line(label: str, values: dict[str, float], tasks: Sequence[str]) -> Line:
    return Line(label, values, fmean(values.values()) if len(values) == len(tasks) else None)


def _won_back(rows: Sequence[dict], tasks: Sequence[str]) -> float | None:
    if len(rows) < len(tasks):
        return None
    merged, head, individual = (
        fmean(row["accuracy"][kind] for row in rows) for kind in ("merged", "head", "individual")
    )
    return (head - merged) / (individual - merged) if individual > merged else None


def _baseline_label(kind: str, cache: Cache) -> str:
    merge = merging.label(cache.identity["merge"])
    return {"individual": "individual experts", "merged": f"merged ({merge})"}.get(kind, kind)


def head_label(row: dict) -> str:
    """A head as a line of a table: its kind, width, steps and what else departs from the default."""
    settings = defaultdict(lambda: "?", row["settings"])
    match row["kind"]:
        case "surgery":
            about = [f"r={settings['rank']}", f"{settings['steps']} steps"]
            name, shown = "Surgery", {"rank", "steps"}
        case "prob":
            about = [f"h={settings['hidden']}", f"{settings['steps']} steps"]
            name, shown = "ProbSurgery", {"hidden", "steps"}
        case kind:
            about, name, shown = [], kind, set()
    defaults = asdict(HEAD_SETTINGS[row["kind"]]()) if row["kind"] in HEAD_SETTINGS else {}
    other = {key: value for key, value in settings.items() if key not in shown and value != defaults.get(key)}
    texts = {key: number(value) if isinstance(value, float) else value for key, value in other.items()}
    about += [f"{key.replace('_', '-')}={text}" for key, text in texts.items()]
    about += ["shared"] if row["shared"] else []
    about += ["tf32"] if _is_tf32(row) else []
    about += [f"seed {row['seed']}"] if row["seed"] else []
    return f"+ {name}" + (f" ({', '.join(about)})" if about else "")
