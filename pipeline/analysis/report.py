"""Results -> tables: the heads fitted on one or several caches, beside the encoders between which they stand."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

from probsurgery.pipeline.analysis.curves import Curve, Grid, curve_table, find_curves, find_grids
from probsurgery.pipeline.analysis.kept_heads import current_rows
from probsurgery.pipeline.analysis.labels import by_setting, departure_count, head_label, setting_digest, sort_key
from probsurgery.pipeline.analysis.published import published_lines, published_name
from probsurgery.pipeline.analysis.summary import (
    encoder_accuracy,
    head_count,
    head_figures,
    merged_bias,
    training_seconds,
)
from probsurgery.pipeline.analysis.tables import AVERAGE, BASELINE, Line, Table
from probsurgery.pipeline.config import HEAD_SETTINGS
from probsurgery.pipeline.errors import InputError
from probsurgery.pipeline.merging.registry import merge_label
from probsurgery.pipeline.models import architectures
from probsurgery.pipeline.store.cache import Cache
from probsurgery.pipeline.store.results import ResultRow, Spread, read_results, spread


@dataclass(frozen=True)
class Report:
    """Tables of the results of one protocol, for caches that share architecture and tasks."""

    caches: tuple[str, ...]
    arch: str
    merges: tuple[str, ...]
    protocol: str
    tasks: tuple[str, ...]
    accuracy: Table
    """In percent: baselines, then each merge and its heads; published figures if asked for."""
    bias: Table
    """Mean absolute difference to the expert's features."""
    costs: Table
    """What each head wins back, and what it costs."""
    curves: tuple[Curve, ...] = ()
    grids: tuple[Grid, ...] = ()
    """Where hidden width and KL weight were swept together."""
    others: int = 0
    """Settings of sweeps that have no line of their own."""

    @property
    def tables(self) -> tuple[Table, ...]:
        """All tables: accuracy, bias, costs, then one for each curve."""
        return (self.accuracy, self.bias, self.costs, *(curve_table(curve, self.tasks) for curve in self.curves))


@dataclass(frozen=True)
class _Source:
    """A cache and its results under one protocol."""

    cache: Cache
    folder: Path
    """Where the results and heads are."""
    rows: list[ResultRow]
    name: str = ""
    """The merge's label; with the folder's name where several caches have the same merge."""

    @property
    def merge(self) -> str:
        """The merge's label."""
        merge = self.cache.identity.merge
        return merge_label(merge.method, merge.settings, merge.name)


def report(
    caches: str | Path | Sequence[str | Path],
    results: str | Path | None = None,
    *,
    with_published: bool = False,
    everything: bool = False,
) -> list[Report]:
    """Tables of the results of one or several caches, for each architecture, set of tasks and protocol.

    The main tables have the heads that are kept and those with default settings; sweeps are summed up as curves.
    `everything` gives every setting a line. Results for another cache identity are left out. Raises `InputError` if
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
        identity = source.cache.identity
        for protocol in dict.fromkeys(row.base_protocol for row in source.rows):
            rows = [row for row in source.rows if row.base_protocol == protocol]
            groups[identity.arch, identity.tasks, protocol].append(replace(source, rows=rows))
    return [
        _report(protocol, _named(sources), with_published, everything) for (_, _, protocol), sources in groups.items()
    ]


def _read(cache: Cache, results: str | Path | None) -> _Source:
    folder = Path(results) if results is not None else cache.path
    # The last row counts where a head was fitted more than once.
    last = {(setting_digest(row), row.seed, row.task): row for row in current_rows(read_results(folder), cache)}
    rows = list(last.values())
    if not rows:
        raise InputError(f"no results of this cache in {folder}; run `probsurgery fit --cache {cache.path}` first")
    return _Source(cache, folder, rows)


def _named(sources: Sequence[_Source]) -> list[_Source]:
    """The sources with names. Caches of the same merge, of other images or in another type, get their folder's name."""
    counts = Counter(source.merge for source in sources)
    folders = [f", {source.cache.path.name}" if counts[source.merge] > 1 else "" for source in sources]
    return [replace(source, name=source.merge + folder) for source, folder in zip(sources, folders, strict=True)]


def _report(protocol: str, sources: Sequence[_Source], with_published: bool, everything: bool) -> Report:
    identity = sources[0].cache.identity
    tasks = tuple(task for task in identity.tasks if any(row.task == task for s in sources for row in s.rows))
    accuracy, bias, costs = _baselines(sources, tasks), [], []
    curves, grids, others = [], [], 0
    for source in sources:
        prefix = f"{source.name} + " if len(sources) > 1 else ""
        merged = f"merged ({source.name})"
        accuracy.append(Line(merged, encoder_accuracy(source.rows, tasks, "merged"), method=source.merge))
        bias.append(Line(merged, merged_bias(source.rows, tasks)))
        settings = _labelled_settings(source.rows)
        main = [(label, rows) for label, rows in settings if _is_default(rows[0]) or _is_kept(source, rows)]
        shown = settings if everything or not main else main
        others += len(settings) - len(shown)
        for label, rows in shown:
            label = (prefix or "+ ") + label
            figures = head_figures(rows, tasks)
            accuracy.append(Line(label, figures.accuracy, method=published_name(source.merge, rows[0])))
            bias.append(Line(label, figures.bias))
            costs.append(Line(label, _costs(rows, tasks, identity.arch)))
        curves += find_curves(source.rows, prefix)
        grids += find_grids(source.rows, prefix)
    if with_published:
        accuracy += published_lines(identity.arch, accuracy, tasks)
    where = _circumstances(protocol, sources)
    over_seeds = any(isinstance(v, Spread) and v.sd is not None for line in accuracy for v in line.values.values())
    notes = ("Mean and standard deviation over seeds where there are several.",) if over_seeds else ()
    columns = [*tasks, AVERAGE]
    return Report(
        caches=tuple(str(source.cache.path) for source in sources),
        arch=identity.arch,
        merges=tuple(source.name for source in sources),
        protocol=protocol,
        tasks=tasks,
        accuracy=Table(f"Accuracy in % ({where})", dict.fromkeys(columns, ".1f"), tuple(accuracy), max, notes=notes),
        bias=Table(
            f"Bias, mean absolute difference to the expert's features ({where})",
            dict.fromkeys(columns, ".3f"),
            tuple(bias),
            min,
            notes=notes,
        ),
        costs=Table(
            f"Heads: share of the average loss to the experts won back, and what they cost ({where})",
            {"won back, %": ".0f", "parameters": ",", "of the encoder, %": ".2f", "all heads": ",", "fit, s": ".1f"},
            tuple(costs),
        ),
        curves=tuple(curves),
        grids=tuple(grids),
        others=others,
    )


def _circumstances(protocol: str, sources: Sequence[_Source]) -> str:
    """Architecture, corruption of the images if there is one in common, and protocol."""
    corruptions = {source.cache.identity.corruption for source in sources}
    corrupted = [f"images corrupted by {kind}" for kind in corruptions if len(corruptions) == 1 and kind]
    return ", ".join([sources[0].cache.identity.arch, *corrupted, protocol])


def _baselines(sources: Sequence[_Source], tasks: Sequence[str]) -> list[Line]:
    """The pre-trained encoder and the experts: one line each if all caches agree, else one for each cache."""
    lines = []
    for encoder, label in (("pretrained", "pretrained"), ("individual", "individual experts")):
        figures = [(source.name, encoder_accuracy(source.rows, tasks, encoder)) for source in sources]
        figures = [(name, values) for name, values in figures if values]
        if all(_are_equal(values, figures[0][1]) for _, values in figures):
            lines += [Line(label, values, BASELINE, encoder) for _, values in figures[:1]]
        else:
            lines += [Line(f"{label} ({name})", values, BASELINE, encoder) for name, values in figures]
    return lines


def _are_equal(a: dict[str, Spread], b: dict[str, Spread]) -> bool:
    return a.keys() == b.keys() and all(abs(a[c].mean - b[c].mean) < 1e-9 and a[c].seeds == b[c].seeds for c in a)


def _labelled_settings(rows: Sequence[ResultRow]) -> list[tuple[str, list[ResultRow]]]:
    """Labels and rows of all settings: kinds of head in order of appearance, the settings of a kind sorted.

    Where several settings have one label, each has the head's name too.
    """
    kinds = list(dict.fromkeys(row.kind for row in rows))
    settings = sorted(by_setting(rows), key=lambda group: (kinds.index(group[0].kind), sort_key(group[0])))
    counts = Counter(head_label(first) for first, *_ in settings)
    labelled = []
    for group in settings:
        label = head_label(group[0])
        labelled.append((f"{label} [{group[0].head}]" if counts[label] > 1 else label, group))
    return labelled


def _is_default(row: ResultRow) -> bool:
    return row.kind in HEAD_SETTINGS and not departure_count(row)


def _is_kept(source: _Source, rows: Sequence[ResultRow]) -> bool:
    return any((source.folder / "heads" / row.head).is_dir() for row in rows)


def _costs(rows: Sequence[ResultRow], tasks: Sequence[str], arch: str) -> dict[str, Spread | float]:
    by_seed: dict[int, list[ResultRow]] = defaultdict(list)
    for row in rows:
        by_seed[row.seed].append(row)
    parameters = rows[0].parameters
    values = {"parameters": parameters, "all heads": head_count(rows) * parameters}
    values["fit, s"] = spread(training_seconds(seed_rows) for seed_rows in by_seed.values())
    encoder = _encoder_parameters(arch)
    if encoder:
        values["of the encoder, %"] = 100 * parameters / encoder
    shares = [share for seed_rows in by_seed.values() if (share := _won_back(seed_rows, tasks)) is not None]
    return values | ({"won back, %": spread(100 * share for share in shares)} if shares else {})


def _encoder_parameters(arch: str) -> int | None:
    """Parameters of the merged image encoder; None for an architecture that is not known here."""
    try:
        return sum(shape.numel() for shape in architectures.expected_shapes(arch).values())
    except InputError:
        return None


def _won_back(rows: Sequence[ResultRow], tasks: Sequence[str]) -> float | None:
    """Share of the accuracy lost by merging that the heads of one seed win back, from averages over tasks.

    None without every task, or if merging lost nothing.
    """
    if len(rows) < len(tasks):
        return None
    merged, head, individual = (
        fmean(getattr(row.accuracy, name) for row in rows) for name in ("merged", "head", "individual")
    )
    return (head - merged) / (individual - merged) if individual > merged else None
