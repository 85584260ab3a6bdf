"""RegMean (Jin et al., ICLR 2023): least-squares fit of each linear layer to the outputs of all experts. RegMean++.

RegMean holds the sums of experts, of Gram matrices and of their products with the weights on the CPU, and one expert
and its Gram matrices on the device. Matrices are float64; a ViT-L/14's have 1.6 times the model's entries: 13 P in all.
RegMean++ holds theta_0, the merged model, and these sums of one block, 5.3 P, and the images on the CPU, 0.6 MB each at
224 x 224. They pass through the model up to each block: half as many passes as encoding them once for each block.
"""

from collections.abc import Collection

import torch
from torch import Tensor

from probsurgery.pipeline.merging.layers import LayerInputs, blocks
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
                _add_layer(grams, products, name, watch, weight, off_diagonal)
            add_to(means, name, weight / len(experts))
    for name in list(grams):
        means[name] = _solution(grams.pop(name), products.pop(name), means[name], transposed=name in transposed)
    return Merged({name: means[name] for name in pretrained})


def regmean_plus_plus(
    pretrained: StateDict,
    experts: Experts,
    stream: ImageStream,
    *,
    split: str,
    images: int,
    off_diagonal: float,
    seed: int,
) -> Merged:
    """RegMean, block by block: the inputs of expert t's block are the outputs of the merged blocks before it.

    Nguyen et al., 2025. Within the block, the expert's own layers give the inputs of those behind them.
    """
    means = {name: torch.zeros(theta.shape) for name, theta in pretrained.items()}
    for expert in experts.values():
        for name, mean in means.items():
            mean += expert[name].float() / len(experts)
    merged = stream.on_device(means)
    batches = stream.kept(experts, split, images, seed)
    order = blocks(stream, merged, next(iter(batches.values()))[0][:1].to(stream.device))
    for index, block in enumerate(order):
        grams: StateDict = {}
        products: StateDict = {}
        for number, (task, expert) in enumerate(experts.items()):
            own = stream.on_device({name: expert[name] for name in block.names})
            watch = InputGrams({name: (merged | own)[name] for name in (*block.layers, *block.later)}, block.later)
            for batch in batches[task]:
                with torch.no_grad(), watch:
                    stream.forward(merged | own, batch.to(stream.device))
            for name in list(watch.grams):
                _add_layer(grams, products, name, watch, own[name].cpu(), off_diagonal)
            done = index * len(experts) + number + 1
            stream.progress(done, len(order) * len(experts), f"merging block {index + 1} of {len(order)}")
        for name, gram in grams.items():
            mean, transposed = merged[name].cpu(), name in block.transposed
            merged[name] = _solution(gram, products[name], mean, transposed=transposed).to(stream.device)
    return Merged({name: tensor.cpu() for name, tensor in merged.items()})


def _add_layer(
    grams: StateDict, products: StateDict, name: str, watch: "InputGrams", weight: Tensor, off_diagonal: float
) -> None:
    """Add a task's Gram matrix G_t (in, in) of a layer to the sum, and G_t W_t (in, out) to that of the products."""
    gram = watch.grams.pop(name).cpu()
    gram = off_diagonal * gram + (1 - off_diagonal) * torch.diag(gram.diagonal())
    add_to(products, name, gram @ (weight.double().T if name in watch.transposed else weight.double()))
    add_to(grams, name, gram)


def _solution(gram: Tensor, product: Tensor, mean: Tensor, *, transposed: bool) -> Tensor:
    """gram^-1 product, stored as the layer is. What the inputs do not determine (a dead unit) is as in the mean."""
    inward = mean.double().T if transposed else mean.double()
    ridge = 1e-9 * gram.diagonal().mean().clamp(min=1e-30)
    regular = gram + ridge * torch.eye(len(gram), dtype=gram.dtype)
    solved = inward + torch.linalg.solve(regular, product - gram @ inward)
    return (solved.T if transposed else solved).float().contiguous()


class InputGrams(LayerInputs):
    """A context that sums the Gram matrix X^T X of the inputs X (rows, in) of each matrix of a state dict."""

    def __init__(self, state: StateDict, end: Collection[str] = ()) -> None:
        self.grams: StateDict = {}
        super().__init__({name: t for name, t in state.items() if t.ndim == 2 or name in end}, self._add, end)

    def _add(self, name: str, inputs: Tensor) -> None:
        rows = inputs.double()
        add_to(self.grams, name, rows.T @ rows)
