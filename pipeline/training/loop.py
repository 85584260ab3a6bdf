"""The training loop of a stack: rows in, fitted heads out. No files, no labels, no printing."""

import contextlib
import math
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from probsurgery.pipeline.config import AffineSettings, ClassifierSettings, OrthogonalSettings, RidgeSettings
from probsurgery.pipeline.errors import ProbsurgeryError, first_line
from probsurgery.pipeline.heads.controls import solve_affine, solve_orthogonal
from probsurgery.pipeline.heads.kinds import Params, initial_params
from probsurgery.pipeline.heads.ridge import solve_ridge
from probsurgery.pipeline.training.adam_step import Stack
from probsurgery.pipeline.training.batches import BLOCK, Batch, Feed, Job, generator
from probsurgery.pipeline.training.classifier_step import ClassifierStack
from probsurgery.pipeline.training.kernel import TORCH, CompiledStack

LOSS_EVERY = 8
"""Steps from one evaluation of the loss to the next. The gradients do not need it, and it takes up to a quarter of a
step's time."""


@dataclass(frozen=True)
class Fitted:
    """One fitted head's parameters, a stack of one, and how the fit went."""

    params: Params
    curve: list[tuple[int, float]] = field(default_factory=list)
    """(step, mean loss since the last entry), from every `LOSS_EVERY`-th step."""
    penalty: float | None = None
    """Ridge: the penalty that was used."""
    seconds: float = 0.0
    """The head's share of the time that the stack took."""
    earlier: dict[int, "Fitted"] = field(default_factory=dict)
    """The head after each of `Job.stops`. Its curve ends with the last whole block."""
    from_run_of: int | None = None
    """Steps of the longer run from which this head was copied."""


Outcome = Fitted | ProbsurgeryError


class _GraphedStep:
    """A stack's step as a CUDA graph, which reads each batch from buffers at fixed addresses."""

    WARM_UP = 3

    def __init__(self, stack: Stack | ClassifierStack) -> None:
        self._stack, self._done = stack, 0
        self._graphs: dict[bool, torch.cuda.CUDAGraph] = {}
        self._batch: Batch | None = None

    def __call__(self, z: Tensor, expert: Tensor, noise: Tensor | None, note_loss: bool) -> None:
        if self._batch is None:
            self._batch = z.clone(), expert.clone(), None if noise is None else noise.clone()
        for buffer, values in zip(self._batch, (z, expert, noise), strict=True):
            if buffer is not None and values is not None:
                buffer.copy_(values)
        self._done += 1
        if self._done <= self.WARM_UP:
            self._stack.step(*self._batch, note_loss)
            return
        if note_loss not in self._graphs:
            # Capturing runs nothing: it leaves the weights as they are, and the replay below takes this step.
            self._graphs[note_loss] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graphs[note_loss]):
                self._stack.step(*self._batch, note_loss)
        self._graphs[note_loss].replay()


@torch.no_grad()
def train_stack(
    jobs: Sequence[Job],
    device: torch.device | str = "cpu",
    *,
    kernel: str = TORCH,
    graph: bool = False,
    advance: Callable[[int], None] | None = None,
) -> list[Outcome]:
    """Train K heads as one stack; `advance` is called with the number of head-steps that have just been done.

    `kernel` is `torch`, or one of `kernel.KERNELS` on a CPU; `graph` replays torch's step as a CUDA graph.
    The heads agree in steps, batch size, samples, feature scale and the number of tasks; where torch trains, in all
    settings but `HeadKind.per_head`, and in the tasks of a round. A head whose loss is not finite becomes an error in
    the list and does not affect the others. Any other failure, such as memory that runs out, makes every head of the
    stack an error.
    """
    device = torch.device(device)
    # A CUDA graph is captured on the current device, whichever holds the tensors.
    current = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    try:
        with current:
            if not jobs[0].settings.is_trained:
                return [_solve(job, device) for job in jobs]
            return _run_steps(jobs, device, kernel, graph, advance)
    except (RuntimeError, MemoryError) as error:
        return [ProbsurgeryError(f"training failed: {first_line(error)}") for _ in jobs]


def _run_steps(
    jobs: Sequence[Job], device: torch.device, kernel: str, graph: bool, advance: Callable[[int], None] | None
) -> list[Outcome]:
    begun = time.perf_counter()
    settings, tasks = jobs[0].settings, len(jobs[0].rows)
    stack, run = _stack_of(jobs, device, kernel, graph)
    feed = Feed(jobs, device, ahead=device.type == "cuda")
    curves: list[list[tuple[int, float]]] = [[] for _ in jobs]
    earlier: list[dict[int, Fitted]] = [{} for _ in jobs]
    failures: dict[int, ProbsurgeryError] = {}
    stops = defaultdict(list)
    for k, job in enumerate(jobs):
        for steps in job.stops:
            stops[steps * tasks].append((k, steps))
    total, done = settings.steps * tasks, 0
    while done < total and len(failures) < len(jobs):
        updates = min(BLOCK * tasks, total - done)
        feed.fill(last=done + updates == total)
        stack.loss_sums.zero_()
        ends = [end for end in range(1, updates) if done + end in stops]
        for first, last in pairwise([0, *ends, updates]):
            run(feed, first, last)
            for k, steps in stops.get(done + last, ()):
                seconds = (time.perf_counter() - begun) / len(jobs)
                earlier[k][steps] = Fitted(stack.params(k), [*curves[k]], seconds=seconds, from_run_of=settings.steps)
        done += updates
        noted = sum(_notes_loss(feed, update) for update in range(updates))
        means = (stack.loss_sums / noted).tolist()
        for k, mean in enumerate(means):
            if not math.isfinite(mean) and k not in failures:
                failures[k] = ProbsurgeryError(f"the loss is {mean} by step {done}; lower --lr or --kl-weight")
            curves[k].append((done, mean))
        if advance is not None:
            advance(updates * len(jobs))
    seconds = (time.perf_counter() - begun) / len(jobs)
    heads = [Fitted(stack.params(k), curve, seconds=seconds, earlier=earlier[k]) for k, curve in enumerate(curves)]
    for k, head in enumerate(heads):
        if k not in failures and not all(tensor.isfinite().all() for tensor in head.params.values()):
            failures[k] = ProbsurgeryError("weights became NaN or infinite; lower --lr or --kl-weight")
    return [failures.get(k, head) for k, head in enumerate(heads)]


_Run = Callable[[Feed, int, int], None]
"""Takes updates of the feed's block, from the first to the last (exclusive)."""


def _stack_of(
    jobs: Sequence[Job], device: torch.device, kernel: str, graph: bool
) -> tuple[Stack | CompiledStack | ClassifierStack, _Run]:
    """The jobs' heads to train, and the function that takes updates."""
    settings = jobs[0].settings
    if isinstance(settings, ClassifierSettings):
        stack = ClassifierStack(settings, [job.classifier for job in jobs], device)
        return stack, _step_by_step(stack, graph)
    starts = [initial_params(job.settings, job.dim, generator(job.label, job.seed, "init")) for job in jobs]
    return make_stack(kernel, jobs, starts, device, graph)


def make_stack(
    kernel: str, jobs: Sequence[Job], starts: Sequence[Params], device: torch.device, graph: bool
) -> tuple[Stack | CompiledStack, _Run]:
    """Heads to train, and the function that takes updates."""
    settings, places = [job.settings for job in jobs], [job.place for job in jobs]
    if kernel != TORCH:
        rounds = [job.tasks_in_round for job in jobs]
        compiled = CompiledStack(kernel, settings, starts, LOSS_EVERY, places=places, rounds=rounds)
        return compiled, compiled.run
    stack = Stack(settings, starts, device, places=places, tasks_in_round=jobs[0].tasks_in_round)
    return stack, _step_by_step(stack, graph)


def _step_by_step(stack: Stack | ClassifierStack, graph: bool) -> _Run:
    return partial(_each_update, _GraphedStep(stack) if graph else stack.step)


def _each_update(step: Callable[..., None], feed: Feed, first: int, last: int) -> None:
    for update in range(first, last):
        step(*feed.batch(update), _notes_loss(feed, update))


def _notes_loss(feed: Feed, update: int) -> bool:
    return update // feed.tasks % LOSS_EVERY == 0  # for every task of a shared head


def _solve(job: Job, device: torch.device) -> Outcome:
    begun = time.perf_counter()
    (rows,) = job.rows
    penalty = None
    try:
        match job.settings:
            case RidgeSettings():
                params, penalty = solve_ridge(rows.merged, rows.expert, job.settings.penalty, device, rows.seen)
            case AffineSettings():
                params = solve_affine(rows.merged, rows.expert, device, rows.seen)
            case OrthogonalSettings():
                params = solve_orthogonal(rows.merged, rows.expert, device, rows.seen)
            case _:
                raise AssertionError("other heads are trained")
    except ProbsurgeryError as error:
        return error
    return Fitted(params, penalty=penalty, seconds=time.perf_counter() - begun)
