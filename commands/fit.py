"""Stage two: `fit` for one setting, `sweep` for a grid of settings, `study` for the papers' analyses."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from probsurgery.commands.options import (
    AsJson,
    CacheFolder,
    Device,
    JsonFormat,
    Real,
    Several,
    StoredResults,
    TableFormat,
    Whole,
    comma_list,
    configured,
    real_or_auto,
)
from probsurgery.commands.progress import shown_progress
from probsurgery.commands.render import note, print_json, print_tables, say
from probsurgery.pipeline.config import (
    HEAD_SETTINGS,
    LOSSES,
    OPTIMIZERS,
    ClassifierSettings,
    FitConfig,
    ProbSettings,
    SurgerySettings,
    SweepConfig,
    head_settings,
)
from probsurgery.pipeline.errors import InputError, ProbsurgeryError, unknown

Shared = Annotated[bool, Option("--shared", help="Fit one head for all tasks.")]
Holdout = Annotated[float, Real(help="Share of the test rows to exclude from the fit and evaluate on.")]
FitSplit = Annotated[str, Option(help="Fit on test (the papers' protocol) or train images.")]
Tasks = Annotated[Several | None, comma_list(str, "Tasks to fit. [all in the cache]")]
Online = Annotated[bool, Option("--online", help="See each row once, in order of arrival, one at a time.")]
Workers = Annotated[int | None, Whole(help="Threads (or processes, if torch trains) on a CPU. [by the amount of work]")]
Tf32 = Annotated[bool, Option("--tf32", help="Multiply in TF32 on CUDA: faster, less exact.")]
Samples = Annotated[int | None, Whole(help=f"prob: noise samples in a step; 0: no noise. [{ProbSettings.samples}]")]
FeatureScale = Annotated[
    float | None,
    Option(parser=real_or_auto, metavar="X|auto", help="prob: multiply features by this in training. [1, the paper's]"),
]
FeatureScales = Annotated[
    Several | None, comma_list(float, "prob: multiply features by these in training, or auto.", real_or_auto)
]
LearningRate = Annotated[
    float | None,
    Real(
        help=f"Adam's learning rate. [{ProbSettings.lr:g}; classifier {ClassifierSettings.lr:g} times the size of its "
        "entries]"
    ),
]
KeepHeads = Annotated[bool, Option("--keep-heads", help="Save the heads, not only their results.")]
Seeds = Annotated[Several, comma_list(int, "Seeds; figures are means and standard deviations over them.")]


def fit_command(
    cache: CacheFolder,
    head: Annotated[str, Option(help=f"Kind of head: {', '.join(HEAD_SETTINGS)}.")] = FitConfig.head.kind,
    hidden: Annotated[int | None, Whole(help=f"prob: width h. [{ProbSettings.hidden}]")] = None,
    rank: Annotated[int | None, Whole(help=f"surgery: rank r. [{SurgerySettings.rank}]")] = None,
    kl_weight: Annotated[float | None, Real(help=f"prob: KL weight. [{ProbSettings.kl_weight:g}]")] = None,
    samples: Samples = None,
    feature_scale: FeatureScale = None,
    steps: Annotated[
        int | None, Whole(help=f"Updates for each task. [{SurgerySettings.steps}; prob {ProbSettings.steps}]")
    ] = None,
    batch_size: Annotated[
        int | None,
        Whole(help=f"Rows in a step. [{ProbSettings.batch_size}; classifier {ClassifierSettings.batch_size}]"),
    ] = None,
    lr: LearningRate = None,
    loss: Annotated[str | None, Option(help=f"{', '.join(LOSSES)}. [{ProbSettings.loss}]")] = None,
    optimizer: Annotated[str | None, Option(help="An Adam for each head, or one: separate, joint. [separate]")] = None,
    penalty: Annotated[float | None, Real(help="ridge: penalty. [by leave-one-out, without labels]")] = None,
    shared: Shared = FitConfig.shared,
    fraction: Annotated[float, Real(help="Share of the rows that the fit may see.")] = FitConfig.fraction,
    holdout: Holdout = FitConfig.holdout,
    fit_split: FitSplit = FitConfig.fit_split,
    online: Online = FitConfig.online,
    seed: Annotated[int, Whole(help="Seed of row order, noise and initial weights.")] = FitConfig.seed,
    tasks: Tasks = FitConfig.tasks,
    device: Device = FitConfig.device,
    workers: Workers = FitConfig.workers,
    tf32: Tf32 = FitConfig.tf32,
    name: Annotated[str | None, Option(help="Name of the head's folder. [from the settings]")] = FitConfig.name,
    results: StoredResults = None,
    as_json: AsJson = False,
) -> None:
    """Stage two: fit a head for each task on the cached features."""
    config = configured(FitConfig, locals(), head=head_settings(head, **_given_settings(locals())))
    from probsurgery.pipeline.analysis.plausibility import implausible_experts
    from probsurgery.pipeline.analysis.runs import fit_table
    from probsurgery.pipeline.fitting.fit import fit
    from probsurgery.pipeline.fitting.scale import scale_note
    from probsurgery.pipeline.store.cache import Cache

    with shown_progress("head-steps") as progress:
        result = fit(config, progress)
    opened = Cache(cache)
    small = scale_note(opened, result.config, result.rows)
    for text in [*implausible_experts(result.rows, opened), *([small] if small else [])]:
        note(text)
    if as_json:
        rows = [row.to_json() for row in result.rows]
        print_json({"path": str(result.path), "repeated": result.repeated, "results": rows})
        return
    if result.repeated:
        note(f"{result.path} exists with the same settings; nothing to do")
    print_tables([fit_table(result.rows, result.path)], titles=opened.titles)


def sweep_command(
    cache: CacheFolder,
    head: Annotated[Several, comma_list(str, f"Kinds of head: {', '.join(HEAD_SETTINGS)}.")] = SweepConfig.head,
    hidden: Annotated[Several | None, comma_list(int, "prob: widths h, such as 32,64,128.")] = None,
    rank: Annotated[Several | None, comma_list(int, "surgery: ranks r.")] = None,
    kl_weight: Annotated[Several | None, comma_list(float, "prob: KL weights.")] = None,
    samples: Annotated[Several | None, comma_list(int, "prob: noise samples in a step.")] = None,
    feature_scale: FeatureScales = None,
    steps: Annotated[Several | None, comma_list(int, "Updates for each task.")] = None,
    batch_size: Annotated[Several | None, comma_list(int, "Rows in a step.")] = None,
    lr: Annotated[Several | None, comma_list(float, "Adam's learning rates.")] = None,
    loss: Annotated[Several | None, comma_list(str, f"Losses: {', '.join(LOSSES)}.")] = None,
    optimizer: Annotated[Several | None, comma_list(str, f"Optimizers: {', '.join(OPTIMIZERS)}.")] = None,
    penalty: Annotated[Several | None, comma_list(float, "ridge: penalties.")] = None,
    fraction: Annotated[Several, comma_list(float, "Shares of the rows that the fit may see.")] = SweepConfig.fraction,
    seed: Seeds = SweepConfig.seed,
    shared: Shared = SweepConfig.shared,
    holdout: Holdout = SweepConfig.holdout,
    fit_split: FitSplit = SweepConfig.fit_split,
    online: Online = SweepConfig.online,
    tasks: Tasks = SweepConfig.tasks,
    device: Device = SweepConfig.device,
    workers: Workers = SweepConfig.workers,
    tf32: Tf32 = SweepConfig.tf32,
    results: StoredResults = None,
    keep_heads: KeepHeads = SweepConfig.keep_heads,
    as_json: AsJson = False,
) -> None:
    """Stage two for every combination of comma-separated values; settings that have results are not fitted again."""
    config = configured(SweepConfig, locals(), values=_given_settings(locals()))
    from probsurgery.pipeline.analysis.runs import sweep_tables
    from probsurgery.pipeline.fitting.sweep import sweep
    from probsurgery.pipeline.store.cache import Cache

    with shown_progress("head-steps") as progress:
        result = sweep(config, progress)
    if as_json:
        print_json(asdict(result))
    else:
        print_tables(sweep_tables(result), titles=Cache(cache).titles)
        reused = result.heads - result.fitted - len(result.failures)
        counts = [f"{result.fitted:,} of {result.heads:,} heads fitted in {result.seconds:.1f} s"]
        counts += [f"{reused:,} were there already"] if reused else []
        counts += [f"{len(result.failures):,} failed"] if result.failures else []
        say(", ".join(counts))
    _raise_failures(result.failures)


def study_command(
    names: Annotated[
        list[str] | None, Argument(metavar="[NAME]...", help="Names of studies; without any, list them.")
    ] = None,
    cache: Annotated[Path | None, Option(help="Folder of the cache, such as cache/mini_ta.")] = None,
    seed: Seeds = "0,1,2",  # type: ignore[assignment]
    tasks: Tasks = SweepConfig.tasks,
    device: Device = SweepConfig.device,
    workers: Workers = SweepConfig.workers,
    tf32: Tf32 = SweepConfig.tf32,
    results: StoredResults = None,
    form: TableFormat = "text",
    as_json: JsonFormat = False,
) -> None:
    """The papers' analyses, each a sweep; settings that have results are not fitted again."""
    config = configured(SweepConfig, locals())
    from probsurgery.pipeline.analysis.study import STUDIES, study
    from probsurgery.pipeline.store.cache import Cache

    form = "json" if as_json else form
    if not names and form == "json":
        print_json({name: {"title": row.title, "paper": row.paper} for name, row in STUDIES.items()})
        return
    if not names:
        for name, row in STUDIES.items():
            say(f"{name:<10} {row.title}{f' ({row.paper})' if row.paper else ''}")
        return
    for name in names:
        if name not in STUDIES:
            raise unknown("study", name, STUDIES)
    if cache is None:
        raise InputError("a study needs a cache; give --cache, such as cache/mini_ta")
    studied = []
    for name in dict.fromkeys(names):
        with shown_progress("head-steps") as progress:
            studied.append(study(name, config, progress))
        note(f"{name}: {studied[-1].fitted:,} heads fitted")
    print_tables([result.table for result in studied], form, Cache(cache).titles)
    _raise_failures([failure for result in studied for failure in result.failures])


def _given_settings(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a command's parameters that are settings of some kind of head and were given."""
    names = {field.name for settings in HEAD_SETTINGS.values() for field in fields(settings)}
    return {name: value for name, value in parameters.items() if name in names and value is not None}


def _raise_failures(failures: Sequence[tuple[str, str]]) -> None:
    from probsurgery.pipeline.fitting.fit import failure_lines

    if failures:
        raise ProbsurgeryError("; ".join(failure_lines(failures)))
