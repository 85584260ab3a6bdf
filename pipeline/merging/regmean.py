"""RegMean (Jin et al., ICLR 2023): least-squares fit of each linear layer to the outputs of all experts.

Holds the sums of experts, of Gram matrices and of their products with the weights on the CPU, and one expert and its
Gram matrices on the device. Matrices are float64; a ViT-L/14's have 1.6 times the model's entries. In total 13 P.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from probsurgery.pipeline.merging.vectors import Experts, ImageStream, Merged, StateDict, add_to

_PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default)


def regmean(
    pretrained: StateDict,
    experts: Experts,
    stream: ImageStream,
    *,
    split: str,
    images: int,
    off_diagonal: float,
    seed: int,
) -> Merged:
    """W = (sum G_t)^-1 sum G_t W_t (eq. 2) for each linear layer; the mean of the experts for all other parameters.

    G_t (in, in) is the Gram matrix of the layer's inputs for `images` images of task t in expert t, its off-diagonal
    entries multiplied by `off_diagonal`. A linear layer is every weight that the expert's forward pass multiplies
    inputs with, the visual projection included. The patch embedding is averaged.
    """
    grams: StateDict = {}
    products: StateDict = {}
    means: StateDict = {}
    transposed: set[str] = set()
    for index, (task, expert) in enumerate(experts.items()):
        state = stream.on_device(expert)
        watch = InputGrams(state)
        done = index * images
        for batch, _ in stream.take(task, split, images, seed):
            with torch.no_grad(), watch:
                stream.forward(state, batch)
            done += len(batch)
            stream.progress(done, len(experts) * images, f"inputs of {task}")
        transposed |= watch.transposed
        for name in pretrained:
            weight = expert[name].float()
            if name in watch.grams:
                gram = watch.grams.pop(name).cpu()
                gram = off_diagonal * gram + (1 - off_diagonal) * torch.diag(gram.diagonal())
                inward = weight.double().T if name in transposed else weight.double()  # (in, out)
                add_to(products, name, gram @ inward)
                add_to(grams, name, gram)
            add_to(means, name, weight / len(experts))
    for name in list(grams):
        mean = means[name].double()
        solution = _solve(grams.pop(name), products.pop(name), mean.T if name in transposed else mean)
        means[name] = (solution.T if name in transposed else solution).float().contiguous()
    return Merged({name: means[name] for name in pretrained})


class InputGrams(TorchDispatchMode):
    """A context that sums the Gram matrix X^T X of the inputs X (rows, in) of each weight of a state dict.

    It intercepts the matrix products themselves: attention applies both of its weights inside one function, which
    module hooks do not reach.
    """

    def __init__(self, state: StateDict) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._weights = {(t.data_ptr(), t.numel()): (name, t) for name, t in state.items() if t.ndim == 2}
        self.grams: StateDict = {}
        self.transposed: set[str] = set()
        """Weights that are stored as (out, in) instead of (in, out)."""

    def __enter__(self) -> "InputGrams":
        self._fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)  # one fused kernel hides its products
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: object) -> None:
        torch.backends.mha.set_fastpath_enabled(self._fast)
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _PRODUCTS:
            self._add(*args[-2:])
        return func(*args, **(kwargs or {}))

    def _add(self, inputs: Tensor, factor: Tensor) -> None:
        """Add the inputs (..., in) of a product with `factor` (in, out), if that is a weight or a transposed one."""
        if factor.ndim == 3 and factor.stride(0) == 0:  # one matrix, expanded over the batch
            factor = factor[0]
        name, weight = self._weights.get((factor.data_ptr(), factor.numel()), (None, factor))
        if name is None:
            return
        rows = inputs.reshape(-1, inputs.shape[-1]).double()
        add_to(self.grams, name, rows.T @ rows)
        if factor.shape == weight.T.shape and factor.stride() == weight.T.stride():
            self.transposed.add(name)


def _solve(gram: Tensor, product: Tensor, mean: Tensor) -> Tensor:
    """gram^-1 product. Directions that the inputs do not determine (a unit that is always zero) are as in the mean."""
    ridge = 1e-9 * gram.diagonal().mean().clamp(min=1e-30)
    return mean + torch.linalg.solve(gram + ridge * torch.eye(len(gram), dtype=gram.dtype), product - gram @ mean)
