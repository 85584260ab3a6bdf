"""Lines of tables: the result rows of one setting, their label, and their figures over seeds."""

from collections import defaultdict
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from statistics import fmean

from probsurgery.pipeline.analysis.tables import AVERAGE
from probsurgery.pipeline.config import HEAD_SETTINGS, number_text
from probsurgery.pipeline.store.results import ResultRow, Spread, spreads

_WIDTHS = {settings.width_name for settings in HEAD_SETTINGS.values()}


def setting_key(row: ResultRow) -> Hashable:
    """What rows of several tasks and seeds share that are one line: a head's setting and protocol."""
    return row.kind, frozenset(row.settings.items()), row.tasks if row.shared else None, row.is_tf32, row.protocol


def by_setting(rows: Iterable[ResultRow]) -> list[list[ResultRow]]:
    """Rows of each setting and protocol, in order of first appearance."""
    groups: dict[Hashable, list[ResultRow]] = defaultdict(list)
    for row in rows:
        groups[setting_key(row)].append(row)
    return list(groups.values())


def departures(row: ResultRow, leave_out: Collection[str] = ()) -> dict[str, object]:
    """Settings that differ from the default of this kind of head."""
    defaults = _defaults(row.kind)
    return {name: v for name, v in row.settings.items() if name not in leave_out and v != defaults.get(name)}


@cache
def _defaults(kind: str) -> Mapping[str, object]:
    return asdict(HEAD_SETTINGS[kind]()) if kind in HEAD_SETTINGS else {}


def departure_count(row: ResultRow, leave_out: Collection[str] = ()) -> int:
    """In how many ways a fit differs from the default one, for its kind of head."""
    return len(departures(row, leave_out)) + row.shared + ("fraction" not in leave_out and row.fraction != 1)


def sort_key(row: ResultRow, leave_out: Collection[str] = ()) -> tuple[object, ...]:
    """Order of settings of one kind of head: private heads first, then by fraction, width, and the other settings."""
    settings = [(name, value) for name, value in row.settings.items() if name not in leave_out]
    settings.sort(key=lambda item: item[0] not in _WIDTHS)
    values = [(0, v, "") if isinstance(v, int | float) else (1, 0, str(v)) for _, v in settings]
    return row.shared, row.fraction, values


def head_label(row: ResultRow, leave_out: Collection[str] = ()) -> str:
    """A head's name in a table: its kind, width, steps, and whatever departs from the default."""
    kind = HEAD_SETTINGS.get(row.kind)
    details, named = [], {"batch_size", "steps"} if row.is_online else set()
    if kind and (width := kind.width_name):
        named |= {width, "steps"}
        if width not in leave_out:
            details.append(f"{width[0]}={row.settings.get(width, '?')}")
        if "steps" not in leave_out and not row.is_online:
            details.append(f"{row.settings.get('steps', '?')} steps")
    others = departures(row, {*named, *leave_out})
    details += [f"{name.replace('_', '-')}={value_text(value)}" for name, value in others.items()]
    if row.fraction != 1 and "fraction" not in leave_out:
        details.append(f"{100 * row.fraction:g} % of the rows")
    details += ["shared"] * row.shared + ["tf32"] * row.is_tf32
    return (kind.title if kind else row.kind) + (f" ({', '.join(details)})" if details else "")


def value_text(value: object) -> str:
    """A setting's value as text."""
    return number_text(value) if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class HeadFigures:
    """Figures of the heads of one setting over seeds: for each task, and the average if every task is there."""

    accuracy: dict[str, Spread]
    """In percent."""
    bias: dict[str, Spread]
    """Mean absolute difference of corrected features to the expert's; empty for classifier heads."""

    @property
    def line_values(self) -> dict[str, Spread]:
        """Accuracy by task, and the average bias."""
        return self.accuracy | ({"bias": self.bias[AVERAGE]} if AVERAGE in self.bias else {})


def head_figures(rows: Sequence[ResultRow], tasks: Sequence[str]) -> HeadFigures:
    """Figures of the heads of one setting."""
    accuracy = _over_seeds(rows, tasks, lambda row: row.accuracy.percent("head"))
    return HeadFigures(accuracy, _over_seeds(rows, tasks, lambda row: row.bias.after))


def encoder_accuracy(rows: Sequence[ResultRow], tasks: Sequence[str], encoder: str) -> dict[str, Spread]:
    """Accuracy in percent of the `pretrained`, `individual` or `merged` encoder on the rows of evaluation, if known."""
    return _without_equal_seeds(_over_seeds(rows, tasks, lambda row: row.accuracy.percent(encoder)))


def merged_bias(rows: Sequence[ResultRow], tasks: Sequence[str]) -> dict[str, Spread]:
    """Bias of the merged encoder on the rows that the heads were evaluated on."""
    return _without_equal_seeds(_over_seeds(rows, tasks, lambda row: row.bias.before))


def head_count(rows: Sequence[ResultRow]) -> int:
    """Heads of one setting and seed: one for each task, unless it is shared."""
    return 1 if rows[0].shared else len({row.task for row in rows})


def parameters_each(rows: Sequence[ResultRow]) -> str:
    """Parameters of one head of a setting; classifier heads have as many as their classes take."""
    counts = sorted({row.parameters for row in rows})
    return f"{counts[0]:,}" + (f" to {counts[-1]:,}" if len(counts) > 1 else "")


def parameters_of_all(rows: Sequence[ResultRow]) -> int:
    """Parameters of all heads of a setting and seed."""
    by_task = {row.task: row.parameters for row in rows}
    return rows[0].parameters if rows[0].shared else sum(by_task.values())


def training_seconds(rows: Sequence[ResultRow]) -> float:
    """Training time of all heads of one setting and seed."""
    # Each row of a shared head has the whole head's time.
    return rows[0].seconds if rows[0].shared else sum(row.seconds for row in rows)


def _over_seeds(
    rows: Sequence[ResultRow], tasks: Sequence[str], figure: Callable[[ResultRow], float | None]
) -> dict[str, Spread]:
    """A figure for each task over seeds, and its average over tasks for the seeds that have every task.

    A task without the figure, as without labels, has none, and so has the average.
    An encoder's figure of one task and seed is the mean over the heads that were evaluated.
    """
    by_seed: dict[int, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if (value := figure(row)) is not None:
            by_seed[row.seed][row.task].append(value)
    means = {seed: {task: fmean(values) for task, values in by_task.items()} for seed, by_task in by_seed.items()}
    columns = {task: {seed: of[task] for seed, of in means.items() if task in of} for task in tasks}
    columns[AVERAGE] = {s: fmean(of[task] for task in tasks) for s, of in means.items() if of.keys() >= set(tasks)}
    return spreads(columns)


def _without_equal_seeds(figures: dict[str, Spread]) -> dict[str, Spread]:
    """An encoder's figures: a seed changes one only if it chooses the rows that are evaluated on."""
    return {column: f if f.sd and f.sd > 1e-9 else Spread(f.mean, None) for column, f in figures.items()}
