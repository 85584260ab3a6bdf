"""Uncertainty against known answers, and scipy."""

import pytest
import scipy.stats
import torch

from probsurgery.pipeline.classifier import Classifier
from probsurgery.pipeline.heads.uncertainty import BINS, COVERAGES, measure, spearman

ROWS, DIM = 3_000, 8


def head_of(sigmas):
    """A head whose correction is zero, and whose sigma is larger for rows with a larger first feature."""
    hidden = torch.zeros(1, 1, DIM)
    hidden[0, 0, 0] = 1
    log_var = torch.full((1, DIM, 1), float(sigmas))
    return {"hidden": hidden, "mu": torch.zeros(1, DIM, 1), "log_var": log_var}


def data(scale=1.0):
    """Rows whose residual is drawn with just the sigma that `head_of(1)` predicts, times `scale`."""
    merged = torch.rand(ROWS, DIM)
    sigma = torch.exp(merged[:, :1].clone() * 2 / 2)
    merged[:, 0] *= 2
    return merged, merged - scale * sigma * torch.randn(ROWS, DIM)


@pytest.fixture
def rest():
    return Classifier(torch.randn(3, DIM)), torch.randint(0, 3, (ROWS,))


def test_a_calibrated_head_is_on_the_diagonal(rest):
    merged, expert = data()
    measured = measure(head_of(1), merged, expert, *rest)
    assert measured.within[1] == pytest.approx(0.683, abs=0.01)
    assert measured.within[2] == pytest.approx(0.954, abs=0.01)
    assert len(measured.bins) == BINS
    for predicted, true in measured.bins:
        assert true == pytest.approx(predicted, rel=0.1)
    assert measured.rank_correlation > 0.6


def test_a_head_that_is_too_sure_is_above_it(rest):
    merged, expert = data(scale=3.0)
    measured = measure(head_of(1), merged, expert, *rest)
    assert measured.within[1] == pytest.approx(0.261, abs=0.01)
    assert all(true == pytest.approx(3 * predicted, rel=0.1) for predicted, true in measured.bins)


def test_a_sigma_that_says_nothing_has_no_correlation(rest):
    merged, _ = data()
    measured = measure(head_of(1), merged, merged + torch.randn(ROWS, DIM), *rest)
    assert abs(measured.rank_correlation) < 0.06


def test_accuracy_rises_as_the_uncertain_are_left_out():
    merged, expert = data()
    classifier = torch.eye(DIM)[1:4] * 10
    labels = (merged @ classifier.T).argmax(-1)
    wrong = merged[:, 0] > 1.5  # the quarter of the rows with the largest sigma
    labels[wrong] = (labels[wrong] + 1) % 3
    measured = measure(head_of(1), merged, expert, Classifier(classifier), labels)
    at = dict(zip(COVERAGES, measured.by_sigma, strict=True))
    assert at[1.0] == pytest.approx(1 - wrong.double().mean().item())
    assert at[0.7] == at[0.1] == 1
    by_confidence = dict(zip(COVERAGES, measured.by_confidence, strict=True))
    assert by_confidence[1.0] == at[1.0]
    assert by_confidence[0.7] < 0.95


@pytest.mark.parametrize("ties", [False, True])
def test_rank_correlation_is_scipys(ties):
    a, b = torch.randn(2, 200)
    a, b = ((a * 2).round(), (a + b).round()) if ties else (a, a + b)
    assert spearman(a, b) == pytest.approx(scipy.stats.spearmanr(a, b).statistic, abs=1e-9)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("rows", [1, 2, 5])
def test_constants_have_no_rank_correlation(rows):
    assert spearman(torch.ones(rows), torch.rand(rows)) is None
    same = torch.ones(rows, DIM)
    measured = measure(head_of(0), same, same * 0, Classifier(torch.zeros(3, DIM)), torch.zeros(rows, dtype=torch.long))
    assert measured.rank_correlation is None
    assert measured.confidence_correlation is None
