"""results.jsonl: one row for each fitted head and task, added as heads finish."""

import os
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Annotated

from msgspec import Meta

from probsurgery.pipeline.errors import InputError, PassedOverWarning
from probsurgery.pipeline.files import (
    Count,
    MalformedError,
    Name,
    Record,
    Settings,
    Text,
    decode,
    json_text,
    open_file,
    parse_json,
)

FILE = "results.jsonl"
MOST_BYTES = 2**31
"""Of results.jsonl; a row has some 1,000."""
_PROTOCOL = re.compile(r"(.*?)(?:, fraction (\d+(?:\.\d+)?(?:e-\d+)?))?", re.DOTALL)
"""The protocol itself, and the share of the rows that the fit saw."""


Share = Annotated[float, Meta(ge=0, le=1)]
Distance = Annotated[float, Meta(ge=0, le=1e38)]
Seconds = Annotated[float, Meta(ge=0, le=1e12)]


class Accuracy(Record, frozen=True, kw_only=True):
    """Share in [0, 1] of the evaluated rows that the frozen classifier gets right, by the features it is given.

    None for a task without a classifier or labels; `pretrained` also where the cache lacks its features.
    """

    pretrained: Share | None = None
    individual: Share | None
    merged: Share | None
    head: Share | None

    def percent(self, features: str) -> float | None:
        """One of these in percent, if it is known."""
        share = getattr(self, features)
        return None if share is None else 100 * share


class Bias(Record, frozen=True):
    """Mean absolute difference of merged features to the expert's, before and after the head."""

    before: Distance
    after: Distance | None
    """None for a head that leaves features as they are."""


class TrainingPlan(Record, frozen=True, omit_defaults=False):
    """How a head was trained. Only TF32 changes the result beyond float noise."""

    stack: Count = 1
    """Heads trained together."""
    workers: Count = 0
    """Processes that trained stacks side by side, or threads if a compiled kernel did."""
    graph: bool = False
    """Whether a step was replayed as a CUDA graph."""
    precision: Text = "fp32"
    """`fp32`, `tf32`, or `fp64` for heads in closed form."""
    kernel: Text = "torch"
    """`avx512`, `avx2` or `neon` if a compiled step trained."""


class ResultRow(Record, frozen=True, kw_only=True):
    """One fitted head on one task."""

    fit_rows: Count | None = None
    eval_rows: Count | None = None
    accuracy: Accuracy
    bias: Bias
    task: Name
    head: Name
    """Name of the setting, and of the head's folder if it was saved."""
    kind: Name
    """May be one that only a newer version knows."""
    settings: Settings
    shared: bool
    tasks: tuple[Name, ...] = ()
    """Tasks of the head: this one, or all that share it."""
    seed: Count
    protocol: Text
    request: Text | None = None
    """Digest of what determines the head."""
    cache: Text
    """Digest of what determines the task's features."""
    arch: Text = ""
    merge: Text = ""
    parameters: Count
    seconds: Seconds
    device: Text = ""
    plan: TrainingPlan | None = None
    from_run_of: Count | None = None
    """Steps of the longer run from which this head was copied."""

    @property
    def base_protocol(self) -> str:
        """The protocol without the share of the rows that the fit saw."""
        return self._protocol_parts[0]

    @property
    def fraction(self) -> float:
        """Share of the rows that the fit saw."""
        return float(self._protocol_parts[1] or 1)

    @property
    def _protocol_parts(self) -> tuple[str, str | None]:
        match = _PROTOCOL.fullmatch(self.protocol)
        assert match, "the pattern matches any text"
        return match[1], match[2]

    @property
    def is_online(self) -> bool:
        """Whether the fit saw each row once, in order of arrival."""
        return self.base_protocol.endswith(", online")

    @property
    def is_tf32(self) -> bool:
        """Whether the head was trained in TF32, which changes its result."""
        return self.plan is not None and self.plan.precision == "tf32"


@dataclass(frozen=True)
class Spread:
    """A figure over seeds."""

    mean: float
    sd: float | None
    """Standard deviation with n - 1; None for a single seed."""
    seeds: int = 1
    by_seed: Mapping[int, float] = field(default_factory=dict, compare=False)
    """The value of each seed, if the figure depends on it and they are known."""


def mean_if_known(values: Iterable[float | None]) -> float | None:
    """The mean; None if one of the values is not known, or without any: a mean over fewer would be another figure."""
    values = list(values)
    known = [value for value in values if value is not None]
    return fmean(known) if known and len(known) == len(values) else None


def spread(values: Iterable[float] | Mapping[int, float]) -> Spread | None:
    """Mean and standard deviation of one value for each seed, or of values by seed; None without values."""
    by_seed = values if isinstance(values, Mapping) else {}
    values = list(by_seed.values() or values)
    if not values:
        return None
    return Spread(fmean(values), stdev(values) if len(values) > 1 else None, len(values), by_seed)


def spreads(figures: Mapping[str, Sequence[float] | Mapping[int, float]]) -> dict[str, Spread]:
    """The spread of each collection of values that is not empty."""
    return {name: found for name, values in figures.items() if (found := spread(values))}


def append_results(folder: Path, rows: Sequence[ResultRow]) -> None:
    """Add rows to results.jsonl in an existing folder, in one write; a torn last line of a kill is closed first."""
    text = "".join(json_text(row.to_json()) + "\n" for row in rows)
    with open_file(folder / FILE, append=True, links=False) as out:
        if out.tell():
            out.seek(-1, os.SEEK_END)
            if out.read(1) != b"\n":
                text = "\n" + text
        out.write(text.encode())


def read_results(folder: Path) -> list[ResultRow]:
    """Rows of results.jsonl. Lines that a kill left torn, or that hold something else, are passed over with a warning.

    Of several rows for one request, task and head, which two fits at once may leave, the last counts. Raises
    `InputError` if the file is a link, a pipe or a device, or beyond all measure.
    """
    path = folder / FILE
    rows: dict[tuple[str | int, str, str], ResultRow] = {}
    problems: dict[int, MalformedError] = {}
    try:
        with open_file(path, links=False) as file:
            if os.fstat(file.fileno()).st_size > MOST_BYTES:
                raise InputError(f"{path} has more than {MOST_BYTES:,} bytes; move it away, and fit again")
            for number, line in enumerate(file, 1):
                try:
                    if line.strip():
                        row = decode(ResultRow, parse_json(line))
                        rows[row.request or number, row.task, row.head] = row
                except MalformedError as error:
                    problems[number] = error
    except (FileNotFoundError, NotADirectoryError):
        return []
    if problems:
        (first, problem), count = next(iter(problems.items())), len(problems)
        lines = f"line {first} is" if count == 1 else f"{count:,} lines are"
        which = "" if count == 1 else f"the first is line {first}: "
        text = f"{path}: {lines} passed over ({which}{problem}); the others are used"
        warnings.warn(text, PassedOverWarning, stacklevel=2)
    return list(rows.values())
