"""Merging coefficients and their files: our JSON format, and the tables that AdaMerging's authors publish."""

import ast
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from probsurgery.pipeline.errors import InputError, first_line
from probsurgery.pipeline.files import MalformedError, read_json

_TEXT_ROWS = 3
"""Rows for text parameters in the reference's layer-wise tables, both before and after those of the image tower. Its
models keep these parameters, but no image ever changes their coefficients."""
_MAX_BYTES = 2**24
_MAX_VALUE = 100


@dataclass(frozen=True)
class Coefficients:
    """Merging coefficients: one per task, or one per task and tensor."""

    tasks: tuple[str, ...] | None
    """None stands for the tasks of the merge, in its order."""
    tensors: tuple[str, ...] | None
    """Names of the tensors, None if `values` has one coefficient per task or lists the model's tensors in order."""
    values: Tensor
    """(T,) or (T, L), float32."""
    method: str | None = None
    """The merging method that they were learned for."""
    settings: Mapping[str, object] = field(default_factory=dict)
    """The method's settings when they were learned."""

    def table(self, tasks: Sequence[str], names: Sequence[str]) -> Tensor:
        """A coefficient (T, L) for each of these tasks and tensors. Raises `InputError` if these are for others."""
        values, rows = self.values, self.tasks or tuple(tasks)
        if len(rows) != len(values) or sorted(rows) != sorted(tasks):
            listed = ", ".join(rows) if self.tasks else f"{len(values)} tasks"
            raise InputError(f"the coefficients are for {listed}, but the merge is of {', '.join(tasks)}")
        values = values[[rows.index(task) for task in tasks]]
        if values.ndim == 1:
            return values[:, None].expand(-1, len(names))
        if self.tensors is None and values.shape[1] == len(names) + 2 * _TEXT_ROWS:
            values = values[:, _TEXT_ROWS:-_TEXT_ROWS]
        if values.shape[1] != len(names) or sorted(self.tensors or names) != sorted(names):
            raise InputError(
                f"there are coefficients for {values.shape[1]} tensors of each task, but the model has {len(names)} "
                "tensors, or tensors of other names"
            )
        order = list(self.tensors or names)
        return values[:, [order.index(name) for name in names]]

    def named(
        self, method: str, settings: Mapping[str, object], tasks: tuple[str, ...], names: tuple[str, ...]
    ) -> "Coefficients":
        """These coefficients in the order of `tasks` and tensor `names`, labelled with both, method and settings."""
        table = self.table(tasks, names)
        values, tensors = (table[:, 0], None) if self.values.ndim == 1 else (table, names)
        return Coefficients(tasks, tensors, values, method, settings)

    def to_json(self) -> dict[str, Any]:
        """JSON's own types, from which `read_coefficients` restores the same bits."""
        tensors = {} if self.tensors is None else {"tensors": list(self.tensors)}
        assert self.tasks is not None, "coefficients are written after `named` has labelled them"
        coefficients = dict(zip(self.tasks, self.values.tolist(), strict=True))
        return {"method": self.method, "settings": dict(self.settings), **tensors, "coefficients": coefficients}


def read_coefficients(path: Path) -> Coefficients:
    """Coefficients from a file: our JSON format, or a table as AdaMerging's authors publish it.

    The table is JSON or a Python list: `[[1.0, 0.22, ...]]` if task-wise, with one row per tensor if layer-wise. Its
    column of ones belongs to theta_0. Raises `InputError` for any other content, or values that are not numbers.
    """
    if path.exists() and not path.is_file():
        raise InputError(f"{path} is not a file; --coefficients takes JSON, or a table of numbers")
    try:
        value = read_json(path, _MAX_BYTES)
    except FileNotFoundError:
        raise InputError(f"no file of coefficients at {path}") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({first_line(error)}); --coefficients takes JSON") from None
    except MalformedError as error:
        value = _read_literal(path, error)
    try:
        return _from_record(value) if isinstance(value, dict) else _from_table(value)
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        raise InputError(f"{path} holds no coefficients ({str(error)[:120]}); see docs/merging.md") from None


def _read_literal(path: Path, problem: MalformedError) -> object:
    """The value of a Python literal, which unlike JSON may contain `1.` and trailing commas."""
    with suppress(OSError, ValueError, SyntaxError, RecursionError, MemoryError):
        if path.stat().st_size <= _MAX_BYTES:
            return ast.literal_eval(path.read_text(encoding="utf-8").strip())
    raise InputError(f"{path} is neither JSON nor a list of numbers ({problem}); see docs/merging.md")


def _from_record(record: dict[str, Any]) -> Coefficients:
    by_task = record["coefficients"]
    if not all(isinstance(task, str) for task in by_task):
        raise ValueError("tasks are given by their names")
    tensors = tuple(map(str, record["tensors"])) if record.get("tensors") else None
    values = _to_tensor(list(by_task.values()))
    if values.ndim == 2 and (tensors is None or values.shape[1] != len(tensors)):
        raise ValueError("it needs a name in `tensors` for each coefficient of a task")
    settings, method = record.get("settings") or {}, record.get("method")
    if not isinstance(settings, dict) or not (method is None or isinstance(method, str)):
        raise ValueError("`settings` is a dictionary, and `method` a name")
    return Coefficients(tuple(by_task), tensors if values.ndim == 2 else None, values, method, settings)


def _from_table(table: list[Any]) -> Coefficients:
    rows = _to_tensor(table if isinstance(table[0], list) else [table])
    if (rows[:, 0] == 1).all():
        rows = rows[:, 1:]
    values = rows.T.contiguous()
    return Coefficients(None, None, values[:, 0] if values.shape[1] == 1 else values)


def _to_tensor(numbers: list[Any]) -> Tensor:
    rows = [row if isinstance(row, list) else [row] for row in numbers]
    if not all(type(value) in (int, float) and abs(value) <= _MAX_VALUE for row in rows for value in row):
        raise ValueError(f"it takes numbers from {-_MAX_VALUE} to {_MAX_VALUE}, as many for each task")
    values = torch.tensor(numbers, dtype=torch.float32)
    if not values.numel():
        raise ValueError("it is empty")
    return values
