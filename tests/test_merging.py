"""Merges by their algebra."""

import pytest
import torch

from probsurgery.pipeline.errors import InputError
from probsurgery.pipeline.merging import METHODS, merge


def state(seed):
    g = torch.Generator().manual_seed(seed)
    return {"w": torch.randn(30, 10, generator=g), "b": torch.randn(10, generator=g)}


BASE = state(0)
EXPERTS = [state(i) for i in range(1, 9)]


def close(a, b, atol=1e-5):
    return a.keys() == b.keys() and all(torch.allclose(a[n], b[n], atol=atol) for n in a)


@pytest.mark.parametrize(("method", "settings"), [("wa", {}), ("ta", {"scale": 1}), ("ties", {"scale": 1, "keep": 1})])
def test_one_task_at_full_weight_gives_the_expert_back(method, settings):
    assert close(merge(method, BASE, EXPERTS[:1], **settings), EXPERTS[0])


@pytest.mark.parametrize("method", METHODS)
def test_experts_equal_to_the_base_give_the_base(method):
    assert close(merge(method, BASE, [BASE] * 3), BASE)


def test_weight_averaging_averages_all_tasks():
    mean = {n: torch.stack([e[n] for e in EXPERTS]).mean(0) for n in BASE}
    assert close(merge("wa", BASE, EXPERTS), mean)
    without_last = {n: torch.stack([e[n] for e in EXPERTS[:-1]]).mean(0) for n in BASE}
    assert not close(merge("wa", BASE, EXPERTS), without_last)


@pytest.mark.parametrize("method", METHODS)
def test_every_task_takes_part_and_their_order_does_not(method):
    whole = merge(method, BASE, EXPERTS)
    assert close(whole, merge(method, BASE, EXPERTS[::-1]))
    for dropped in range(len(EXPERTS)):
        assert not close(whole, merge(method, BASE, EXPERTS[:dropped] + EXPERTS[dropped + 1 :]))


def test_task_arithmetic_is_linear_in_its_scale():
    once, twice = (merge("ta", BASE, EXPERTS, scale=s) for s in (0.3, 0.6))
    assert close({n: 2 * (once[n] - BASE[n]) for n in BASE}, {n: twice[n] - BASE[n] for n in BASE})
    assert close(merge("ta", BASE, EXPERTS), once)


def test_ties_on_identical_task_vectors_is_their_trimmed_sum():
    merged = merge("ties", BASE, [EXPERTS[0]] * 4, scale=0.25, keep=0.2)
    tau = torch.cat([(EXPERTS[0][n] - BASE[n]).flatten() for n in BASE])
    kept = torch.cat([(merged[n] - BASE[n]).flatten() for n in BASE])
    largest = tau.abs().topk(62).indices  # 20 % of 310, over the whole vector
    expected = torch.zeros_like(tau)
    expected[largest] = tau[largest]
    assert torch.allclose(kept, expected, atol=1e-6)


def test_ties_by_hand():
    base = {"w": torch.zeros(5)}
    experts = [{"w": torch.tensor(v)} for v in ([4.0, 3, 0.1, 0, 0], [-1.0, 5, 0, 0.2, 0], [-2.0, 0.1, 0, 0, 3])]
    # Two of five entries are kept of each: (4, 3), (-1, 5), (-2 at 0, 3 at 4). Entry 0: 4 - 1 - 2 > 0, so 4 stays.
    assert merge("ties", base, experts, scale=0.5, keep=0.4)["w"].tolist() == [2.0, 4.0, 0.0, 0.0, 1.5]


def test_bad_requests_are_refused():
    with pytest.raises(InputError, match="unknown merge 'tise'; choose from: wa, ta, ties"):
        merge("tise", BASE, EXPERTS)
    with pytest.raises(InputError, match="unknown setting of ta 'keep'; choose from: scale"):
        merge("ta", BASE, EXPERTS, keep=0.2)
    with pytest.raises(InputError, match="no expert"):
        merge("wa", BASE, [])
    with pytest.raises(InputError, match="differ in the key 'b'"):
        merge("wa", BASE, [{"w": BASE["w"]}])
