"""RegMean (Jin et al., ICLR 2023): least-squares fit of each linear layer to the outputs of all experts.

Holds the sums of experts, of Gram matrices and of their products with the weights on the CPU, and one expert and its
Gram matrices on the device. Matrices are float64; a ViT-L/14's have 1.6 times the model's entries. In total 13 P.
"""

from collections.abc import Collection

import torch
from torch import Tensor

from probsurgery.pipeline.merging.layers import LayerInputs
from probsurgery.pipeline.merging.vectors import Experts, ImageStream, Merged, StateDict, add_to


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


class InputGrams(LayerInputs):
    """A context that sums the Gram matrix X^T X of the inputs X (rows, in) of each matrix of a state dict."""

    def __init__(self, state: StateDict, end: Collection[str] = ()) -> None:
        self.grams: StateDict = {}
        super().__init__({name: t for name, t in state.items() if t.ndim == 2 or name in end}, self._add, end)

    def _add(self, name: str, inputs: Tensor) -> None:
        rows = inputs.double()
        add_to(self.grams, name, rows.T @ rows)


def _solve(gram: Tensor, product: Tensor, mean: Tensor) -> Tensor:
    """gram^-1 product. Directions that the inputs do not determine (a unit that is always zero) are as in the mean."""
    ridge = 1e-9 * gram.diagonal().mean().clamp(min=1e-30)
    return mean + torch.linalg.solve(gram + ridge * torch.eye(len(gram), dtype=gram.dtype), product - gram @ mean)
