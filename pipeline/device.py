"""The device that a stage runs on, and the memory that is available on it."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch

from probsurgery.pipeline.errors import InputError

SMALL = 2**20
"""Values of features below which a second thread gains nothing."""


def multiplies_bf16(device: torch.device) -> bool:
    """Whether a CPU has instructions for products of bf16 numbers, as far as Linux says so."""
    try:
        flags = Path("/proc/cpuinfo").read_text() if device.type == "cpu" else ""
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """The device for `auto` (a GPU if there is one), `cpu`, `cuda` or `cuda:n`. Without n, each local rank has a GPU.

    Raises `InputError` for a device that does not exist.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise InputError(f"unknown device {name!r}; choose from: auto, cpu, cuda, cuda:0 and so on")
    gpus = torch.cuda.device_count() if name != "cpu" else 0
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    device = torch.device(name if ":" in name else f"cuda:{local_rank % max(1, gpus)}")
    if (device.index or 0) >= gpus:
        raise InputError(f"device {name} was asked for, but there are {gpus} CUDA devices; use cpu")
    return device


def available_memory(device: torch.device) -> int:
    """Bytes that can be allocated on a device without swapping, within the limits of this process."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return max(0, min([psutil.virtual_memory().available, *_limits()]))


def _limits() -> Iterator[int]:
    """Bytes left under each memory limit of this process, such as one set by a batch system."""
    used = psutil.Process().memory_info()
    if hasattr(psutil, "RLIMIT_AS"):
        for resource, size in ((psutil.RLIMIT_AS, used.vms), (psutil.RLIMIT_DATA, used.data)):
            soft, _ = psutil.Process().rlimit(resource)
            if soft != psutil.RLIM_INFINITY:
                yield soft - size
    for folder, limit, usage in _control_groups():
        try:
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            reclaimable = int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))
            yield int((folder / limit).read_text()) - int((folder / usage).read_text()) + reclaimable
        except (OSError, ValueError):  # no such file, or "max"
            continue


def _control_groups() -> Iterator[tuple[Path, str, str]]:
    """Folders of this process's Linux control groups, with the names of the files of their limit and usage."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            root, names = Path("/sys/fs/cgroup"), ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            root, names = Path("/sys/fs/cgroup/memory"), ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(root):
                yield folder, *names


@contextmanager
def one_thread_if_small(features: torch.Tensor) -> Iterator[None]:
    """Compute with few features on one thread: on a busy machine, others wait for their cores and spin meanwhile."""
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if features.numel() < SMALL else threads)
        yield
    finally:
        torch.set_num_threads(threads)
