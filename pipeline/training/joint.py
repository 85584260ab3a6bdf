"""One Adam for the heads of all tasks (`--optimizer joint`), as ProbSurgery's public code trains both kinds of head.

It asks for PyTorch 1.13, whose `zero_grad` leaves zeros, and Adam takes a step for every head that has had a gradient.
So each head takes, after each of its own steps, one with a gradient of zero for each of the other T - 1 tasks: its
momentum moves it. Since PyTorch 2, `zero_grad` leaves None, and a head takes its own steps only. Surgery's public code
asks for no version, and takes two batches of a task before the next task's.

Here a head takes all T - 1 steps after each of its own. In the reference, p of them (p tasks come before the head's in
their order) belong to the next round, which a head that is finished does not see: `taken_back` undoes them.
"""

import math

from torch import Tensor

BETAS = (0.9, 0.999)
EPSILON = 1e-8


def taken_back(weight: Tensor, mean: Tensor, square: Tensor, step: int, count: int, lr: float) -> Tensor:
    """Weights as they were before the last `count` of the steps without a gradient, a new tensor.

    `mean` and `square` are Adam's moments now, after `step` steps in all.
    """
    earlier = weight.clone()
    root = square.sqrt()
    for later in range(1 - count, 1):
        a = lr * BETAS[0] ** later / (1 - BETAS[0] ** (step + later))
        r = math.sqrt(BETAS[1] ** later / (1 - BETAS[1] ** (step + later)))
        earlier.addcdiv_(mean, root.mul(r).add_(EPSILON), value=a)
    return earlier
