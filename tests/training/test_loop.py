"""The training loop against an independent loop in plain autograd; its random streams; ridge against its formula."""

import pickle
from dataclasses import replace

import pytest
import torch

from autograd_loop import DIM, assert_same, plain_loop, rows
from probsurgery.pipeline.config import LOSSES, ProbSettings, RidgeSettings, SurgerySettings
from probsurgery.pipeline.errors import InputError, ProbsurgeryError
from probsurgery.pipeline.training.batches import Job, Rows, Stream
from probsurgery.pipeline.training.kernel import TORCH, VARIABLE
from probsurgery.pipeline.training.loop import train_stack
from probsurgery.pipeline.training.plan import fit_heads


@pytest.fixture(autouse=True, params=["torch", "the fastest"])
def _kernel(request, monkeypatch):
    """Every test runs with torch's step, and with a compiled one if there is one."""
    monkeypatch.setenv(VARIABLE, TORCH if request.param == "torch" else "")


def assert_parity(jobs):
    for job, fitted in zip(jobs, fit_heads(jobs), strict=True):
        assert_same(fitted.params, plain_loop(job))


# The L1 loss's gradient flips where a residual changes its sign, and one flip by rounding, which depends on the CPU,
# moves a weight by a whole step: Surgery's longer runs are compared under a loss without that.
SMOOTH = SurgerySettings(steps=250, loss="smooth-l1")


@pytest.mark.parametrize("settings", [SMOOTH, SurgerySettings(steps=50), ProbSettings(steps=250, hidden=32)])
def test_a_stack_of_heads_takes_the_steps_of_plain_loops(settings):
    assert_parity([Job((rows("a", 200),), settings), Job((rows("b", 37, 1),), settings, seed=3)])


@pytest.mark.parametrize("loss", LOSSES)
def test_parity_for_every_loss_and_several_samples(loss):
    assert_parity([Job((rows("a", 90),), ProbSettings(steps=100, hidden=16, loss=loss, samples=3, kl_weight=1e-2))])


def test_parity_of_a_shared_head_that_takes_its_tasks_in_turn():
    job = Job((rows("a", 90), rows("b", 40, 1), rows("c", 9, 2)), ProbSettings(steps=80, hidden=16))
    assert_parity([job])
    (fitted,) = fit_heads([job])
    assert fitted.curve[-1][0] == 3 * 80


def test_parity_has_a_negative_control():
    job = Job((rows("a", 200),), ProbSettings(steps=250, hidden=32))
    other = Job(job.rows, ProbSettings(steps=250, hidden=32, kl_weight=2e-4))
    fitted = fit_heads([job])[0].params["mu"][0]
    assert not torch.allclose(fitted, plain_loop(other)["mu"], atol=1e-5, rtol=0)


def test_the_same_seed_gives_the_same_bytes_and_another_seed_does_not():
    jobs = [Job((rows("a", 50),), ProbSettings(steps=70, hidden=8), seed) for seed in (0, 0, 1)]
    first, second, other = (fit_heads([job])[0].params for job in jobs)
    assert all(first[n].numpy().tobytes() == second[n].numpy().tobytes() for n in first)
    assert not torch.equal(first["hidden"], other["hidden"])


def test_fewer_rows_than_a_batch_fill_it_from_the_next_permutation():
    batches = Stream("a", 0, rows=11, batch_size=16, dim=2, samples=0).batches().flatten()
    for epoch in range(5):
        assert sorted(batches[11 * epoch : 11 * (epoch + 1)].tolist()) == list(range(11))


def test_order_carries_over_from_block_to_block_and_noise_is_shared_by_settings():
    stream = Stream("a", 0, rows=1_500, batch_size=16, dim=2, samples=1)  # more than a block holds
    taken = torch.cat([stream.batches().flatten() for _ in range(3)])
    for epoch in range(2):
        assert sorted(taken[1_500 * epoch : 1_500 * (epoch + 1)].tolist()) == list(range(1_500))
    single, five = (Stream("a", 0, 10, 4, 3, samples).noise() for samples in (1, 5))
    assert torch.equal(single[0], five[0])
    assert not torch.equal(five[0], five[1])
    assert not torch.equal(single, Stream("b", 0, 10, 4, 3, 1).noise())
    assert not torch.equal(single, Stream("a", 1, 10, 4, 3, 1).noise())


def test_ridge_solves_the_penalised_normal_equations():
    data = rows("a", 80)
    penalty = 0.05
    params = fit_heads([Job((data,), RidgeSettings(penalty))])[0].params
    x, y = data.merged.double(), data.expert.double()
    centred = x - x.mean(0)
    covariance = centred.T @ centred / len(x)
    strength = penalty * covariance.trace() / DIM
    weight = torch.linalg.solve(covariance + strength * torch.eye(DIM), centred.T @ (y - y.mean(0)) / len(x)).T
    assert torch.allclose(params["weight"][0], weight.float(), atol=1e-5)
    assert torch.allclose(params["bias"][0], (y.mean(0) - weight @ x.mean(0)).float(), atol=1e-5)


def test_ridge_recovers_an_affine_map_and_chooses_its_penalty_by_leaving_one_out():
    g = torch.Generator().manual_seed(0)
    merged, weight, bias = (torch.randn(s, generator=g) for s in ((200, DIM), (DIM, DIM), (DIM,)))
    exact = fit_heads([Job((Rows("a", merged, merged @ weight.T + bias),), RidgeSettings())])[0]
    assert torch.allclose(exact.params["weight"][0], weight, atol=1e-3)

    few, noisy = merged[:40], merged[:40] @ weight.T + 5 * torch.randn(40, DIM, generator=g)
    chosen = fit_heads([Job((Rows("a", few, noisy),), RidgeSettings())])[0].penalty

    def left_out_error(penalty):
        total = 0.0
        for i in range(len(few)):
            others = torch.arange(len(few)) != i
            # The penalty is relative to all rows, so leaving one out does not change it.
            full = few - few.mean(0)
            x, y = few[others].double(), noisy[others].double()
            c = x - x.mean(0)
            strength = penalty * (full.double() ** 2).sum() / DIM
            w = torch.linalg.solve(c.T @ c + strength * torch.eye(DIM), c.T @ (y - y.mean(0))).T
            total += ((w @ (few[i].double() - x.mean(0)) + y.mean(0) - noisy[i]) ** 2).sum().item()
        return total

    errors = {p: left_out_error(p) for p in (chosen / 10**0.5, chosen, chosen * 10**0.5)}
    assert min(errors, key=errors.get) == chosen
    assert exact.penalty < chosen


@pytest.mark.parametrize("offsets", [(3.0,), (0.0, 10.0), (0.0, 1.0, 2.0, 9.0)])
def test_the_curve_is_the_mean_loss_of_every_task(offsets):
    """Heads that hardly move, so that the loss is what it is at the start."""
    tasks = tuple(Rows(str(i), (z := rows("a", 40).merged), z + offset) for i, offset in enumerate(offsets))
    (fitted,) = fit_heads([Job(tasks, SurgerySettings(steps=70, lr=1e-12))])
    assert [step for step, _ in fitted.curve] == [64 * len(offsets), 70 * len(offsets)]
    assert [loss for _, loss in fitted.curve] == [pytest.approx(sum(offsets) / len(offsets), rel=1e-4)] * 2


def test_bad_rows_are_refused_by_task_and_row():
    good = rows("a", 20)
    spoilt = good.merged.clone()
    spoilt[7, 3] = float("nan")
    with pytest.raises(InputError, match="merged features of task a are NaN or infinite in row 7"):
        fit_heads([Job((Rows("a", spoilt, good.expert),), SurgerySettings())])
    with pytest.raises(InputError, match="task a has no rows"):
        fit_heads([Job((Rows("a", good.merged[:0], good.expert[:0]),), SurgerySettings())])
    with pytest.raises(InputError, match="both must be"):
        fit_heads([Job((Rows("a", good.merged, good.expert[:, :4]),), SurgerySettings())])


def test_a_loss_that_is_not_finite_is_an_error_and_no_head():
    with pytest.raises(ProbsurgeryError, match="the head for a: the loss is"):
        fit_heads([Job((rows("a", 20),), ProbSettings(lr=10.0, steps=500, kl_weight=1e6))])


def test_rows_on_disk_are_sent_as_paths_and_mapped(tmp_path):
    data = replace(rows("a", 1_000), seen=torch.tensor([3, 1, 4]))
    sent = pickle.dumps(data.spilled(tmp_path))
    assert len(sent) < 3_000
    assert len(pickle.dumps(data)) > 2 * 4 * 1_000 * DIM
    received = pickle.loads(sent)
    assert torch.equal(received.merged, data.merged)
    assert torch.equal(received.expert, data.expert)
    assert torch.equal(received.seen, data.seen)
    assert len(received) == 3
    # Shared with the file: a private map would count against the memory that the features exceed.
    received.merged[0] = 0
    assert (pickle.loads(sent).merged[0] == 0).all()


def test_a_head_sees_the_rows_that_it_may_see():
    """The same head comes out of some of the rows and of a copy of those alone."""
    data, settings = rows("a", 60), ProbSettings(steps=64, hidden=8)
    seen = torch.arange(5, 40, 2)
    some = fit_heads([Job((replace(data, seen=seen),), settings)])[0].params
    alone = fit_heads([Job((Rows("a", data.merged[seen], data.expert[seen]),), settings)])[0].params
    assert all(torch.equal(some[n], alone[n]) for n in some)


@pytest.mark.parametrize("tasks", [1, 3])
def test_heads_copied_during_a_run_are_those_of_shorter_runs_and_do_not_change_the_run(tasks):
    all_rows = tuple(rows(name, 50, seed) for seed, name in enumerate("abc"[:tasks]))
    settings = ProbSettings(steps=150, hidden=8)
    job = Job(all_rows, settings, stops=(10, 64, 100))
    whole, (fitted,) = fit_heads([replace(job, stops=())])[0], fit_heads([job])
    assert list(fitted.earlier) == [10, 64, 100]
    for steps, copy in (*fitted.earlier.items(), (150, fitted)):
        alone = fit_heads([Job(all_rows, replace(settings, steps=steps))])[0]
        assert all(torch.equal(copy.params[n], alone.params[n]) for n in alone.params), steps
        assert not any(torch.equal(copy.params[n], whole.params[n]) for n in whole.params) or steps == 150
    assert fitted.curve == whole.curve


def test_online_takes_each_row_once_in_the_order_of_the_data():
    stream = Stream("a", 0, rows=150, batch_size=1, dim=2, samples=1, online=True)
    assert torch.cat([stream.batches().flatten() for _ in range(3)])[:150].tolist() == list(range(150))
    data, settings = rows("a", 70), SurgerySettings(steps=70, batch_size=1)
    online = fit_heads([Job((data,), settings, online=True)])[0].params
    order = torch.randperm(70, generator=torch.Generator().manual_seed(1))
    turned = Rows("a", data.merged[order], data.expert[order])
    assert not torch.equal(fit_heads([Job((turned,), settings, online=True)])[0].params["up"], online["up"])
    assert not torch.equal(fit_heads([Job((data,), settings)])[0].params["up"], online["up"])


def test_without_noise_and_kl_a_probabilistic_head_is_surgery():
    data = rows("a", 60)
    prob, other = (
        fit_heads([Job((data,), ProbSettings(steps=100, hidden=8, samples=n, kl_weight=0))])[0] for n in (0, 1)
    )
    surgery = fit_heads([Job((data,), SurgerySettings(steps=100, rank=8))])[0]
    for prob_name, surgery_name in (("hidden", "down"), ("mu", "up")):
        assert torch.allclose(prob.params[prob_name], surgery.params[surgery_name], atol=1e-5, rtol=0)
        assert not torch.allclose(other.params[prob_name], surgery.params[surgery_name], atol=1e-5, rtol=0)
    assert not prob.params["log_var"].any()


@pytest.mark.gpu
def test_heads_copied_during_a_run_with_a_graph_are_those_of_shorter_runs():
    job = Job((rows("a", 50),), ProbSettings(steps=150, hidden=8), stops=(2, 64, 100))
    (fitted,) = train_stack([job], "cuda", graph=True)
    for steps, copy in fitted.earlier.items():
        (alone,) = train_stack(
            [replace(job, settings=replace(job.settings, steps=steps), stops=())], "cuda", graph=True
        )
        assert all(torch.equal(copy.params[n], alone.params[n]) for n in alone.params), steps
