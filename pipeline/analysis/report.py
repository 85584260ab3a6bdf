"""Results -> tables: every head kept with one or several caches, beside the encoders they stand between."""

from __future__ import annotations

import csv
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby, product
from operator import itemgetter
from pathlib import Path
from statistics import fmean

from probsurgery.pipeline.analysis.tables import BASELINE, DIFFERENCE, PUBLISHED, Line, Table
from probsurgery.pipeline.config import HEAD_SETTINGS, number_text
from probsurgery.pipeline.datasets.tasks import SUITES
from probsurgery.pipeline.errors import InputError
from probsurgery.pipeline.fingerprints import fingerprint
from probsurgery.pipeline.merging import registry
from probsurgery.pipeline.models import architectures
from probsurgery.pipeline.store.cache import Cache
from probsurgery.pipeline.store.results import Spread, read_results, spread, without_fraction

AXES = ("rank", "hidden", "kl_weight", "steps", "samples", "fraction", "loss", "batch_size", "lr", "penalty")
"""Settings whose sweeps have a table and a figure of their own."""
GRID = ("hidden", "kl_weight")
AVERAGE = "Avg"


@dataclass(frozen=True)
class Cost:
    """What a head takes."""

    parameters: int
    """Of each head."""
    seconds: float
    """To fit all its tasks."""


@dataclass(frozen=True)
class Point:
    """One setting of a curve, over seeds."""

    accuracy: dict[str, Spread]
    """In percent, for each task; and the average, if every task is there."""
    bias: dict[str, Spread]


@dataclass(frozen=True)
class Curve:
    """How good heads are against one setting, all others being equal."""

    axis: str
    label: str
    """The head, with what is held fixed."""
    protocol: str
    points: dict[object, Point]
    """By the setting's value, in order."""


@dataclass(frozen=True)
class Grid:
    """How good heads are against two settings, all others being equal."""

    axes: tuple[str, str]
    values: tuple[list, list]
    """Of either setting, in order."""
    label: str
    protocol: str
    points: dict[tuple, Point]
    """By both settings' values."""


@dataclass(frozen=True)
class Report:
    """What the results of one protocol say, of caches that share architecture and tasks."""

    caches: tuple[str, ...]
    arch: str
    merges: tuple[str, ...]
    protocol: str
    tasks: tuple[str, ...]
    accuracy: Table
    """In percent: baselines, then for each merge its own line and its heads'; published figures if asked for."""
    bias: Table
    """Mean absolute difference to the expert's features."""
    costs: Table
    """What each head wins back, and what it takes."""
    curves: tuple[Curve, ...] = ()
    grids: tuple[Grid, ...] = ()
    """Where hidden width and KL weight were swept together."""
    others: int = 0
    """Settings of sweeps that are not among the lines."""

    @property
    def tables(self) -> tuple[Table, ...]:
        """All of them: accuracy, bias, costs, then one for each curve."""
        return (self.accuracy, self.bias, self.costs, *(curve_table(curve, self.tasks) for curve in self.curves))


@dataclass(frozen=True)
class _Source:
    """A cache and the results kept with it."""

    cache: Cache
    folder: Path
    rows: list[dict]

    @property
    def merge(self) -> str:
        return registry.label(self.cache.identity["merge"])


@dataclass
class _Method:
    """One line to be: the rows of a head's setting, over tasks and seeds."""

    source: _Source
    label: str
    rows: list[dict] = field(default_factory=list)


def report(
    caches: str | Path | Sequence[str | Path],
    results: str | Path | None = None,
    *,
    with_published: bool = False,
    everything: bool = False,
) -> list[Report]:
    """Tables of the results kept with one or several caches, for each architecture, tasks and protocol.

    The main tables have the heads that are kept and those of default settings; sweeps are summed up as curves.
    `everything` gives every setting a line. Results of another cache identity are left out. Raises `InputError` if
    there is no cache or no result.
    """
    paths = [caches] if isinstance(caches, str | Path) else list(caches)
    if len({Path(path).resolve() for path in paths}) < len(paths):
        raise InputError(f"a cache is named twice: {', '.join(map(str, paths))}")
    if results is not None and len(paths) > 1:
        raise InputError("--results goes with one --cache; results of several are read from the caches themselves")
    groups: dict[tuple, list[_Source]] = defaultdict(list)
    for path in paths:
        source = _read(Cache(path), results)
        for protocol in dict.fromkeys(without_fraction(row["protocol"])[0] for row in source.rows):
            rows = [row for row in source.rows if without_fraction(row["protocol"])[0] == protocol]
            key = source.cache.identity["arch"], tuple(source.cache.identity["tasks"]), protocol
            groups[key].append(_Source(source.cache, source.folder, rows))
    return [
        _report(arch, tasks, protocol, sources, with_published, everything)
        for (arch, tasks, protocol), sources in groups.items()
    ]


def published(arch: str) -> list[dict[str, str]]:
    """Published figures for an architecture: source, method, accuracy in % for each task and on average.

    They were measured by others, on other copies of the data; an empty text is a figure that was not given.
    """
    with (Path(__file__).parent / "published.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [{key: value for key, value in row.items() if key != "arch"} for row in rows if row["arch"] == arch]


def _read(cache: Cache, results: str | Path | None) -> _Source:
    folder = Path(results) if results is not None else cache.path
    tasks = {task: about["splits"] for task, about in cache.manifest["tasks"].items()}
    current = {task: cache.task_fingerprint(task) for task, splits in tasks.items() if "test" in splits}
    rows = [row for row in read_results(folder) if row["cache"] == current.get(row["task"])]
    # A head that was fitted anew has a later row.
    rows = list({(setting_of(row), row["seed"], row["protocol"], row["task"]): row for row in rows}.values())
    if not rows:
        raise InputError(f"no results of this cache in {folder}; run `probsurgery fit --cache {cache.path}` first")
    return _Source(cache, folder, rows)


def _report(
    arch: str,
    merged_tasks: tuple[str, ...],
    protocol: str,
    sources: Sequence[_Source],
    with_published: bool,
    everything: bool,
) -> Report:
    tasks = tuple(t for t in merged_tasks if any(row["task"] == t for source in sources for row in source.rows))
    names = {id(s): s.merge for s in sources}
    for label, count in Counter(names.values()).items():
        if count > 1:  # the same merge of other images, or in another type
            names |= {id(s): f"{s.merge}, {s.cache.path.name}" for s in sources if s.merge == label}
    accuracy, bias, costs = _baselines(sources, names, tasks), [], []
    chosen = {id(s): _methods(s, everything) for s in sources}
    for source in sources:
        name = names[id(source)]
        accuracy.append(Line(f"merged ({name})", encoder_line(source.rows, tasks, "merged"), method=source.merge))
        before = _of_encoder(source.rows, tasks, lambda row: row["bias"]["before"])
        bias.append(Line(f"merged ({name})", before))
        prefix = f"{name} " if len(sources) > 1 else ""
        for method in chosen[id(source)]:
            label, rows = prefix + method.label, method.rows
            accuracies, biases = head_values(rows, tasks)
            accuracy.append(Line(label, accuracies, method=_published_name(source.merge, rows[0])))
            bias.append(Line(label, biases))
            costs.append(Line(label, _cost_values(rows, tasks, arch)))
    lines = [*accuracy, *(_published_lines(arch, accuracy, tasks) if with_published else ())]
    corruptions = {source.cache.identity.get("corruption") for source in sources}
    kinds = [f"images corrupted by {kind}" for kind in corruptions if len(corruptions) == 1 and kind]
    where = ", ".join([arch, *kinds, protocol])
    shown = sum(map(len, chosen.values()))
    others = sum(len({setting_of(row) + row["protocol"] for row in s.rows}) for s in sources) - shown
    notes = ("Mean and standard deviation over seeds where there are several.",) if _has_seeds(lines) else ()
    columns = [*tasks, AVERAGE]
    return Report(
        tuple(str(source.cache.path) for source in sources),
        arch,
        tuple(names.values()),
        protocol,
        tasks,
        Table(f"Accuracy in % ({where})", dict.fromkeys(columns, ".1f"), tuple(lines), max, notes=notes),
        Table(
            f"Bias, mean absolute difference to the expert's features ({where})",
            dict.fromkeys(columns, ".3f"),
            tuple(bias),
            min,
            notes=notes,
        ),
        Table(
            f"Heads: share of the average loss to the experts won back, and what they cost ({where})",
            {"won back, %": ".0f", "parameters": ",", "of the encoder, %": ".2f", "all heads": ",", "fit, s": ".1f"},
            tuple(costs),
        ),
        tuple(curve for source in sources for curve in _curves(source, f"{names[id(source)]} " * (len(sources) > 1))),
        tuple(grid for source in sources for grid in _grids(source, f"{names[id(source)]} " * (len(sources) > 1))),
        others,
    )


def _has_seeds(lines: Sequence[Line]) -> bool:
    return any(isinstance(v, Spread) and v.sd is not None for line in lines for v in line.values.values())


def _baselines(sources: Sequence[_Source], names: dict[int, str], tasks: Sequence[str]) -> list[Line]:
    """The pre-trained encoder and the experts: once, where all caches agree on them."""
    lines = []
    for kind, label in (("pretrained", "pretrained"), ("individual", "individual experts")):
        found = {id(s): encoder_line(s.rows, tasks, kind) for s in sources}
        found = {key: values for key, values in found.items() if values}
        alike = all(_are_alike(values, next(iter(found.values()))) for values in found.values())
        for key, values in found.items():
            lines.append(Line(label if alike else f"{label} ({names[key]})", values, BASELINE, kind))
            if alike:
                break
    return lines


def _are_alike(a: dict[str, Spread], b: dict[str, Spread]) -> bool:
    return a.keys() == b.keys() and all(abs(a[c].mean - b[c].mean) < 1e-9 and a[c].seeds == b[c].seeds for c in a)


def _percent(value: float | None) -> float | None:
    return None if value is None else 100 * value


def _methods(source: _Source, everything: bool) -> list[_Method]:
    """The settings that get a line, seeds and tasks together."""
    by_setting: dict[tuple[str, str], list[dict]] = defaultdict(list)
    for row in source.rows:
        by_setting[setting_of(row), row["protocol"]].append(row)
    labels = {key: head_label(rows[0]) for key, rows in by_setting.items()}
    count = Counter(labels.values())
    methods = {
        key: _Method(source, labels[key] + (f" [{rows[0]['head']}]" if count[labels[key]] > 1 else ""), rows)
        for key, rows in by_setting.items()
    }
    kinds = list(dict.fromkeys(row["kind"] for row in source.rows))
    ordered = sorted(methods.values(), key=lambda method: (kinds.index(method.rows[0]["kind"]), _rank(method.rows[0])))
    main = [method for method in ordered if _is_default(method.rows[0]) or _is_kept(method)]
    return ordered if everything or not main else main


def _rank(row: dict) -> tuple:
    """Where a setting stands among those of its kind: private heads first, then by width, then by the rest."""
    settings = sorted(row["settings"].items(), key=lambda item: item[0] not in ("hidden", "rank"))
    fraction = without_fraction(row["protocol"])[1]
    return row["shared"], fraction, [(0, v, "") if isinstance(v, int | float) else (1, 0, str(v)) for _, v in settings]


def _is_default(row: dict) -> bool:
    kind = row["kind"]
    defaults = asdict(HEAD_SETTINGS[kind]()) if kind in HEAD_SETTINGS else None
    return row["settings"] == defaults and not row["shared"] and without_fraction(row["protocol"])[1] == 1


def _is_kept(method: _Method) -> bool:
    return any((method.source.folder / "heads" / row["head"]).is_dir() for row in method.rows)


def _values(rows: Sequence[dict], tasks: Sequence[str], figure: Callable[[dict], float | None]) -> dict[str, Spread]:
    """For each task, the figure over seeds; and its average over tasks, of the seeds that have every task.

    Where several heads of a seed were evaluated on the same rows, an encoder's figure is theirs in common.
    """
    by_seed: dict[int, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        value = figure(row)
        if value is not None:
            by_seed[row["seed"]][row["task"]].append(value)
    means = [{task: fmean(values) for task, values in its.items()} for its in by_seed.values()]
    found = {task: [its[task] for its in means if task in its] for task in tasks}
    found[AVERAGE] = [fmean(its[task] for task in tasks) for its in means if its.keys() >= set(tasks)]
    return {column: spread(values) for column, values in found.items() if values}


def head_values(rows: Sequence[dict], tasks: Sequence[str]) -> tuple[dict[str, Spread], dict[str, Spread]]:
    """Accuracy in percent and bias of a head's setting: for each task over seeds, and the average over tasks."""
    accuracy = _values(rows, tasks, lambda row: 100 * row["accuracy"]["head"])
    return accuracy, _values(rows, tasks, lambda row: row["bias"]["after"])


def encoder_line(rows: Sequence[dict], tasks: Sequence[str], kind: str) -> dict[str, Spread]:
    """Accuracy in percent of an encoder (`pretrained`, `individual` or `merged`) on the rows that heads were evaluated
    on; empty if it is not known."""
    return _of_encoder(rows, tasks, lambda row: _percent(row["accuracy"].get(kind)))


def _of_encoder(
    rows: Sequence[dict], tasks: Sequence[str], figure: Callable[[dict], float | None]
) -> dict[str, Spread]:
    """The same for an encoder, which no seed changes unless it chooses the rows that are evaluated on."""
    values = _values(rows, tasks, figure)
    return {c: v if v.sd and v.sd > 1e-9 else Spread(v.mean, None) for c, v in values.items()}


def setting_of(row: dict) -> str:
    """What makes the heads of several tasks and seeds one line, whatever they are called."""
    shared_by = row.get("tasks") if row["shared"] else None
    return fingerprint([row["kind"], row["settings"], shared_by, _is_tf32(row)])


def _is_tf32(row: dict) -> bool:
    return isinstance(row.get("plan"), dict) and row["plan"].get("precision") == "tf32"


def cost(rows: Sequence[dict]) -> Cost:
    """What the head of these rows, one for each of its tasks, takes."""
    counted = rows[:1] if rows[0]["shared"] else rows  # a shared head's seconds are in each of its rows
    return Cost(rows[0]["parameters"], sum(row["seconds"] for row in counted))


def _cost_values(rows: Sequence[dict], tasks: Sequence[str], arch: str) -> dict[str, Spread | float]:
    by_seed = {seed: list(its) for seed, its in groupby(sorted(rows, key=lambda r: r["seed"]), lambda r: r["seed"])}
    taken = [cost(its) for its in by_seed.values()]
    heads = 1 if rows[0]["shared"] else len({row["task"] for row in rows})
    values = {"parameters": taken[0].parameters, "all heads": heads * taken[0].parameters}
    values["fit, s"] = spread([one.seconds for one in taken])
    encoder = encoder_parameters(arch)
    if encoder:
        values["of the encoder, %"] = 100 * taken[0].parameters / encoder
    won = [share for its in by_seed.values() if (share := _won_back(its, tasks)) is not None]
    return values | ({"won back, %": spread(100 * share for share in won)} if won else {})


def encoder_parameters(arch: str) -> int | None:
    """Parameters of the merged image encoder; None for an architecture that is not known here."""
    try:
        return sum(shape.numel() for shape in architectures.expected_shapes(arch).values())
    except InputError:
        return None


def _won_back(rows: Sequence[dict], tasks: Sequence[str]) -> float | None:
    """Share of what merging loses to the experts that the head wins back: from the averages over tasks, on the rows
    that this head was evaluated on."""
    if len(rows) < len(tasks):
        return None
    merged, head, individual = (
        fmean(row["accuracy"][kind] for row in rows) for kind in ("merged", "head", "individual")
    )
    return (head - merged) / (individual - merged) if individual > merged else None


def _published_name(merge: str, row: dict) -> str:
    """What the published tables call a head of default settings but for its rank; "" for others."""
    kind, settings, (how, fraction) = row["kind"], dict(row["settings"]), without_fraction(row["protocol"])
    if kind not in ("surgery", "prob") or row["shared"] or not how.startswith("transductive"):
        return ""
    defaults = asdict(HEAD_SETTINGS[kind]())
    online = how.endswith("online")
    own = {"rank"} | ({"steps", "batch_size"} if online else set())
    if any(settings.get(name) != value for name, value in defaults.items() if name not in own):
        return ""
    if kind == "prob":
        return f"{merge}+probsurgery" if fraction == 1 and not online else ""
    share = f"{100 * fraction:g}%"
    seen = f";online {share}" if online else "" if fraction == 1 else f";{share} data"
    return f"{merge}+surgery(r={settings['rank']}{seen})"


def _published_lines(arch: str, measured: Sequence[Line], tasks: Sequence[str]) -> list[Line]:
    """The published rows, each with what the measured line of the same method differs from it by."""
    titles = {task.title: name for name, task in SUITES["clip8"]().items()} | {AVERAGE: AVERAGE}
    whole = set(titles.values()) == {*tasks, AVERAGE}
    lines = []
    for row in published(arch):
        values = {titles[title]: float(text) for title, text in row.items() if title in titles and text}
        # An average over other tasks than ours is not to be compared.
        values = {c: v for c, v in values.items() if c in tasks or (c == AVERAGE and whole)}
        lines.append(Line(f"{row['method']} [published: {row['source']}]", values, PUBLISHED, row["method"]))
        for ours in measured:
            if ours.method == row["method"]:
                differences = {c: ours.values[c].mean - v for c, v in values.items() if c in ours.values}
                lines.append(Line(f"measured - published, {row['method']}", differences, DIFFERENCE, row["method"]))
    return lines


def _curves(source: _Source, prefix: str = "") -> list[Curve]:
    """For each kind of head and each setting that varies, the longest curve there is, defaults first."""
    found: dict[tuple, list[tuple]] = defaultdict(list)
    for axis in AXES:
        groups: dict[str, dict[object, list[dict]]] = defaultdict(lambda: defaultdict(list))
        for row in source.rows:
            value, fixed = _on_axis(row, axis)
            if value is not None:
                groups[fixed][value].append(row)
        for by_value in groups.values():
            if len(by_value) > 1:
                first = next(iter(by_value.values()))[0]
                fixed = first | {"settings": {k: v for k, v in first["settings"].items() if k != axis}}
                key = -len(by_value), _departs(first, axis), _rank(fixed), len(found[axis, first["kind"]])
                found[axis, first["kind"]].append((key, by_value))
    return [_curve(axis, min(curves, key=itemgetter(0))[1], prefix) for (axis, _), curves in found.items()]


def _grids(source: _Source, prefix: str) -> list[Grid]:
    """The largest grid of widths and KL weights, defaults first; none if either has but one value."""
    groups: dict[str, dict[tuple, list[dict]]] = defaultdict(lambda: defaultdict(list))
    for row in source.rows:
        width, weight = (row["settings"].get(axis) for axis in GRID)
        if isinstance(width, int) and isinstance(weight, float):
            _, fixed = _on_axis(row | {"settings": row["settings"] | {"hidden": 0}}, "kl_weight")
            groups[fixed][width, weight].append(row)
    found = []
    for by_values in groups.values():
        weights = defaultdict(set)
        for width, weight in by_values:
            weights[width].add(weight)
        most = max(weights.values(), key=len)  # a width that was tried at fewer weights would leave holes
        values = sorted(width for width, its in weights.items() if its >= most), sorted(most)
        if min(map(len, values)) > 1:
            by_values = {key: by_values[key] for key in product(*values)}
            first = next(iter(by_values.values()))[0]
            found.append(((-len(by_values), _departs(first, "hidden"), len(found)), first, values, by_values))
    if not found:
        return []
    _, first, values, by_values = min(found, key=itemgetter(0))
    tasks = list(dict.fromkeys(row["task"] for rows in by_values.values() for row in rows))
    points = {key: Point(*head_values(rows, tasks)) for key, rows in by_values.items()}
    return [Grid(GRID, values, prefix + head_label(first, leave_out=GRID), first["protocol"], points)]


def _departs(row: dict, axis: str) -> int:
    """In how many settings a row is not what a fit is by default, but for one."""
    defaults = asdict(HEAD_SETTINGS[row["kind"]]()) if row["kind"] in HEAD_SETTINGS else {}
    others = sum(row["settings"].get(name) != value for name, value in defaults.items() if name != axis)
    return others + row["shared"] + (axis != "fraction" and without_fraction(row["protocol"])[1] != 1)


def _on_axis(row: dict, axis: str) -> tuple[object, str]:
    """A row's value of a setting, and a digest of everything else but the seed and the task."""
    how, fraction = without_fraction(row["protocol"])
    settings = dict(row["settings"]) | {"fraction": fraction}
    value = settings.pop(axis, None)
    value = value if isinstance(value, int | float | str) else None
    return value, fingerprint([row["kind"], settings, row["shared"], row.get("tasks") if row["shared"] else 0, how])


def _curve(axis: str, by_value: dict[object, list[dict]], prefix: str) -> Curve:
    tasks = list(dict.fromkeys(row["task"] for rows in by_value.values() for row in rows))
    ordered = sorted(by_value, key=lambda value: (isinstance(value, str), value if not isinstance(value, str) else 0))
    points = {value: Point(*head_values(by_value[value], tasks)) for value in ordered}
    first = by_value[ordered[0]][0]
    label = prefix + head_label(first, leave_out=(axis,))
    return Curve(axis, label, without_fraction(first["protocol"])[0], points)


def curve_table(curve: Curve, tasks: Sequence[str]) -> Table:
    """A curve as a table: a line for each value."""
    columns = dict.fromkeys([*tasks, AVERAGE], ".1f") | {"bias": ".4f"}
    lines = []
    for value, point in curve.points.items():
        values = dict(point.accuracy) | ({"bias": point.bias[AVERAGE]} if AVERAGE in point.bias else {})
        lines.append(Line(_shown(value), values))
    title = f"Accuracy in % against {curve.axis.replace('_', ' ')}: {curve.label.removeprefix('+ ')} ({curve.protocol})"
    return Table(title, columns, tuple(lines), first=curve.axis.replace("_", " "))


def _shown(value: object) -> str:
    return number_text(value) if isinstance(value, float) else str(value)


_MAIN = {"surgery": ("rank", "steps"), "prob": ("hidden", "steps")}
_TITLES = {"surgery": "Surgery", "prob": "ProbSurgery"}


def _departures(row: dict, leave_out: Sequence[str] = ()) -> dict[str, object]:
    """Settings that are not the default and are not named in any case."""
    defaults = asdict(HEAD_SETTINGS[row["kind"]]()) if row["kind"] in HEAD_SETTINGS else {}
    said = {*_MAIN.get(row["kind"], ()), *leave_out} | ({"batch_size"} if "online" in row["protocol"] else set())
    return {k: v for k, v in row["settings"].items() if k not in said and v != defaults.get(k)}


def head_label(row: dict, leave_out: Sequence[str] = ()) -> str:
    """A head as a line of a table: its kind, width, steps and what else departs from the default."""
    kind, settings = row["kind"], defaultdict(lambda: "?", row["settings"])
    online = "online" in row["protocol"]
    about = []
    if kind in _MAIN:
        width = _MAIN[kind][0]
        about += [f"{width[0]}={settings[width]}"] if width not in leave_out else []
        about += [f"{settings['steps']} steps"] if "steps" not in leave_out and not online else []
    about += [f"{key.replace('_', '-')}={_shown(value)}" for key, value in _departures(row, leave_out).items()]
    fraction = without_fraction(row["protocol"])[1]
    about += [f"{100 * fraction:g} % of the rows"] if fraction != 1 and "fraction" not in leave_out else []
    about += ["shared"] if row["shared"] else []
    about += ["tf32"] if _is_tf32(row) else []
    return f"+ {_TITLES.get(kind, kind)}" + (f" ({', '.join(about)})" if about else "")
