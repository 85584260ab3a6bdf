"""Which device a stage runs on."""

from __future__ import annotations

import re

import psutil
import torch

from probsurgery.pipeline.errors import InputError


def choose_device(name: str) -> torch.device:
    """`auto` (a GPU if there is one), `cpu`, `cuda` or `cuda:n`. Raises `InputError` for a device that is not there."""
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise InputError(f"unknown device {name!r}; choose from: auto, cpu, cuda, cuda:0 and so on")
    device = torch.device("cuda:0" if name == "cuda" else name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"device {name} was asked for, but there are {torch.cuda.device_count()} CUDA devices; use cpu"
        )
    return device


def available_memory(device: torch.device) -> int:
    """Bytes that can be had on a device without swapping."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
