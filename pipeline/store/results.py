"""results.jsonl: one row for each fitted head and task, added as heads finish."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

_NUMBER = (int, float)
_ROW = {"task": str, "head": str, "kind": str, "settings": dict, "shared": bool, "seed": int, "protocol": str}
_ROW |= {"cache": str, "parameters": int, "seconds": _NUMBER, "accuracy": dict, "bias": dict}


@dataclass(frozen=True)
class Spread:
    """A figure over seeds."""

    mean: float
    sd: float | None
    """Standard deviation with n - 1; None for a single seed."""
    seeds: int = 1


def spread(values: Iterable[float]) -> Spread | None:
    """Mean and standard deviation of one value for each seed; None if there is none."""
    values = list(values)
    return Spread(fmean(values), stdev(values) if len(values) > 1 else None, len(values)) if values else None


def without_fraction(protocol: str) -> tuple[str, float]:
    """A protocol, and the share of the rows that it lets the fit see."""
    found = re.fullmatch(r"(.*), fraction (\d+(?:\.\d+)?(?:e-\d+)?)", protocol)
    return (found[1], float(found[2])) if found else (protocol, 1.0)


def append_results(folder: Path, rows: Sequence[dict]) -> None:
    """Add rows to results.jsonl in one write; a torn last line, left by a kill, is closed first."""
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    with (folder / "results.jsonl").open("a+b") as out:
        if out.tell():
            out.seek(-1, os.SEEK_END)
            if out.read(1) != b"\n":
                text = "\n" + text
        out.write(text.encode())


def read_results(folder: Path) -> list[dict]:
    """Rows of results.jsonl; lines that a kill left torn, or that hold something else, are passed over.

    Of several rows for one request, task and head, which two fits at once may leave, the last counts.
    """
    try:
        lines = (folder / "results.jsonl").read_text(encoding="utf-8", errors="replace").splitlines()
    except (FileNotFoundError, NotADirectoryError):
        return []
    rows = []
    for line in lines:
        with contextlib.suppress(ValueError, RecursionError):
            rows.append(json.loads(line))
    rows = [row for row in rows if is_result(row)]
    return list({(row.get("request", line), row["task"], row["head"]): row for line, row in enumerate(rows)}.values())


def is_result(row: object) -> bool:
    """Whether a row has what a report reads of it."""
    if not isinstance(row, dict) or not all(isinstance(row.get(name), kind) for name, kind in _ROW.items()):
        return False
    if not isinstance(row.get("request"), str | None):
        return False
    figures = [row["accuracy"].get(kind) for kind in ("individual", "merged", "head")]
    figures += [row["accuracy"].get("pretrained", 0.0)]
    figures += [row["bias"].get(when) for when in ("before", "after")]
    return all(isinstance(figure, _NUMBER) for figure in figures)
