"""RegMean (Jin et al., ICLR 2023): of each linear layer, the weights that come nearest to all experts' outputs.

Holds the sums of the experts, of Gram matrices and of their products with the weights on the CPU, and an expert and its
Gram matrices on the device. Matrices are in float64, and a ViT-L/14's have 1.6 times the model's entries: 13 P in all.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from probsurgery.pipeline.merging.vectors import Experts, Merged, Samples, StateDict, add_to, on_device

_PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default)


def regmean(
    pretrained: StateDict,
    experts: Experts,
    samples: Samples,
    *,
    split: str,
    images: int,
    off_diagonal: float,
    seed: int,
) -> Merged:
    """W = (sum G_t)^-1 sum G_t W_t (eq. 2) for each linear layer; the mean of the experts for everything else.

    G_t (in, in) is the Gram matrix of the layer's inputs for `images` images of task t in expert t, its entries off the
    diagonal multiplied by `off_diagonal`. Linear layers are found by watching the expert compute: every weight that
    inputs are multiplied with, the visual projection too. The patch embedding is averaged.
    """
    grams: StateDict = {}
    products: StateDict = {}
    means: StateDict = {}
    turned: set[str] = set()
    for index, (task, expert) in enumerate(experts.items()):
        state = on_device(expert, samples)
        watch = InputGrams(state)
        done = index * images
        for batch, _ in samples.take(task, split, images, seed):
            with torch.no_grad(), watch:
                samples.forward(state, batch)
            done += len(batch)
            samples.progress(done, len(experts) * images, f"inputs of {task}")
        turned |= watch.turned
        for name in pretrained:
            weight = expert[name].float()
            if name in watch.grams:
                gram = _shrunk(watch.grams.pop(name).cpu(), off_diagonal)
                inward = weight.double().T if name in turned else weight.double()  # (in, out)
                add_to(products, name, gram @ inward)
                add_to(grams, name, gram)
            add_to(means, name, weight / len(experts))
    for name in list(grams):
        mean = means[name].double()
        solution = _solve(grams.pop(name), products.pop(name), mean.T if name in turned else mean)
        means[name] = (solution.T if name in turned else solution).float().contiguous()
    return Merged({name: means[name] for name in pretrained})


class InputGrams(TorchDispatchMode):
    """While it is entered, adds up the Gram matrix X^T X of the inputs X (rows, in) of each weight of a state dict.

    It watches the matrix products themselves: attention multiplies its two weights inside of one function, where
    hooks on modules do not reach.
    """

    def __init__(self, state: StateDict) -> None:
        super().__init__()
        self._weights = {(t.data_ptr(), t.numel()): (name, t) for name, t in state.items() if t.ndim == 2}
        self.grams: StateDict = {}
        self.turned: set[str] = set()
        """Weights that are kept as (out, in), and not as (in, out)."""

    def __enter__(self) -> InputGrams:
        self._fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)  # one kernel, of which nothing is seen
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        torch.backends.mha.set_fastpath_enabled(self._fast)
        super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in _PRODUCTS:
            self._add(*args[-2:])
        return func(*args, **(kwargs or {}))

    def _add(self, inputs: Tensor, factor: Tensor) -> None:
        """Note the inputs (..., in) of a product with (in, out), if that is a weight or one transposed."""
        if factor.ndim == 3 and factor.stride(0) == 0:  # one matrix for every entry of the batch
            factor = factor[0]
        name, weight = self._weights.get((factor.data_ptr(), factor.numel()), (None, None))
        if name is None:
            return
        rows = inputs.reshape(-1, inputs.shape[-1]).double()
        add_to(self.grams, name, rows.T @ rows)
        if factor.shape == weight.T.shape and factor.stride() == weight.T.stride():
            self.turned.add(name)


def _shrunk(gram: Tensor, off_diagonal: float) -> Tensor:
    return off_diagonal * gram + (1 - off_diagonal) * torch.diag(gram.diagonal())


def _solve(gram: Tensor, product: Tensor, mean: Tensor) -> Tensor:
    """gram^-1 product. What the inputs leave open, where one is always zero say, is as in the mean."""
    ridge = 1e-9 * gram.diagonal().mean().clamp(min=1e-30)
    return mean + torch.linalg.solve(gram + ridge * torch.eye(len(gram), dtype=gram.dtype), product - gram @ mean)
