"""How much faster is stage two than one autograd loop for each head, and than the public code?

Trains heads on random features with the row counts of the eight tasks, on a CPU with torch's step and with the compiled
one, and prints each time beside what the naive loop would take in the same run on the same machine:

    python benchmarks/stage_two.py [--device auto] [--quick] [--steps]

The naive loop (nn.Linear, autograd, torch's default Adam, with one thread or all, whichever is faster) is timed for
some steps before and after each case, and multiplied. So are the two encoder passes that the public code makes in every
step. Times of stage two include starting workers and writing scratch files, but not evaluation. The floor on a CPU is
the time of the steps' matrix products alone, at the rate at which torch multiplies large matrices on all threads.
"""

from __future__ import annotations

import argparse
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import open_clip
import torch
import torch.nn.functional as F
from torch import nn

from probsurgery.pipeline.config import HeadSettings, ProbSettings, SurgerySettings
from probsurgery.pipeline.device import choose_device
from probsurgery.pipeline.heads.kinds import initial_params, parameter_count
from probsurgery.pipeline.training.batches import BLOCK, Feed, Job, Rows
from probsurgery.pipeline.training.kernel import TORCH, VARIABLE, kernel_for, usable_kernels
from probsurgery.pipeline.training.loop import make_stack
from probsurgery.pipeline.training.plan import Workload, fit_heads, make_plan

ROWS = {"sun397": 19_850, "cars": 8_041, "resisc45": 6_300, "eurosat": 2_700}
ROWS |= {"svhn": 26_032, "gtsrb": 12_630, "mnist": 10_000, "dtd": 1_880}


@dataclass(frozen=True)
class Case:
    """Every setting is fitted on every task."""

    title: str
    dim: int
    settings: list[HeadSettings]


def cases(steps: int) -> list[Case]:
    prob = [ProbSettings(steps=steps)]
    grid = [ProbSettings(steps=steps, hidden=h, kl_weight=k) for h, k in product((32, 64, 128), (0, 1e-5, 1e-4, 1e-3))]
    ranks = [SurgerySettings(steps=steps, rank=rank) for rank in (4, 8, 16, 32, 64)]
    return [
        Case("ProbSurgery h=128, 8 tasks", 512, prob),
        Case("ProbSurgery h=128, 8 tasks", 768, prob),
        Case("ProbSurgery h=32, 8 tasks x 4 KL weights", 512, grid[:4]),
        Case("ProbSurgery h=32,64,128 x 4 KL weights, 8 tasks", 512, grid),
        Case("Surgery r=4,8,16,32,64, 8 tasks", 512, ranks),
    ]


def cuda_cases(steps: int) -> list[Case]:
    weights = [0.0, *(10.0 ** -(2 + i / 12) for i in range(49))]
    return [
        Case(f"ProbSurgery h=128, {8 * n} heads", 768, [ProbSettings(steps=steps, kl_weight=w) for w in weights[:n]])
        for n in (1, 12, 50)
    ]


class Naive(nn.Module):
    def __init__(self, settings: HeadSettings, dim: int) -> None:
        super().__init__()
        self.settings = settings
        width = getattr(settings, settings.width_name)
        self.down = nn.Linear(dim, width, bias=False)
        self.up = nn.Linear(width, dim, bias=False)
        self.log_var = nn.Linear(width, dim, bias=False) if settings.kind == "prob" else None

    def loss(self, z: torch.Tensor, expert: torch.Tensor) -> torch.Tensor:
        u = F.relu(self.down(z))
        mu = self.up(u)
        if self.log_var is None:
            return F.l1_loss(z - mu, expert)
        log_var = self.log_var(u)
        drawn = mu + torch.randn_like(mu) * torch.exp(0.5 * log_var)
        kl = (-0.5 * torch.sum(1 + log_var - mu**2 - log_var.exp(), dim=1)).mean()
        return F.l1_loss(z - drawn, expert) + self.settings.kl_weight * kl


def naive_seconds(
    settings: HeadSettings,
    rows: Rows,
    device: torch.device,
    duration: float,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Seconds of one step of the naive loop by a clock, timed for about `duration` seconds."""
    merged, expert = rows.merged.to(device), rows.expert.to(device)
    head = Naive(settings, merged.shape[1]).to(device)
    optimizer = torch.optim.Adam(head.parameters(), lr=settings.lr)
    order = torch.randint(len(merged), (100, settings.batch_size))

    def steps() -> float:
        start = clock()
        for picked in order:
            optimizer.zero_grad()
            head.loss(merged[picked], expert[picked]).backward()
            optimizer.step()
        synchronize(device)
        return (clock() - start) / len(order)

    all_threads, times = torch.get_num_threads(), {}
    for threads in {1, all_threads}:
        torch.set_num_threads(threads)
        steps()
        end = time.perf_counter() + duration / 2
        times[threads] = [steps()]
        while time.perf_counter() < end:
            times[threads].append(steps())
    torch.set_num_threads(all_threads)
    return min(sum(taken) / len(taken) for taken in times.values())


def reference_seconds(device: torch.device) -> float:
    """Seconds of the two encoder passes that the public code makes in each step: ViT-B/32, 16 images."""
    logging.getLogger().setLevel(logging.ERROR)  # random weights will do, and need no warning
    towers = [open_clip.create_model("ViT-B-32-quickgelu", pretrained=None).visual.to(device).eval() for _ in range(2)]
    images = torch.randn(16, 3, 224, 224, device=device)
    with torch.no_grad():
        for repeat in range(6):
            if repeat == 1:
                synchronize(device)
                start = time.perf_counter()
            for tower in towers:
                tower(images)
        synchronize(device)
    return (time.perf_counter() - start) / 5


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def features(dim: int) -> list[Rows]:
    tasks = []
    for seed, (task, rows) in enumerate(ROWS.items()):
        g = torch.Generator().manual_seed(seed)
        merged = torch.randn(rows, dim, generator=g)
        tasks.append(Rows(task, merged, merged + 0.3 * torch.randn(rows, dim, generator=g)))
    return tasks


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second that a large copy reads and writes."""
    source = torch.empty(2**28, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    synchronize(device)
    start = time.perf_counter()
    for _ in range(10):
        target.copy_(source)
    synchronize(device)
    return 10 * 2 * source.nbytes / (time.perf_counter() - start)


def product_rate() -> float:
    """Floating-point operations a second of products of large matrices on every thread at once, at best."""
    a, b, times, threads = torch.randn(1024, 1024), torch.randn(1024, 1024), [], torch.get_num_threads()
    torch.set_num_threads(1)
    for _ in range(10):
        start = time.thread_time()  # a busy machine does not count
        torch.mm(a, b)
        times.append(time.thread_time() - start)
    torch.set_num_threads(threads)
    return threads * 2 * 1024**3 / min(times)


def product_operations(settings: HeadSettings, dim: int) -> int:
    """Floating-point operations of one step's matrix products: forward, and the gradients of weights and of u."""
    parameters, inner = parameter_count(settings, dim), dim * getattr(settings, settings.width_name)
    return 2 * settings.batch_size * (2 * parameters + parameters - inner)


def step_times(rate: float) -> None:
    """Print the least time of one step of one head, batches drawn, by every kernel; with what autograd takes for it.

    The times are the thread's own, and the kernels take turns, so that other work on the machine changes little.
    """
    kernels, cpu = [TORCH, *usable_kernels()], torch.device("cpu")
    print(
        f"\none step of one head on one thread, in microseconds{'':9}naive", *(f"{k:>7}" for k in kernels), "products"
    )
    for settings, dim in product((ProbSettings(), ProbSettings(hidden=32), SurgerySettings()), (64, 512, 768)):
        merged = torch.randn(4_000, dim)
        job = Job((Rows("t", merged, merged + 0.3 * torch.randn(4_000, dim)),), settings)
        feed, start = Feed([job], cpu, ahead=False), initial_params(settings, dim, torch.Generator())
        runs = [make_stack(kernel, [job], [start], cpu, graph=False)[1] for kernel in kernels]
        times: list[list[float]] = [[] for _ in runs]
        torch.set_num_threads(1)
        with torch.no_grad():
            for _ in range(10):
                feed.fill()
                for run, taken in zip(runs, times, strict=True):
                    begun = time.thread_time()
                    run(feed, 0, BLOCK)
                    taken.append((time.thread_time() - begun) / BLOCK)
        naive = naive_seconds(settings, job.rows[0], cpu, 0.5, clock=time.thread_time)
        floor = product_operations(settings, dim) / rate
        title = f"{settings.title} {settings.width_name} {getattr(settings, settings.width_name)}, d={dim}"
        print(f"  {title:54}", *(f"{1e6 * seconds:7.0f}" for seconds in (naive, *map(min, times), floor)), flush=True)


def stage_two(jobs: list[Job], device: torch.device, kernel: str) -> tuple[float, float]:
    """Seconds of stage two with this kernel, start-up included, and of the training of its heads; prints the plan."""
    os.environ[VARIABLE] = kernel
    plan = make_plan([Workload.of(job) for job in jobs], device)
    sizes = [len(stack) for stack in plan.stacks]
    print(
        f"  {plan.kernel}: {len(sizes)} stacks of {min(sizes)} to {max(sizes)}, {plan.workers} "
        f"{'threads' if plan.threads else 'processes'}, graph {plan.graph}"
    )
    start = time.perf_counter()
    fitted = fit_heads(jobs, device)
    synchronize(device)
    return time.perf_counter() - start, sum(head.seconds for head in fitted) / max(1, plan.workers)


def measure(case: Case, rows: list[Rows], device: torch.device, kernels: list[str]) -> tuple[float, float, int]:
    """Seconds of stage two with the last kernel, seconds that the naive loop would take, and head-steps."""
    jobs = [Job((task_rows,), settings) for settings in case.settings for task_rows in rows]
    print(f"\n{case.title}, d={case.dim}: {len(jobs)} heads x {jobs[0].settings.steps:,} steps")
    shapes = {parameter_count(s, case.dim): s for s in case.settings}
    naive = {shape: [naive_seconds(s, rows[0], device, 2)] for shape, s in shapes.items()}
    times = {kernel: stage_two(jobs, device, kernel) for kernel in kernels}
    for shape, s in shapes.items():
        naive[shape].append(naive_seconds(s, rows[0], device, 2))
    steps = dict.fromkeys(shapes, 0)
    for job in jobs:
        steps[parameter_count(job.settings, case.dim)] += Workload.of(job).head_steps
    naive_sum = sum(steps[shape] * sum(taken) / len(taken) for shape, taken in naive.items())
    total = sum(steps.values())
    print(f"  naive loop        {naive_sum:8.2f} s {total / naive_sum:9,.0f} head-steps/s (some steps, multiplied)")
    for kernel, both in times.items():
        for what, taken in zip((f"stage two, {kernel}", "  of it training"), both, strict=True):
            print(f"  {what:17} {taken:8.2f} s {total / taken:9,.0f} head-steps/s  {naive_sum / taken:6.1f}x")
    seconds, busy = times[kernels[-1]]
    if device.type == "cpu":
        rate = product_rate()
        floor = sum(product_operations(job.settings, case.dim) * job.settings.steps for job in jobs) / rate
        share = f"{floor / busy:.2f} of the training's time"
        print(f"  products alone    {floor:8.2f} s at {rate / 1e9:.0f} GFLOP/s: {share}", flush=True)
    return seconds, naive_sum, total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--quick", action="store_true", help="500 steps instead of 5,000")
    parser.add_argument("--steps", action="store_true", help="only the times of single steps, which take seconds")
    options = parser.parse_args()
    device = choose_device(options.device)
    steps = 500 if options.quick else 5_000
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    kernels = list(dict.fromkeys([TORCH, kernel_for(device)]))
    print(f"torch {torch.__version__}, {name}; {' and '.join(kernels)}")
    print(f"batch 16, float32; rows: {sum(ROWS.values()):,} in 8 tasks", flush=True)
    if device.type == "cpu":
        threads = torch.get_num_threads()
        step_times(product_rate() / threads)
        torch.set_num_threads(threads)
    if options.steps:
        return
    held = {}
    for case in [*cases(steps), *(cuda_cases(steps) if device.type == "cuda" else [])]:
        if case.dim not in held:
            held = {case.dim: features(case.dim)}
        seconds, naive, total = measure(case, held[case.dim], device, kernels)
        if case == cases(steps)[0]:
            encoders = total * reference_seconds(device)
            reference = naive + encoders
            print(f"  two ViT-B/32 passes of 16 images in every step, as in the public code: {reference:,.0f} s")
            print(f"    (one step measured, and multiplied)  {reference / seconds:,.0f}x the time of stage two")
        if device.type == "cuda":
            traffic = 7 * 4 * sum(parameter_count(s, case.dim) * s.steps * len(ROWS) for s in case.settings)
            floor = traffic / copy_bandwidth(device)
            print(f"  memory floor (weights and moments in and out) {floor:.2f} s: {seconds / floor:.1f} times that")


if __name__ == "__main__":
    main()
