"""FeatCal (Gu et al., 2026): the layers of a merged model are refitted to those of the experts, block by block.

Holds theta_0, the merged model, one expert, and the sums of one block in float64: 6 P on CPU and device together; and
the images on the CPU, 0.6 MB each at 224 x 224. For each block, the images pass through the merged model and through
their experts up to this block: in all about as many passes as encoding the images once for each block.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from probsurgery.pipeline.merging.layers import Block, LayerInputs, bias_name, blocks
from probsurgery.pipeline.merging.vectors import Experts, ImageStream, Merged, StateDict, add_to

_Part = tuple[str, int]
"""A layer's weight, and which part of its outputs."""
_IDLE = 0.01
"""Weight of inputs in the last block that the features do not depend on: those of all but the class token."""


def featcal(
    pretrained: StateDict,
    experts: Experts,
    merged: Mapping[str, Tensor],
    stream: ImageStream,
    *,
    split: str,
    images: int,
    ridge: float,
    anchor: float,
    blend: float,
    outside: bool,
    seed: int,
) -> Merged:
    """W^T = (sum S_t + ridge I)^-1 (sum K_t W_t^T + ridge A^T) for each linear layer of a merged model.

    X_s (rows, in) are the layer's inputs in the merged model, the blocks before it already refitted, for `images`
    images of task t; X_e those in expert t; X = blend X_e + (1 - blend) X_s. S_t = X_s^T X_s and K_t = X_s^T X, both
    divided by the norm of S_t. A = anchor W_merged + (1 - anchor) W_0. Biases and layer norms are least-squares answers
    with the same prior. Layers outside the numbered blocks stay as they were merged, unless `outside` includes them.
    """
    state = stream.on_device(merged)
    batches = stream.kept(experts, split, images, seed)
    order = blocks(stream, state, next(iter(batches.values()))[0][:1].to(stream.device))
    order = [block for block in order if outside or block.number] or order
    for index, block in enumerate(order):
        fit = _BlockFit(block)
        for number, (task, expert) in enumerate(experts.items()):
            weights = stream.on_device({n: state[n] if n in block.later else expert[n] for n in state})
            fit.add_task(stream, state, weights, batches[task], blend)
            done = index * len(experts) + number + 1
            stream.progress(done, len(order) * len(experts), f"refitting block {index + 1} of {len(order)}")
        prior = {n: anchor * state[n] + (1 - anchor) * pretrained[n].to(state[n]) for n in block.names}
        state |= fit.solution(prior, ridge)
    return Merged({name: state[name].cpu() for name in pretrained})


class _BlockFit:
    """The least-squares problems of one block's layers, summed over tasks, in float64.

    A layer is fitted in parts: the queries, keys and values of attention depend on different tokens in the last block.
    A column of ones beside the inputs (rows, in) keeps their sums and their number in the same matrices.
    """

    def __init__(self, block: Block) -> None:
        self.block = block
        self._grams: dict[_Part, Tensor] = {}
        """(in + 1, in + 1)."""
        self._targets: dict[_Part, Tensor] = {}
        """(in + 1, out) of a linear layer, (2, in) of a layer norm: the last row is the bias's."""

    def add_task(
        self, stream: ImageStream, state: StateDict, expert: StateDict, batches: list[Tensor], blend: float
    ) -> None:
        """Add a task's inputs in the merged model `state` and in its expert, and the expert's layers."""
        grams: dict[_Part, Tensor] = {}
        crosses: dict[_Part, Tensor] = {}
        for batch in batches:
            images = batch.to(stream.device)
            inputs, gradients = _layer_inputs(stream, state, images, self.block, backward=self.block.ends)
            wanted, _ = _layer_inputs(stream, expert, images, self.block, backward=False)
            for name in self.block.layers:
                x = _with_ones(inputs[name])
                y = _with_ones(torch.lerp(inputs[name], wanted[name], blend))
                matters = gradients.get(name, x.new_ones(1, 3)) != 0
                for index, part in enumerate(matters.chunk(self._count(name), 1)):
                    weighted = (x * torch.where(part.any(1, keepdim=True), 1, _IDLE).to(x)).T
                    add_to(grams, (name, index), weighted @ x)
                    add_to(crosses, (name, index), weighted @ y)
        for key, gram in grams.items():
            self._add(key, gram, crosses[key], *self._part(key, expert))

    def _add(self, key: _Part, gram: Tensor, cross: Tensor, weight: Tensor, bias: Tensor) -> None:
        if weight.ndim == 1:
            scale = 1 / gram[-1, -1]
            mean, energy = gram[-1, :-1] * scale, gram.diagonal()[:-1] * scale
            target = torch.stack([energy * weight + mean * bias, mean * weight + bias])
        else:
            scale = 1 / gram[:-1, :-1].norm().clamp(min=1e-30)
            target = scale * (cross[:, :-1] @ weight)
            target[-1] += scale * gram[-1, -1] * bias
        add_to(self._grams, key, gram * scale)
        add_to(self._targets, key, target)

    def solution(self, prior: StateDict, ridge: float) -> StateDict:
        """The block's layers; `prior` is what `ridge` draws them to."""
        found: StateDict = {}
        for name in self.block.layers:
            solved = [self._solve((name, index), prior, ridge) for index in range(self._count(name))]
            weight, bias = (torch.cat(tensors, -1).float() for tensors in zip(*solved, strict=True))
            found[name] = (weight.T if name in self.block.transposed else weight).contiguous()
            if bias_name(name) in prior:
                found[bias_name(name)] = bias
        return found

    def _solve(self, key: _Part, prior: StateDict, ridge: float) -> tuple[Tensor, Tensor]:
        """Weight (in, out) or (in,), and bias (out,), of a part."""
        gram, target = self._grams[key], self._targets[key]
        weight, bias = self._part(key, prior)
        means, count = gram[-1, :-1], gram[-1, -1] + ridge
        if weight.ndim == 2:
            regular = gram[:-1, :-1] + ridge * torch.eye(len(weight)).to(gram)
            solved = torch.linalg.solve(regular, target[:-1] + ridge * weight)
            return solved, (target[-1] - means @ solved + ridge * bias) / count
        if bias_name(key[0]) not in prior:
            means = torch.zeros_like(means)
        energy = gram.diagonal()[:-1] + ridge
        first, second = target[0] + ridge * weight, target[1] + ridge * bias
        determinant = energy * count - means**2
        return (count * first - means * second) / determinant, (energy * second - means * first) / determinant

    def _count(self, name: str) -> int:
        return 3 if self.block.ends and name.endswith("in_proj_weight") else 1

    def _part(self, key: _Part, state: StateDict) -> tuple[Tensor, Tensor]:
        """Weight (in, out) or (in,), and bias (out,), of a part; zeros if the layer has no bias."""
        name, index = key
        weight = state[name].double()
        weight = weight.T if name in self.block.transposed else weight
        bias = state[bias_name(name)].double() if bias_name(name) in state else weight.new_zeros(weight.shape[-1])
        return weight.chunk(self._count(name), -1)[index], bias.chunk(self._count(name), -1)[index]


def _layer_inputs(
    stream: ImageStream, weights: StateDict, images: Tensor, block: Block, *, backward: bool
) -> tuple[StateDict, StateDict]:
    """By layer of a block, its inputs (rows, in) and, after a backward pass, the gradients (rows, out) of its outputs.

    The features depend on the rows whose gradients are not zero.
    """
    seen: dict[str, list[Tensor]] = {}
    watched = {name: weights[name] for name in (*block.layers, *block.later)}
    watch = LayerInputs(watched, lambda name, rows: seen.setdefault(name, []).append(rows), block.later)
    if not backward:
        with torch.no_grad(), watch:
            stream.forward(weights, images)
        return {name: torch.cat(rows) for name, rows in seen.items()}, {}
    own = {name: weights[name].detach().requires_grad_() for name in block.names}
    watch = LayerInputs(own, lambda name, rows: seen.setdefault(name, []).append(rows))
    with torch.enable_grad(), watch:
        loss = stream.forward(weights | own, images).square().sum()
        inputs = {name: torch.cat(rows) for name, rows in seen.items()}
        seen.clear()
        torch.autograd.grad(loss, list(own.values()), allow_unused=True)
    return inputs, {name: torch.cat(rows[::-1]) for name, rows in seen.items()}


def _with_ones(rows: Tensor) -> Tensor:
    return torch.cat([rows.double(), rows.new_ones(len(rows), 1).double()], 1)
