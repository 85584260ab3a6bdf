"""Sums of task vectors: weight averaging and task arithmetic. Both hold theta_0 and the sum, 2 P."""

from probsurgery.pipeline.merging.vectors import Experts, Merged, StateDict, add_vectors, task_vectors


def weight_averaging(pretrained: StateDict, experts: Experts) -> Merged:
    """theta_0 + (1/T) sum tau_t over all T experts (Wortsman et al., ICML 2022).

    Departure: the reference lists 1 + 7 coefficients for 8 tasks, which drops the last task.
    """
    return add_vectors(pretrained, task_vectors(pretrained, experts), 1 / len(experts))


def task_arithmetic(pretrained: StateDict, experts: Experts, *, scale: float) -> Merged:
    """theta_0 + scale * sum tau_t (Ilharco et al., ICLR 2023)."""
    return add_vectors(pretrained, task_vectors(pretrained, experts), scale)
