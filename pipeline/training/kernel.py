"""The training step compiled from `kernel.cpp`: which object runs here, and a stack of heads that is trained by it.

An object is a plain shared library, called through ctypes, which releases Python's lock meanwhile. Without one for this
processor, `adam_step` trains.
"""

import ctypes
import os
import platform
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from probsurgery.pipeline.config import LOSSES, HeadSettings, TrainedSettings
from probsurgery.pipeline.errors import InputError, unknown
from probsurgery.pipeline.heads.kinds import Params
from probsurgery.pipeline.training.batches import BLOCK, Feed
from probsurgery.pipeline.training.joint import taken_back

INTERFACE = 2
"""Changes here and in kernel.cpp whenever structures or their meaning do: objects of another source are passed over."""
VARIABLE = "PROBSURGERY_KERNEL"
TORCH = "torch"
KERNELS = ("avx512", "avx2", "neon")
"""In the order of preference."""
PADDING = 32
"""Features are padded to a multiple of this."""


class _Head(ctypes.Structure):
    """`Head` in kernel.cpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("state", "loss_sum")),
        *((name, ctypes.c_double) for name in ("lr", "kl_weight")),
        *(
            (name, ctypes.c_int64)
            for name in ("dim", "padded", "width", "parts", "batch", "samples", "loss", "updates", "tasks")
        ),
    ]


class _Block(ctypes.Structure):
    """`Block` in kernel.cpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("z", "expert", "noise")),
        *((name, ctypes.c_int64) for name in ("tasks", "steps", "loss_every")),
    ]


def kernel_for(device: torch.device) -> str:
    """What trains heads on a device: on a CPU the fastest of `KERNELS` that was compiled and that it runs, or `torch`.

    On a CPU, `PROBSURGERY_KERNEL` may name another. Raises `InputError` if that one cannot be used.
    """
    if device.type != "cpu":
        return TORCH
    usable = usable_kernels()
    asked = os.environ.get(VARIABLE, "")
    if not asked:
        return (*usable, TORCH)[0]
    if asked not in (*KERNELS, TORCH):
        raise unknown(VARIABLE, asked, (*KERNELS, TORCH))
    if asked not in (*usable, TORCH):
        raise InputError(f"{VARIABLE} is {asked}, which this installation or processor lacks; unset it, or use torch")
    return asked


def usable_kernels() -> tuple[str, ...]:
    """Kernels that were compiled and that this processor runs, the fastest first."""
    return tuple(name for name in _supported() if _library(name) is not None)


def _supported() -> tuple[str, ...]:
    """Kernels whose instructions this processor has."""
    if platform.machine().lower() in ("arm64", "aarch64"):
        return ("neon",)
    # torch asks the processor, and calls it AVX512 if it has all of F, BW, DQ and VL, and FMA.
    return {"AVX512": ("avx512", "avx2"), "AVX2": ("avx2",)}.get(torch.backends.cpu.get_cpu_capability(), ())


@cache
def _library(name: str) -> ctypes.CDLL | None:
    for path in Path(__file__).parent.glob(f"_kernel_{name}.*so"):
        try:
            library = ctypes.CDLL(str(path))
            if library.interface() != INTERFACE:
                continue
        except (OSError, AttributeError):  # of another system, or from a source without that number
            continue
        library.train.argtypes = [ctypes.POINTER(_Head), ctypes.POINTER(_Block), ctypes.c_int64, ctypes.c_int64]
        return library
    return None


class CompiledStack:
    """K heads that share batches, trained one after the other in each block. Each is the same as if trained alone.

    They agree in steps, batch size, samples and feature scale. Each of `starts` holds one head's initial parameters,
    without the stack dimension. `places` and `rounds` are the heads' `place` and `tasks_in_round` (see `Job`).
    """

    def __init__(
        self,
        kernel: str,
        settings: Sequence[HeadSettings],
        starts: Sequence[Params],
        loss_every: int,
        *,
        places: Sequence[int] = (),
        rounds: Sequence[int] = (),
    ) -> None:
        library = _library(kernel)
        assert library is not None, "only a kernel that is available is chosen"
        self._library, self._loss_every = library, loss_every
        self._names = [list(start) for start in starts]
        self.loss_sums = torch.zeros(len(starts), dtype=torch.float64)
        """Each head's losses, summed over the steps that compute it."""
        self._states = [_state(start) for start in starts]
        self._heads = [
            _head(s, start, state, self.loss_sums[k])
            for k, (s, start, state) in enumerate(zip(settings, starts, self._states, strict=True))
        ]
        for head, tasks in zip(self._heads, rounds or [1] * len(starts), strict=True):
            head.tasks = tasks
        self._places = places or [0] * len(starts)

    def run(self, feed: Feed, first: int, last: int) -> None:
        """Take the updates from `first` to `last` (exclusive) of the feed's block."""
        for k, head in enumerate(self._heads):
            z, expert, noise = feed.block(k)
            block = _Block(z.data_ptr(), expert.data_ptr(), noise.data_ptr(), feed.tasks, BLOCK, self._loss_every)
            if self._library.train(head, block, first, last):
                raise MemoryError("a step's intermediate results do not fit into memory")

    def params(self, k: int) -> Params:
        """A copy of head k's current parameters, a stack of one."""
        head, state = self._heads[k], self._states[k]
        weights, means, squares = state.unbind(1)
        if self._places[k]:
            step = head.tasks * head.updates
            weights = taken_back(weights, means, squares, step, self._places[k], head.lr)
        inner, *outer = weights.view(head.width, 1 + head.parts, head.padded)[..., : head.dim].unbind(1)
        named = zip(self._names[k], [inner, *(columns.T for columns in outer)], strict=True)
        return {name: weight.clone(memory_format=torch.contiguous_format)[None] for name, weight in named}


def _state(start: Params) -> Tensor:
    """Weights and Adam's moments by hidden unit, (w, 3, (1 + parts) padded): W_in and the columns of each W_out."""
    inner, *outer = start.values()
    width, dim = inner.shape
    padded = -(-dim // PADDING) * PADDING
    state = torch.zeros(width, 3, 1 + len(outer), padded)
    for part, weight in enumerate([inner, *(w.T for w in outer)]):
        state[:, 0, part, :dim] = weight
    return state.view(width, 3, -1)


def _head(settings: HeadSettings, start: Params, state: Tensor, loss_sum: Tensor) -> _Head:
    assert isinstance(settings, TrainedSettings), "ridge is solved, not trained"
    width, dim = next(iter(start.values())).shape
    parts = len(start) - 1
    return _Head(
        state=state.data_ptr(),
        loss_sum=loss_sum.data_ptr(),
        lr=settings.lr,
        kl_weight=settings.kl_weight,
        dim=dim,
        padded=state.shape[-1] // (1 + parts),
        width=width,
        parts=parts,
        batch=settings.batch_size,
        samples=settings.samples,
        loss=LOSSES.index(settings.loss),
    )
