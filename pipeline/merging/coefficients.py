"""Merging coefficients as a file: our JSON, and what AdaMerging's authors publish."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from probsurgery.pipeline.errors import InputError

_LEFTOVERS = 3
"""The reference's models keep text parameters, three before and three after those of the image tower, which no image
ever moves; its tables have rows for them."""
_MOST_BYTES = 2**24
_LARGEST = 100


@dataclass(frozen=True)
class Coefficients:
    """A coefficient for each task, or for each task and tensor."""

    tasks: tuple[str, ...] | None
    """None: those of the merge, in its order."""
    tensors: tuple[str, ...] | None
    """Names of the tensors; None: a coefficient holds for the whole of a task vector, or for the model's tensors in
    their order, if there are several."""
    values: Tensor
    """(T,) or (T, L), float32."""
    method: str | None = None
    """The merge that they were learned for."""
    settings: Mapping[str, object] = field(default_factory=dict)
    """How they were learned."""

    def table(self, tasks: Sequence[str], names: Sequence[str]) -> Tensor:
        """(T, L) for these tasks and tensors. Raises `InputError` if there are others."""
        values, own = self.values, self.tasks or tuple(tasks)
        if len(own) != len(values) or sorted(own) != sorted(tasks):
            listed = ", ".join(own) if self.tasks else f"{len(values)} tasks"
            raise InputError(f"the coefficients are for {listed}, but the merge is of {', '.join(tasks)}")
        values = values[[own.index(task) for task in tasks]]
        if values.ndim == 1:
            return values[:, None].expand(-1, len(names))
        if self.tensors is None and values.shape[1] == len(names) + 2 * _LEFTOVERS:
            values = values[:, _LEFTOVERS:-_LEFTOVERS]
        if values.shape[1] != len(names) or sorted(self.tensors or names) != sorted(names):
            raise InputError(
                f"there are coefficients for {values.shape[1]} tensors of each task, but the model has {len(names)} "
                "tensors, or they have other names"
            )
        own = list(self.tensors or names)
        return values[:, [own.index(name) for name in names]]

    def named(
        self, method: str, settings: Mapping[str, object], tasks: tuple[str, ...], names: tuple[str, ...]
    ) -> Coefficients:
        """The same for a merge of these tasks and tensors, with their names, in their order."""
        table = self.table(tasks, names)
        values, tensors = (table[:, 0], None) if self.values.ndim == 1 else (table, names)
        return Coefficients(tasks, tensors, values, method, settings)

    def to_json(self) -> dict:
        """What `read_coefficients` reads back, to the bit."""
        table = self.values.tolist()
        named = {} if self.tensors is None else {"tensors": list(self.tensors)}
        coefficients = dict(zip(self.tasks, table, strict=True))
        return {"method": self.method, "settings": dict(self.settings), **named, "coefficients": coefficients}


def read_coefficients(path: Path) -> Coefficients:
    """Coefficients from a file.

    It is our JSON, or a table as the authors publish it, as JSON or as Python writes lists: `[[1.0, 0.22, ...]]` for
    task-wise ones, and a row for each tensor for layer-wise ones; the column of ones stands for theta_0. Raises
    `InputError` if it is neither, or holds anything but numbers.
    """
    if path.exists() and not path.is_file():
        raise InputError(f"{path} is not a file; --coefficients takes JSON, or a table of numbers")
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise InputError(f"{path} has more than {_MOST_BYTES:,} bytes; it is no file of coefficients")
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"no file of coefficients at {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as text ({type(error).__name__}); --coefficients takes JSON") from None
    try:
        held = json.loads(text)
    except (ValueError, RecursionError):
        try:
            held = ast.literal_eval(text.strip())  # `1.` and trailing commas, which are Python's and not JSON's
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            raise InputError(f"{path} is neither JSON nor a list of numbers; see docs/merging.md") from None
    try:
        return _of_ours(held) if isinstance(held, dict) else _of_table(held)
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        raise InputError(f"{path} holds no coefficients ({str(error)[:120]}); see docs/merging.md") from None


def _of_ours(held: dict) -> Coefficients:
    by_task = held["coefficients"]
    if not all(isinstance(task, str) for task in by_task):
        raise ValueError("tasks are given by their names")
    tensors = tuple(map(str, held["tensors"])) if held.get("tensors") else None
    values = _numbers(list(by_task.values()))
    if values.ndim == 2 and (tensors is None or values.shape[1] != len(tensors)):
        raise ValueError("it needs a name in `tensors` for each coefficient of a task")
    settings, method = held.get("settings") or {}, held.get("method")
    if not isinstance(settings, dict) or not (method is None or isinstance(method, str)):
        raise ValueError("`settings` is a dictionary, and `method` a name")
    return Coefficients(tuple(by_task), tensors if values.ndim == 2 else None, values, method, settings)


def _of_table(held: list) -> Coefficients:
    rows = _numbers(held if isinstance(held[0], list) else [held])
    if (rows[:, 0] == 1).all():
        rows = rows[:, 1:]
    values = rows.T.contiguous()
    return Coefficients(None, None, values[:, 0] if values.shape[1] == 1 else values)


def _numbers(held: list) -> Tensor:
    rows = [row if isinstance(row, list) else [row] for row in held]
    if not all(type(value) in (int, float) and abs(value) <= _LARGEST for row in rows for value in row):
        raise ValueError(f"it takes numbers from {-_LARGEST} to {_LARGEST}, as many for each task")
    values = torch.tensor(held, dtype=torch.float32)
    if not values.numel():
        raise ValueError("it is empty")
    return values
