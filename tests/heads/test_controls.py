"""Affine and orthogonal heads: known maps, independent formulas, and what they cannot undo."""

import numpy as np
import pytest
import torch

from probsurgery.pipeline.config import AffineSettings, OrthogonalSettings
from probsurgery.pipeline.errors import ProbsurgeryError
from probsurgery.pipeline.heads import ridge
from probsurgery.pipeline.heads.controls import solve_affine, solve_orthogonal
from probsurgery.pipeline.heads.head import Head
from probsurgery.pipeline.training.batches import Job, Rows
from probsurgery.pipeline.training.plan import fit_heads

DIM = 8


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rotation(seed=1, dim=DIM):
    return torch.linalg.qr(drawn(dim, dim, seed=seed).double()).Q.float()


def corrected(settings, merged, expert, z=None):
    params = fit_heads([Job((Rows("a", merged, expert),), settings)])[0].params
    return Head(settings, ("a",), merged.shape[1], params)(merged if z is None else z)


SCALED = (drawn(DIM, seed=2).abs() + 0.5, drawn(DIM, seed=3))


@pytest.mark.parametrize(
    ("settings", "undoes", "does_not"),
    [
        (OrthogonalSettings(), lambda e: e @ rotation(), lambda e: e * SCALED[0] + SCALED[1]),
        (AffineSettings(), lambda e: e * SCALED[0] + SCALED[1], lambda e: e @ rotation()),
    ],
)
def test_each_undoes_its_own_kind_of_bias_and_not_the_other(settings, undoes, does_not):
    expert = drawn(60, DIM) + 1
    unseen = drawn(5, DIM, seed=9)
    assert torch.allclose(corrected(settings, undoes(expert), expert, undoes(unseen)), unseen, atol=1e-5)
    other = does_not(expert)
    left = (corrected(settings, other, expert) - expert).square().mean()
    assert 0.05 < left < (other - expert).square().mean()


@pytest.mark.parametrize("block", [4096, 7])
def test_they_are_the_formulas_on_the_rows_that_may_be_seen(monkeypatch, block):
    monkeypatch.setattr(ridge, "BLOCK_ROWS", block)
    merged, seen = drawn(50, DIM) * 3 + 1, torch.arange(1, 50, 3)
    expert = merged.tanh() + 0.3 * drawn(50, DIM, seed=4)
    x, y = (values[seen].double().numpy() for values in (merged, expert))

    params = solve_affine(merged, expert, seen=seen)
    for j in range(DIM):
        scale, shift = np.polyfit(x[:, j], y[:, j], 1)
        assert params["scale"][0, j].item() == pytest.approx(scale, abs=1e-5)
        assert params["shift"][0, j].item() == pytest.approx(shift, abs=1e-5)

    found = solve_orthogonal(merged, expert, seen=seen)["rotation"][0].double().numpy()
    assert found @ found.T == pytest.approx(np.eye(DIM), abs=1e-6)
    # Optimal if and only if R sum(z e^T) is symmetric and positive semi-definite.
    aligned = found @ (x.T @ y)
    assert aligned == pytest.approx(aligned.T, abs=1e-4)
    assert np.linalg.eigvalsh(aligned).min() > -1e-4


def test_an_undetermined_rotation_is_the_one_nearest_to_the_identity():
    turn = torch.eye(DIM)
    turn[:2, :2] = torch.tensor([[0.0, -1.0], [1.0, 0.0]])
    expert = torch.zeros(20, DIM)
    expert[:, :2] = drawn(20, 2)
    assert torch.allclose(solve_orthogonal(expert @ turn, expert)["rotation"][0], turn, atol=1e-6)
    assert torch.allclose(solve_orthogonal(torch.zeros(4, DIM), expert[:4])["rotation"][0], torch.eye(DIM), atol=1e-6)


def test_a_constant_dimension_is_shifted():
    merged, expert = drawn(30, DIM), drawn(30, DIM, seed=5)
    merged[:, 2] = 4.0
    params = solve_affine(merged, expert)
    assert params["scale"][0, 2] == 1
    assert params["shift"][0, 2].item() == pytest.approx(expert[:, 2].mean().item() - 4, abs=1e-5)


def test_a_classifier_absorbs_the_rotation():
    merged, expert, weight = drawn(40, DIM), drawn(40, DIM, seed=6), drawn(3, DIM, seed=7)
    turned = corrected(OrthogonalSettings(), merged, expert)
    absorbed = weight @ solve_orthogonal(merged, expert)["rotation"][0]
    normalise = torch.nn.functional.normalize
    assert torch.allclose(normalise(turned, dim=-1) @ weight.T, normalise(merged, dim=-1) @ absorbed.T, atol=1e-5)


@pytest.mark.parametrize("solve", [solve_affine, solve_orthogonal])
def test_features_without_a_finite_solution_are_one_error(solve):
    values = drawn(10, DIM).double() * 1e200
    with pytest.raises(ProbsurgeryError, match="no finite solution"):
        solve(values, values)
