"""Digests of values and files, and the difference between two records."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def fingerprint(value: object) -> str:
    """SHA-256 of a JSON-able value, the same on every machine."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def state_digest(state: Mapping[str, "Tensor"]) -> str:
    """SHA-256 of names, shapes, types and values of tensors, whatever file they were read from."""
    total = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].cpu().contiguous()
        total.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        total.update(tensor.numpy().data)
    return total.hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def differences(a: Mapping[str, Any], b: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Each leaf in which two nested mappings differ, as ``path: a's value / b's value``."""
    lines = []
    for key in sorted(a.keys() | b.keys()):
        x, y = a.get(key), b.get(key)
        if isinstance(x, Mapping) and isinstance(y, Mapping):
            lines += differences(x, y, f"{prefix}{key}.")
        elif x != y:
            lines.append(f"{prefix}{key}: {shortened(x)} / {shortened(y)}")
    return lines


def shortened(value: object) -> str:
    """A value as text of at most 60 characters."""
    text = ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return text if len(text) <= 60 else text[:57] + "..."
