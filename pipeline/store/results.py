"""results.jsonl: one row for each fitted head and task, added as heads finish."""

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from probsurgery.pipeline.files import Count, MalformedError, Record, decode, json_text

FILE = "results.jsonl"
_PROTOCOL = re.compile(r"(.*?)(?:, fraction (\d+(?:\.\d+)?(?:e-\d+)?))?", re.DOTALL)
"""The protocol itself, and the share of the rows that the fit saw."""


class Accuracy(Record, frozen=True, kw_only=True):
    """Share in [0, 1] of the evaluated rows that the frozen classifier gets right, by the features it is given."""

    pretrained: float | None = None
    individual: float
    merged: float
    head: float


class Bias(Record, frozen=True):
    """Mean absolute difference of merged features to the expert's, before and after the head."""

    before: float
    after: float


class TrainingPlan(Record, frozen=True, omit_defaults=False):
    """How a head was trained. Only TF32 changes the result beyond float noise."""

    stack: int = 1
    """Heads trained together."""
    workers: int = 0
    graph: bool = False
    """Whether a step was replayed as a CUDA graph."""
    precision: str = "fp32"
    """`fp32`, `tf32`, or `fp64` for ridge."""


class ResultRow(Record, frozen=True, kw_only=True):
    """One fitted head on one task."""

    fit_rows: int | None = None
    eval_rows: int | None = None
    accuracy: Accuracy
    bias: Bias
    task: str
    head: str
    """Name of the setting, and of the head's folder if it was saved."""
    kind: str
    """May be one that only a newer version knows."""
    settings: Mapping[str, Any]
    shared: bool
    tasks: tuple[str, ...] = ()
    """Tasks of the head: this one, or all that share it."""
    seed: int
    protocol: str
    request: str | None = None
    """Digest of what determines the head."""
    cache: str
    """Digest of what determines the task's features."""
    arch: str = ""
    merge: str = ""
    parameters: Count
    seconds: float
    device: str = ""
    plan: TrainingPlan | None = None
    from_run_of: int | None = None
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
    """Add rows to results.jsonl in one write; a torn last line, left by a kill, is closed first."""
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json_text(row.to_json()) + "\n" for row in rows)
    with (folder / FILE).open("a+b") as out:
        if out.tell():
            out.seek(-1, os.SEEK_END)
            if out.read(1) != b"\n":
                text = "\n" + text
        out.write(text.encode())


def read_results(folder: Path) -> list[ResultRow]:
    """Rows of results.jsonl, without lines that a kill left torn, or that hold something else.

    Of several rows for one request, task and head, which two fits at once may leave, the last counts.
    """
    try:
        lines = (folder / FILE).read_text(encoding="utf-8", errors="replace").splitlines()
    except (FileNotFoundError, NotADirectoryError):
        return []
    rows: dict[tuple[str | int, str, str], ResultRow] = {}
    for number, line in enumerate(lines):
        with suppress(ValueError, RecursionError, MalformedError):
            row = decode(ResultRow, json.loads(line))
            rows[row.request or number, row.task, row.head] = row
    return list(rows.values())
