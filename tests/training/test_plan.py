"""Whatever the plan, a head is that of the plain loop; what a plan chooses; what happens if a worker dies."""

import contextlib
import errno
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch

from autograd_loop import assert_same, plain_loop, rows
from probsurgery.pipeline.config import ProbSettings, RidgeSettings, SurgerySettings
from probsurgery.pipeline.errors import InputError, ProbsurgeryError
from probsurgery.pipeline.store.results import TrainingPlan
from probsurgery.pipeline.training import loop, workers
from probsurgery.pipeline.training import plan as plan_module
from probsurgery.pipeline.training.adam_step import Stack
from probsurgery.pipeline.training.batches import Feed, Job, Rows
from probsurgery.pipeline.training.loop import Fitted
from probsurgery.pipeline.training.plan import Plan, Workload, execute, fit_heads, make_plan
from probsurgery.pipeline.training.workers import Pool

CPU = torch.device("cpu")
PROB = ProbSettings(steps=250, hidden=16)
SURGERY = SurgerySettings(steps=250, rank=4, loss="smooth-l1")  # why: see `test_loop.SMOOTH`


def jobs():
    """Both kinds, several KL weights and seeds on the same rows, rows fewer than a batch, and a shared head."""
    a, b, c = rows("a", 120), rows("b", 37, 1), rows("c", 9, 2)
    all_jobs = [Job((a,), ProbSettings(steps=250, hidden=16, kl_weight=k), seed) for k in (0, 1e-2) for seed in (0, 1)]
    all_jobs += [Job((task,), SURGERY) for task in (a, b, c)]
    return [*all_jobs, Job((a, b, c), ProbSettings(steps=80, hidden=16, samples=3))]


def trained(plan, all_jobs, tmp_path, advance=None):
    """Outcomes of a plan, with features on disk if it has workers."""
    if not plan.workers:
        return dict(execute(all_jobs, plan, advance=advance))
    spilled = {}
    for job in all_jobs:
        for data in job.rows:
            if id(data) not in spilled:
                (folder := tmp_path / str(len(spilled))).mkdir()
                spilled[id(data)] = data.spilled(folder)
    all_jobs = [Job(tuple(spilled[id(r)] for r in job.rows), job.settings, job.seed) for job in all_jobs]
    with Pool(plan.workers) as pool:
        return dict(execute(all_jobs, plan, pool, advance))


@pytest.mark.parametrize("path", ["stacks", "single heads", "workers"])
def test_every_path_takes_the_steps_of_the_plain_loop(path, tmp_path, torch_trains):
    all_jobs = jobs()
    plan = make_plan([Workload.of(job) for job in all_jobs], CPU, workers=2 if path == "workers" else 0)
    if path == "single heads":
        plan = Plan(CPU, tuple((number,) for number in range(len(all_jobs))))
    else:
        assert max(map(len, plan.stacks)) > 1
    outcomes = trained(plan, all_jobs, tmp_path)
    assert sorted(outcomes) == list(range(len(all_jobs)))
    for number, job in enumerate(all_jobs):
        assert_same(outcomes[number].params, plain_loop(job))


def test_at_the_papers_steps_metrics_are_those_of_the_plain_loop_within_seed_noise():
    data = rows("a", 300)

    def bias(params):
        correction = torch.relu(data.merged @ params["hidden"].T) @ params["mu"].T
        return (data.merged - correction - data.expert).abs().mean().item()

    settings = ProbSettings(steps=5_000, hidden=8)
    heads = [fit_heads([Job((data,), settings, seed)])[0].params for seed in range(3)]
    biases = [bias({name: weight[0] for name, weight in params.items()}) for params in heads]
    spread = torch.tensor(biases).std().item()
    start = (data.merged - data.expert).abs().mean().item()
    assert max(biases) < 0.8 * start
    assert spread > 0
    assert abs(biases[0] - bias(plain_loop(Job((data,), settings, 0)))) < spread


def test_other_heads_in_a_sweep_change_a_head_by_float_noise_at_most(torch_trains):
    everything = jobs()
    among = fit_heads(everything)
    for number in (0, 4, 7):
        alone = fit_heads([everything[number]])[0].params
        assert all(torch.allclose(alone[n], among[number].params[n], atol=1e-5, rtol=0) for n in alone)


def test_a_head_that_fails_does_not_affect_the_others_of_its_stack(torch_trains):
    settings, huge = ProbSettings(steps=128, hidden=8, loss="mse"), rows("a", 50).merged * 1e25
    wild, tame = Job((Rows("a", huge, -huge),), settings), Job((rows("b", 50, 1),), settings)
    plan = make_plan([Workload.of(job) for job in (wild, tame)], CPU)
    assert plan.stacks == ((0, 1),)
    outcomes = dict(execute([wild, tame], plan))
    assert isinstance(outcomes[0], ProbsurgeryError)
    assert "loss is" in str(outcomes[0])
    (alone,) = fit_heads([tame])
    assert all(torch.allclose(alone.params[n], outcomes[1].params[n], atol=1e-5) for n in alone.params)
    with pytest.raises(ProbsurgeryError, match="the head for a: the loss is"):
        fit_heads([tame, wild])


def test_a_stack_that_fails_does_not_affect_the_others(monkeypatch):
    def fails_when_narrow(stack, *batch):
        if stack.weights[0].shape[1] == 4:
            raise RuntimeError("out of memory\nand more")
        return real(stack, *batch)

    real = Stack.step
    monkeypatch.setattr(Stack, "step", fails_when_narrow)
    both = [Job((rows("a", 50),), SURGERY), Job((rows("a", 50),), PROB)]
    outcomes = dict(execute(both, Plan(CPU, ((0,), (1,)))))
    assert str(outcomes[0]) == "training failed: out of memory"
    assert isinstance(outcomes[1], Fitted)


def plan_of(settings, heads, **choices):
    return make_plan([Workload(settings, 1, 512)] * heads, CPU, **choices)


def test_wide_heads_go_singly_or_in_few_and_narrow_ones_in_stacks(monkeypatch, torch_trains):
    monkeypatch.setattr(plan_module, "_last_level_cache", lambda: 16 * 2**20)
    wide, narrow = ProbSettings(hidden=256), SurgerySettings(rank=4)
    assert {len(stack) for stack in plan_of(wide, 8, workers=2).stacks} == {1}
    assert {len(stack) for stack in plan_of(narrow, 96, workers=2).stacks} == {48}
    assert {len(stack) for stack in plan_of(narrow, 512, workers=2).stacks} == {64}
    assert {len(stack) for stack in plan_of(RidgeSettings(), 3).stacks} == {1}
    ranks = make_plan(
        [Workload(SurgerySettings(rank=r), 1, 512) for r in (4, 8, 16, 32) for _ in range(8)], CPU, workers=2
    )
    assert {len(stack) for stack in ranks.stacks} == {8}
    monkeypatch.setattr(plan_module, "_last_level_cache", lambda: 64 * 2**20)
    assert {len(stack) for stack in plan_of(ProbSettings(), 8, workers=2).stacks} == {4}


def test_workers_are_started_when_the_work_is_worth_it(torch_trains):
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        assert plan_of(ProbSettings(), 8).workers == 4
        assert plan_of(ProbSettings(steps=10_000), 3).workers == 3
        assert plan_of(ProbSettings(), 1).workers == 0
        assert plan_of(ProbSettings(steps=100), 8).workers == 0
        assert plan_of(ProbSettings(steps=100), 8, workers=2).workers == 2
        assert plan_of(ProbSettings(), 8, workers=0).workers == 0
    finally:
        torch.set_num_threads(before)


def test_every_head_is_planned_once_and_the_longest_first(torch_trains):
    workloads = [Workload(ProbSettings(hidden=h, kl_weight=k), 1, 64) for h in (8, 128, 32) for k in (0, 1, 2)]
    plan = make_plan(workloads, CPU, workers=2)
    assert sorted(number for stack in plan.stacks for number in stack) == list(range(9))
    hidden = [workloads[stack[0]].settings.hidden for stack in plan.stacks]
    assert hidden == sorted(hidden, reverse=True)
    assert all(len({workloads[number].settings.hidden for number in stack}) == 1 for stack in plan.stacks)
    assert plan.record(plan.stacks[0], ProbSettings()).workers == 2


def test_cuda_takes_stacks_as_large_as_memory_allows_and_a_graph(monkeypatch):
    cuda, workloads = torch.device("cuda"), [Workload(ProbSettings(), 1, 768)] * 400
    monkeypatch.setattr(plan_module, "available_memory", lambda device: 100 * 2**30)
    plan = make_plan(workloads, cuda)
    assert [len(stack) for stack in plan.stacks] == [400]
    assert plan.graph
    assert plan.workers == 0
    record = plan.record(plan.stacks[0], ProbSettings())
    assert record == TrainingPlan(stack=400, workers=0, graph=True, precision="fp32")
    assert plan.record(plan.stacks[0], RidgeSettings()).graph is False
    assert make_plan(workloads, cuda, tf32=True).record(plan.stacks[0], ProbSettings()).precision == "tf32"
    monkeypatch.setattr(plan_module, "available_memory", lambda device: 2**30)
    small = make_plan(workloads, cuda)
    assert 1 < max(map(len, small.stacks)) < 100


def test_what_memory_does_not_hold_is_refused_with_its_size(monkeypatch, torch_trains):
    monkeypatch.setattr(plan_module, "available_memory", lambda device: 2 * 2**30)
    with pytest.raises(
        InputError, match=r"8 heads need about .* GiB of memory, and 2\.0 GiB are free; run the grid in"
    ):
        plan_of(ProbSettings(hidden=16_384, batch_size=4_096), 8)
    crowded = plan_of(ProbSettings(), 64, workers=32)
    assert 0 < crowded.workers < 8


def children():
    return [p for p in psutil.Process().children() if "probsurgery.pipeline.training.workers" in p.cmdline()]


LONG = ProbSettings(steps=20_000, hidden=64)


def test_a_worker_that_dies_costs_its_own_heads_only(tmp_path):
    short = ProbSettings(steps=200, hidden=8)
    all_jobs = [Job((rows(name, 50, seed),), LONG if name == "a" else short) for seed, name in enumerate("abcd")]
    plan = Plan(CPU, ((0,), (1,), (2, 3)), workers=1)
    killed = []

    def kill(head_steps):
        if head_steps and not killed:
            killed.extend(children())
            killed[0].kill()

    outcomes = trained(plan, all_jobs, tmp_path, kill)
    assert len(killed) == 1
    assert isinstance(outcomes[0], ProbsurgeryError)
    assert "the worker that trained it died (SIGKILL)" in str(outcomes[0])
    for number in (1, 2, 3):
        assert_same(outcomes[number].params, plain_loop(all_jobs[number]))
    assert not children()


def test_a_worker_that_dies_in_the_middle_of_a_message_costs_its_own_heads_only(tmp_path, monkeypatch):
    """The result is larger than a pipe holds, and the worker is killed when the parent has read part of it."""
    wide = ProbSettings(steps=1, hidden=8_192, batch_size=1)
    all_jobs = [Job((rows("a", 50),), wide), Job((rows("b", 50),), PROB)]
    real, torn = workers._receive, []

    def tear(connection):
        message = real(connection)
        if isinstance(message, int) and not torn:
            (worker,) = children()
            torn.append(worker)
            while worker.status() != psutil.STATUS_SLEEPING:  # it waits for the pipe to be read
                time.sleep(0.05)
            time.sleep(0.5)
            worker.kill()
        return message

    monkeypatch.setattr(workers, "_receive", tear)
    outcomes = trained(Plan(CPU, ((0,), (1,)), workers=1), all_jobs, tmp_path)
    assert "died (SIGKILL)" in str(outcomes[0])
    assert_same(outcomes[1].params, plain_loop(all_jobs[1]))


def test_a_worker_that_does_not_find_its_rows_says_so(tmp_path):
    spilled = Job((rows("a", 50).spilled(tmp_path),), PROB)
    (tmp_path / "a.merged.npy").unlink()
    with Pool(1) as pool:
        outcomes = dict(execute([spilled], Plan(CPU, ((0,),), workers=1), pool))
    assert "the worker failed: [Errno 2]" in str(outcomes[0])


def test_workers_end_with_an_interrupt(tmp_path):
    def interrupt(head_steps):
        if head_steps:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(Plan(CPU, ((0,), (1,)), workers=2), [Job((rows("a", 50),), LONG)] * 2, tmp_path, interrupt)
    assert not children()


def test_a_worker_that_cannot_start_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(ProbsurgeryError, match="did not start .*--workers 0"):
        trained(Plan(CPU, ((0,), (1,)), workers=2), [Job((rows("a", 50),), LONG)] * 2, tmp_path)


def test_if_not_all_workers_can_be_started_none_stays(monkeypatch):
    """The system lets a user start so many processes, and no more."""
    real, started = subprocess.Popen, []

    def limited(*arguments, **options):
        if started:
            raise OSError(errno.EAGAIN, "Resource temporarily unavailable")
        started.append(real(*arguments, **options))
        return started[0]

    monkeypatch.setattr(workers.subprocess, "Popen", limited)
    with pytest.raises(ProbsurgeryError, match="did not start .Resource temporarily unavailable.; use fewer --workers"):
        Pool(2)
    assert not children()


ORPHANS = """
import torch
from probsurgery.pipeline.config import (ProbSettings)
from probsurgery.pipeline.training.plan import fit_heads
from probsurgery.pipeline.training.batches import Job, Rows
z = torch.randn(50, 24)
show = lambda done, total: done and print("training", flush=True)
fit_heads([Job((Rows(t, z, z),), ProbSettings(steps=10**6, hidden=64)) for t in "ab"], workers=2, progress=show)
"""


def test_workers_end_when_their_parent_is_killed(tmp_path, torch_trains):
    """The script has no `__main__` guard, so workers must not import it."""
    (script := tmp_path / "script.py").write_text(ORPHANS)
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout.readline() == "training\n"
    orphans = psutil.Process(parent.pid).children()
    assert len(orphans) == 2
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + 20
    while any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in orphans):
        assert time.monotonic() < deadline
        time.sleep(0.05)


class FakeGraph:
    """Stands in for a CUDA graph on a CPU: a step taken while capturing is noted and not run; replay runs it."""

    def __init__(self):
        self.captured = None

    def replay(self):
        self.captured()


@pytest.fixture
def fake_graphs(monkeypatch):
    capturing, captured, real = [], [], Stack.step

    @contextlib.contextmanager
    def capture(graph):
        capturing.append(graph)
        captured.append(graph)
        yield
        capturing.pop()

    def step(stack, *batch):
        if capturing:
            capturing[-1].captured = lambda: real(stack, *batch)
        else:
            real(stack, *batch)

    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(Stack, "step", step)
    return captured


@pytest.mark.parametrize("ahead", [False, True], ids=["drawn as needed", "drawn ahead"])
def test_replayed_steps_are_those_of_the_plain_loop(fake_graphs, monkeypatch, ahead):
    """The parts of the CUDA path that run on a CPU: buffers, order of capture and replay, drawing ahead."""
    monkeypatch.setattr(loop, "Feed", lambda jobs, device, **_: Feed(jobs, device, ahead=ahead))
    all_jobs = jobs()
    stacks = make_plan([Workload.of(job) for job in all_jobs], CPU).stacks
    outcomes = dict(execute(all_jobs, Plan(CPU, stacks, graph=True)))
    assert len(fake_graphs) == 2 * len(stacks)  # with and without the loss
    for number, job in enumerate(all_jobs):
        assert_same(outcomes[number].params, plain_loop(job))


@pytest.mark.gpu
@pytest.mark.parametrize("graph", [False, True])
def test_cuda_takes_the_steps_of_the_plain_loop(graph):
    all_jobs = jobs()
    stacks = make_plan([Workload.of(job) for job in all_jobs], torch.device("cuda")).stacks
    outcomes = dict(execute(all_jobs, Plan(torch.device("cuda"), stacks, graph=graph)))
    for number, job in enumerate(all_jobs):
        assert isinstance(outcomes[number], Fitted)
        assert_same(outcomes[number].params, plain_loop(job, "cuda"))
