"""The layers of an encoder as its forward pass shows them: their inputs, their order, and the blocks that they form."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from probsurgery.pipeline.merging.vectors import ImageStream, StateDict

_PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default)
_NORM, _NORM_BACKWARD = torch.ops.aten.native_layer_norm.default, torch.ops.aten.native_layer_norm_backward.default


class LayerInputs(TorchDispatchMode):
    """A context that shows what each linear layer and layer norm of a state dict is given.

    `see` is called with a weight's name and the inputs (rows, in) that it is multiplied with, those of a layer norm
    normalised. In a backward pass it is called with the gradients (rows, out) of a layer's outputs. The products
    themselves are intercepted: attention applies both of its weights inside one function, which module hooks do not
    reach. The context ends quietly at the first layer of `end`.
    """

    def __init__(
        self, state: Mapping[str, Tensor], see: Callable[[str, Tensor], object], end: Collection[str] = ()
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._weights = {(t.data_ptr(), t.numel()): (name, t) for name, t in state.items() if t.ndim in (1, 2)}
        self._see, self._end = see, end
        self.transposed: set[str] = set()
        """Weights that are stored as (out, in) instead of (in, out)."""

    def __enter__(self) -> "LayerInputs":
        self._fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)  # one fused kernel hides its products
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> bool:
        torch.backends.mha.set_fastpath_enabled(self._fast)
        super().__exit__(kind, *error)  # type: ignore[no-untyped-call]
        return kind is _EndReached

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _PRODUCTS:
            self._use(*args[-2:])
        result = func(*args, **(kwargs or {}))
        if func is _NORM and args[2] is not None:
            self._use((args[0] - result[1]) * result[2], args[2])  # the mean, and 1 / the deviation
        elif func is _NORM_BACKWARD and args[5] is not None:
            self._use(args[0], args[5])
        return result

    def _use(self, inputs: Tensor, factor: Tensor) -> None:
        """See the inputs (..., in) of a product with `factor` (in, out), if that is a weight or a transposed one."""
        if factor.ndim == 3 and factor.stride(0) == 0:  # one matrix, expanded over the batch
            factor = factor[0]
        name, weight = self._weights.get((factor.data_ptr(), factor.numel()), (None, factor))
        if name is None:
            return
        if name in self._end:
            raise _EndReached
        if weight.ndim == 2 and factor.shape == weight.T.shape and factor.stride() == weight.T.stride():
            self.transposed.add(name)
        self._see(name, inputs.reshape(-1, inputs.shape[-1]))


class _EndReached(Exception):
    """A forward pass has shown all that was asked for."""


@dataclass(frozen=True)
class Block:
    """A block of an encoder: layers that are merged at once, given the blocks before it."""

    number: str
    """The beginning of its tensors' names, up to the number; empty for layers outside the numbered blocks."""
    names: tuple[str, ...]
    """Its tensors, in the state dict's order."""
    layers: tuple[str, ...]
    """Weights of its linear layers and layer norms, in the order of use."""
    transposed: frozenset[str]
    """Linear layers that are stored as (out, in)."""
    later: frozenset[str]
    """Layers of the blocks after it."""
    ends: bool
    """Whether it is the last numbered block, or after it."""


def blocks(stream: ImageStream, state: StateDict, images: Tensor) -> list[Block]:
    """The blocks of an encoder, in the order of use: tensors whose names agree up to the first number.

    The layers before and after the numbered ones form a block each.
    """
    order: dict[str, None] = {}
    watch = LayerInputs(state, lambda name, _: order.setdefault(name))
    with torch.no_grad(), watch:
        stream.forward(state, images)
    runs = [(key, tuple(layers)) for key, layers in groupby(order, block_of)]
    last = max((index for index, (key, _) in enumerate(runs) if key), default=0)
    found, left = [], set(order)
    for index, (key, layers) in enumerate(runs):
        left -= set(layers)
        own = {*layers, *map(bias_name, layers)}
        names = tuple(name for name in state if (block_of(name) == key if key else name in own))
        transposed = frozenset(watch.transposed.intersection(layers))
        found.append(Block(key, names, layers, transposed, frozenset(left), index >= last))
    return found


def bias_name(weight: str) -> str:
    """What the bias of a layer is called, if it has one."""
    return weight.removesuffix("weight") + "bias"


def block_of(name: str) -> str:
    """A tensor's name up to the first number, such as `transformer.resblocks.3`; empty if it has none."""
    parts = name.split(".")
    number = next((index for index, part in enumerate(parts) if part.isdigit()), None)
    return "" if number is None else ".".join(parts[: number + 1])
