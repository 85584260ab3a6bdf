"""Results -> tables: the heads fitted on one or several caches, beside the encoders between which they stand."""

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from probsurgery.pipeline.analysis import labels
from probsurgery.pipeline.analysis.curves import Curve, Grid, curve_table, find_curves, find_grids
from probsurgery.pipeline.analysis.kept_heads import current_rows
from probsurgery.pipeline.analysis.plausibility import implausible_experts
from probsurgery.pipeline.analysis.published import family_of, published_lines, published_name
from probsurgery.pipeline.analysis.tables import AVERAGE, BASELINE, PUBLISHED, Line, Table, Value
from probsurgery.pipeline.config import HEAD_SETTINGS
from probsurgery.pipeline.errors import InputError
from probsurgery.pipeline.files import folders_in
from probsurgery.pipeline.merging.registry import merge_label
from probsurgery.pipeline.models.encoders import encoder_of
from probsurgery.pipeline.store.cache import Cache
from probsurgery.pipeline.store.manifest import IMPORTED, Identity
from probsurgery.pipeline.store.results import ResultRow, Spread, mean_if_known, read_results, spread

_COSTS = {"won back, %": ".0f", "parameters": ",", "of the encoder, %": ".2f", "all heads": ",", "fit, s": ".1f"}
"""Columns of the costs, and their formats."""


@dataclass(frozen=True)
class Report:
    """Tables of the results of one protocol, for caches that share architecture and tasks."""

    caches: tuple[str, ...]
    arch: str
    suite: str
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
    titles: Mapping[str, str] = field(default_factory=dict)
    """Of tasks, in tables."""
    others: int = 0
    """Settings of sweeps that have no line of their own."""

    @property
    def tables(self) -> tuple[Table, ...]:
        """All tables: accuracy, bias, costs, then one for each curve."""
        all_tables = (self.accuracy, self.bias, self.costs, *(curve_table(c, self.tasks) for c in self.curves))
        return tuple(replace(table, titles=self.titles) for table in all_tables)

    def to_json(self) -> dict[str, object]:
        """Circumstances and tables, with figures in full."""
        circumstances = {
            name: getattr(self, name) for name in ("caches", "arch", "suite", "merges", "protocol", "tasks")
        }
        accuracy, bias, costs, *curves = (table.to_json() for table in self.tables)
        return circumstances | {"accuracy": accuracy, "bias": bias, "costs": costs, "curves": curves}


@dataclass(frozen=True)
class _Source:
    """A cache and its results under one protocol."""

    cache: Cache
    folder: Path
    """Where the results and heads are."""
    merge: str
    """The merge's label."""
    rows: list[ResultRow]


def report(
    caches: str | Path | Sequence[str | Path],
    results: str | Path | None = None,
    *,
    with_published: bool = False,
    everything: bool = False,
) -> list[Report]:
    """Tables of the results of one or several caches, for each architecture, set of tasks and protocol.

    The main tables have the heads that are saved and those with default settings; sweeps are summed up as curves.
    `everything` gives every setting a line. Results for another cache identity are left out. Raises `InputError` if
    there is no cache or no result.
    """
    paths = [caches] if isinstance(caches, str | Path) else list(caches)
    if len({Path(path).resolve() for path in paths}) < len(paths):
        raise InputError(f"a cache is named twice: {', '.join(map(str, paths))}")
    if results is not None and len(paths) > 1:
        raise InputError("--results goes with one --cache; results of several are read from the caches themselves")
    groups: dict[tuple[str, str, tuple[str, ...], str], list[_Source]] = defaultdict(list)
    for path in paths:
        cache = Cache(path)
        folder, merge = Path(cache.path if results is None else results), cache.identity.merge
        label = merge_label(merge.method, merge.settings, merge.name)
        rows = current_rows(read_results(folder), cache)
        if not rows:
            raise InputError(f"no results of this cache in {folder}; run `probsurgery fit --cache {cache.path}` first")
        # The last row counts where a head was fitted more than once.
        last = {(labels.setting_key(row), row.seed, row.task): row for row in rows}.values()
        for protocol in dict.fromkeys(row.base_protocol for row in last):
            source = _Source(cache, folder, label, [row for row in last if row.base_protocol == protocol])
            groups[cache.identity.arch, cache.identity.suite, cache.identity.tasks, protocol].append(source)
    return [_report(protocol, sources, with_published, everything) for (*_, protocol), sources in groups.items()]


def _report(protocol: str, sources: Sequence[_Source], with_published: bool, everything: bool) -> Report:
    identity = sources[0].cache.identity
    tasks = tuple(task for task in identity.tasks if any(row.task == task for s in sources for row in s.rows))
    # Caches of the same merge, of other images or in another type, are told apart by their folders.
    counts = Counter(source.merge for source in sources)
    names = [s.merge + (f", {s.cache.path.name}" if counts[s.merge] > 1 else "") for s in sources]
    accuracy, bias, costs = _baselines(sources, names, tasks), [], []
    curves, grids, others, encoder = [], [], 0, _encoder_parameters(identity)
    for name, source in zip(names, sources, strict=True):
        prefix = f"{name} + " if len(sources) > 1 else ""
        merged = f"merged ({name})"
        accuracy.append(Line(merged, labels.encoder_accuracy(source.rows, tasks, "merged"), method=source.merge))
        bias.append(Line(merged, labels.merged_bias(source.rows, tasks)))
        labelled = _labelled_settings(source.rows)
        saved = {path.name for path in folders_in(source.folder / "heads")}
        main = [(label, rows) for label, rows in labelled if _is_main(rows, saved)]
        shown = labelled if everything or not main else main
        others += len(labelled) - len(shown)
        for label, rows in shown:
            label, figures = (prefix or "+ ") + label, labels.head_figures(rows, tasks)
            accuracy.append(Line(label, figures.accuracy, method=published_name(source.merge, rows[0])))
            bias.append(Line(label, figures.bias))
            costs.append(Line(label, _costs(rows, tasks, encoder)))
        curves += find_curves(source.rows, prefix)
        grids += find_grids(source.rows, prefix)
    if with_published:
        families = {family_of(source.cache.manifest) for source in sources}
        family = families.pop() if len(families) == 1 else ""
        accuracy += published_lines(identity.arch, identity.suite, accuracy, tasks, family)
    corruptions = {source.cache.identity.corruption for source in sources}
    corrupted = [f"images corrupted by {kind}" for kind in corruptions if kind and len(corruptions) == 1]
    where = ", ".join([identity.arch, *corrupted, protocol])
    over_seeds = any(isinstance(v, Spread) and v.sd is not None for line in accuracy for v in line.values.values())
    lacking = [task for task in tasks if not any(task in line.values for line in accuracy if line.kind != PUBLISHED)]
    notes = ("Mean and standard deviation over seeds where there are several.",) if over_seeds else ()
    doubts = [f"No accuracy, and so no average: {', '.join(lacking)} without classifier or labels."] if lacking else []
    doubts += dict.fromkeys(text for source in sources for text in implausible_experts(source.rows, source.cache))
    percents, biases = (dict.fromkeys([*tasks, AVERAGE], spec) for spec in (".1f", ".3f"))
    bias_title = f"Bias, mean absolute difference to the expert's features ({where})"
    cost_title = f"Heads: share of the average loss to the experts won back, and what they cost ({where})"
    return Report(
        caches=tuple(str(source.cache.path) for source in sources),
        arch=identity.arch,
        suite=identity.suite,
        merges=tuple(names),
        protocol=protocol,
        tasks=tasks,
        accuracy=Table(f"Accuracy in % ({where})", percents, tuple(accuracy), max, notes=(*notes, *doubts)),
        bias=Table(bias_title, biases, tuple(bias), min, notes=notes),
        costs=Table(cost_title, _COSTS, tuple(costs)),
        curves=tuple(curves),
        grids=tuple(grids),
        titles={task: title for source in sources for task, title in source.cache.titles.items()},
        others=others,
    )


def _baselines(sources: Sequence[_Source], names: Sequence[str], tasks: Sequence[str]) -> list[Line]:
    """The pre-trained encoder and the experts: one line each if all caches agree, else one for each cache."""
    lines = []
    for encoder, label in (("pretrained", "pretrained"), ("individual", "individual experts")):
        of_each = [labels.encoder_accuracy(source.rows, tasks, encoder) for source in sources]
        figures = [(name, values) for name, values in zip(names, of_each, strict=True) if values]
        if all(_are_equal(values, figures[0][1]) for _, values in figures):
            lines += [Line(label, values, BASELINE, encoder) for _, values in figures[:1]]
        else:
            lines += [Line(f"{label} ({name})", values, BASELINE, encoder) for name, values in figures]
    return lines


def _are_equal(a: dict[str, Spread], b: dict[str, Spread]) -> bool:
    return a.keys() == b.keys() and all(abs(a[c].mean - b[c].mean) < 1e-9 and a[c].seeds == b[c].seeds for c in a)


def _labelled_settings(rows: Sequence[ResultRow]) -> list[tuple[str, list[ResultRow]]]:
    """All settings, sorted within each kind of head. Where several have one label, each has the head's name too."""
    kinds = list(dict.fromkeys(row.kind for row in rows))
    groups = labels.by_setting(rows)
    groups.sort(key=lambda group: (kinds.index(group[0].kind), labels.sort_key(group[0])))
    counts = Counter(labels.head_label(first) for first, *_ in groups)
    labelled = []
    for group in groups:
        label = labels.head_label(group[0])
        labelled.append((f"{label} [{group[0].head}]" if counts[label] > 1 else label, group))
    return labelled


def _is_main(rows: Sequence[ResultRow], saved: Collection[str]) -> bool:
    """Whether a setting is a default one, or has a saved head."""
    is_default = rows[0].kind in HEAD_SETTINGS and not labels.departure_count(rows[0])
    return is_default or any(row.head in saved for row in rows)


def _encoder_parameters(identity: Identity) -> int | None:
    """Parameters of the image tower; None if the encoder cannot be built here."""
    with suppress(InputError):
        if identity.merge.method != IMPORTED:
            return sum(shape.numel() for shape in encoder_of(identity).shapes.values())
    return None


def _costs(rows: Sequence[ResultRow], tasks: Sequence[str], encoder: int | None) -> dict[str, Value | None]:
    by_seed = [[row for row in rows if row.seed == seed] for seed in dict.fromkeys(row.seed for row in rows)]
    is_one_count = len({row.parameters for row in rows}) == 1
    values: dict[str, Value | None] = {
        "parameters": rows[0].parameters if is_one_count else labels.parameters_each(rows),
        "all heads": labels.parameters_of_all(rows),
        "fit, s": spread(map(labels.training_seconds, by_seed)),
    }
    if encoder is not None:
        adds_nothing = rows[0].bias.after is None  # a classifier takes another's place
        values["of the encoder, %"] = 0.0 if adds_nothing else 100 * rows[0].parameters / encoder
    shares = [100 * share for seed_rows in by_seed if (share := _won_back(seed_rows, tasks)) is not None]
    return values | ({"won back, %": spread(shares)} if shares else {})


def _won_back(rows: Sequence[ResultRow], tasks: Sequence[str]) -> float | None:
    """Share of merging's loss of accuracy that one seed's heads win back; None without every task, or without loss."""
    means = [mean_if_known(getattr(row.accuracy, name) for row in rows) for name in ("merged", "head", "individual")]
    merged, head, individual = means
    if len(rows) < len(tasks) or merged is None or head is None or individual is None or individual <= merged:
        return None
    return (head - merged) / (individual - merged)
