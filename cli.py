"""The `probsurgery` command: parse, call a stage, render. No numerics; torch is imported inside the commands."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from probsurgery.pipeline.config import (
    DTYPES,
    HEAD_SETTINGS,
    LOSSES,
    PRECISIONS,
    STORES,
    ExtractConfig,
    FitConfig,
    ProbSettings,
    SurgerySettings,
    SweepConfig,
    head_settings,
    number_text,
)
from probsurgery.pipeline.errors import InputError, ProbsurgeryError, unknown
from probsurgery.pipeline.extraction.distributed import launched_rank

if TYPE_CHECKING:
    from probsurgery.pipeline.analysis.report import Report
    from probsurgery.pipeline.analysis.tables import Table
    from probsurgery.pipeline.fitting.sweep import SweepResult
    from probsurgery.pipeline.store.maintenance import Listed
    from probsurgery.pipeline.store.results import Spread

app = typer.Typer(
    help="Representation surgery for merged CLIP encoders: extract features once, fit heads in seconds.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
cache_app = typer.Typer(help="List, look into, check, convert and remove caches.", no_args_is_help=True)
app.add_typer(cache_app, name="cache")


@app.callback()
def _alone(context: typer.Context) -> None:
    if context.invoked_subcommand != "extract" and launched_rank()[1] > 1:
        if launched_rank()[0]:
            raise typer.Exit(InputError.exit_status)
        raise InputError(f"{context.invoked_subcommand} runs as one process; start it without torchrun")


_E = ExtractConfig(arch="mini")
_F = FitConfig(cache=Path())
_S = SweepConfig(cache=Path())
_JSON = typer.Option("--json", help="Print a machine-readable result on standard output.")
_CACHE = typer.Option("--cache", help="Folder of the cache, such as cache/mini_ta.")
_CACHE_ARGUMENT = typer.Argument(metavar="CACHE", help="Folder of the cache.")
_FORMAT = typer.Option("--format", help="text, markdown, latex, csv or json.")
_SAME_AS_JSON = typer.Option("--json", help="The same as --format json.")
# Options of `fit`, `sweep` and `study`.
_SHARED = typer.Option("--shared", help="One head for all tasks.")
_HOLDOUT = typer.Option(help="Share of the test rows kept from the fit to evaluate on.")
_FIT_SPLIT = typer.Option(help="Fit on test (the papers' protocol) or train images.")
_TASKS = typer.Option(help="Tasks to fit, a,b,... [all in the cache]")
_ONLINE = typer.Option("--online", help="See each row once, in order of arrival, one at a time.")
_DEVICE = typer.Option(help="auto, cpu, cuda or cuda:N.")
_WORKERS = typer.Option(help="Processes that train on a CPU; 0: this one. [by the amount of work]")
_TF32 = typer.Option("--tf32", help="Multiply in TF32 on CUDA: faster, less exact.")
_RESULTS = typer.Option(help="Keep heads and results here. [in the cache]")


def _names(text: str | None) -> tuple[str, ...] | None:
    """A comma list as a tuple; an empty one is kept, for the stage to refuse by name."""
    return None if text is None else tuple(name.strip() for name in text.split(",") if name.strip())


def _numbers(option: str, text: str | None, kind: type) -> tuple | None:
    """A comma list of whole numbers or of numbers; None if the option was not given."""
    if text is None:
        return None
    numbers = []
    for part in _names(text):
        try:
            numbers.append(kind(part))
        except ValueError:
            what = "whole numbers" if kind is int else "numbers"
            raise InputError(f"{option} has {part[:80]!r}; it takes {what}, separated by commas") from None
    return tuple(numbers)


def _pairs(option: str, texts: list[str] | None) -> dict[str, str]:
    """KEY=VALUE texts as a dictionary; dashes in keys are underscores."""
    pairs: dict[str, str] = {}
    for text in texts or ():
        key, found, value = text.partition("=")
        key = key.strip().replace("-", "_")
        if not found or not key or key in pairs:
            problem = "names a setting that was given before" if key in pairs else "is not KEY=VALUE"
            raise InputError(f"{option} {text[:80]!r} {problem}; write each setting once, such as scale=0.4")
        pairs[key] = value.strip()
    return pairs


@app.command("extract")
def extract_command(
    arch: Annotated[
        str, typer.Option(help="mini, vitb32, vitb16, vitl14, or a model of open_clip's with --checkpoints.")
    ],
    merge: Annotated[
        list[str] | None,
        typer.Option(
            help="A method of `probsurgery merges`, or the path of a merged checkpoint; may be repeated. [ta]"
        ),
    ] = None,
    merge_arg: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="A setting of the merges that have it; may be repeated."),
    ] = None,
    coefficients: Annotated[
        Path | None, typer.Option(help="AdaMerging's coefficients, from this file instead of learned.")
    ] = _E.coefficients,
    name: Annotated[str | None, typer.Option(help="What a merged checkpoint is called. [its file's name]")] = _E.name,
    tasks: Annotated[str | None, typer.Option(help="Tasks to merge and extract, a,b,... [all of the suite]")] = None,
    only: Annotated[str | None, typer.Option(help="Those of the merged tasks to extract now, a,b,...")] = None,
    checkpoints: Annotated[
        str | None, typer.Option(help="Folder of checkpoints; layouts: docs/sources.md. [the published ones]")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Folder of data sets; layouts: docs/sources.md. [the published ones]")
    ] = None,
    split: Annotated[str, typer.Option(help="test, train or both.")] = _E.split,
    limit: Annotated[int | None, typer.Option(help="Take the first N images of each task.")] = _E.limit,
    store: Annotated[str, typer.Option(help=" or ".join(STORES) + ".")] = _E.store,
    dtype: Annotated[str, typer.Option(help="Features are kept in " + " or ".join(DTYPES) + ".")] = _E.dtype,
    precision: Annotated[str, typer.Option(help="Encoders compute in " + ", ".join(PRECISIONS) + ".")] = _E.precision,
    batch_size: Annotated[int, typer.Option(help="Images in a batch.")] = _E.batch_size,
    workers: Annotated[int | None, typer.Option(help="Processes that decode images. [the cores]")] = _E.workers,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = _E.device,
    root: Annotated[Path, typer.Option(help="Folder in which caches get their default names.")] = _E.root,
    out: Annotated[Path | None, typer.Option(help="Exactly this cache (one merge only).")] = _E.out,
    pretrained: Annotated[
        bool, typer.Option("--pretrained/--no-pretrained", help="Keep the pre-trained encoder's features too.")
    ] = _E.pretrained,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Delete the cache that is there, heads included, first.")
    ] = False,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave out images that cannot be decoded, and record which.")
    ] = _E.skip_bad,
    corrupt: Annotated[
        str | None,
        typer.Option(metavar="KIND[:1-5]", help="Corrupt every image first: noise, blur, contrast or jpeg. [none]"),
    ] = _E.corrupt,
    any_rows: Annotated[
        bool, typer.Option("--any-rows", help="Take data sets of another size than the papers'.")
    ] = _E.any_rows,
    as_json: Annotated[bool, _JSON] = False,
) -> None:
    """Stage one: run the encoders over every image once and keep the features."""
    config = ExtractConfig(
        arch=arch,
        merges=tuple(merge) if merge else _E.merges,
        merge_args=_pairs("--merge-arg", merge_arg),
        coefficients=coefficients,
        name=name,
        tasks=_names(tasks),
        only=_names(only),
        checkpoints=checkpoints,
        data=data,
        split=split,
        limit=limit,
        store=store,
        dtype=dtype,
        precision=precision,
        batch_size=batch_size,
        workers=workers,
        device=device,
        root=root,
        out=out,
        pretrained=pretrained,
        fresh=fresh,
        skip_bad=skip_bad,
        corrupt=corrupt,
        any_rows=any_rows,
    )
    from probsurgery.pipeline.extraction.extract import extract

    with _progress("images") as progress:
        result = extract(config, progress)
    if launched_rank()[0]:  # rank 0 speaks for all
        return
    for note in result.notes:
        _note(note)
    if as_json:
        _print_json(asdict(result) | {"caches": [str(path) for path in result.caches]})
        return
    busy = sum(seconds for phase, seconds in result.seconds.items() if phase not in ("prepare", "merge"))
    if result.images:
        phases = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in result.seconds.items())
        rate = f"{result.images / busy:,.0f} images/s" if launched_rank()[1] == 1 else f"{launched_rank()[1]} ranks"
        _note(f"{result.images:,} images, {rate} ({phases})")
    for name, rows in result.taken.items():
        share = f"{100 * rows / (result.passes + sum(result.taken.values())):.0f} %"
        _note(f"{rows:,} forward passes saved ({share} of all): their features were in {name}")
    for path in result.caches:
        print(f"{path}: {'written' if result.images or result.taken else 'complete already, nothing to do'}")


@app.command("merges")
def merges_command(as_json: Annotated[bool, _JSON] = False) -> None:
    """The merging methods: what each is, where it was published, its settings and their defaults."""
    from probsurgery.pipeline.merging.registry import METHODS

    if as_json:
        rows = {
            name: {
                "title": row.title,
                "paper": row.paper,
                "learns": row.learns,
                "settings": {key: {"default": s.default, "about": s.about} for key, s in row.settings.items()},
            }
            for name, row in METHODS.items()
        }
        _print_json(rows)
        return
    for name, row in METHODS.items():
        needs = ", learns from unlabelled images" if row.learns else ""
        print(f"{name}: {row.title}{needs}\n  {row.paper}")
        for key, setting in row.settings.items():
            print(f"    {key + '=' + _value(setting.default):<20} {setting.about}")


@app.command("fit")
def fit_command(
    cache: Annotated[Path, _CACHE],
    head: Annotated[str, typer.Option(help="Kind of head: " + ", ".join(HEAD_SETTINGS) + ".")] = "prob",
    hidden: Annotated[int | None, typer.Option(help=f"prob: width h. [{ProbSettings.hidden}]")] = None,
    rank: Annotated[int | None, typer.Option(help=f"surgery: rank r. [{SurgerySettings.rank}]")] = None,
    kl_weight: Annotated[float | None, typer.Option(help=f"prob: KL weight. [{ProbSettings.kl_weight:g}]")] = None,
    samples: Annotated[
        int | None, typer.Option(help=f"prob: draws in a step; 0: no noise. [{ProbSettings.samples}]")
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(help=f"Updates for each task. [prob {ProbSettings.steps}, surgery {SurgerySettings.steps}]"),
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help=f"Rows in a step. [{ProbSettings.batch_size}]")] = None,
    lr: Annotated[float | None, typer.Option(help=f"Adam's learning rate. [{ProbSettings.lr:g}]")] = None,
    loss: Annotated[str | None, typer.Option(help=f"{', '.join(LOSSES)}. [{ProbSettings.loss}]")] = None,
    penalty: Annotated[float | None, typer.Option(help="ridge: penalty. [by leave-one-out, without labels]")] = None,
    shared: Annotated[bool, _SHARED] = _F.shared,
    fraction: Annotated[float, typer.Option(help="Share of the rows that the fit may see.")] = _F.fraction,
    holdout: Annotated[float, _HOLDOUT] = _F.holdout,
    fit_split: Annotated[str, _FIT_SPLIT] = _F.fit_split,
    online: Annotated[bool, _ONLINE] = _F.online,
    seed: Annotated[int, typer.Option(help="Seed of row order, noise and starting weights.")] = _F.seed,
    tasks: Annotated[str | None, _TASKS] = None,
    device: Annotated[str, _DEVICE] = _F.device,
    workers: Annotated[int | None, _WORKERS] = _F.workers,
    tf32: Annotated[bool, _TF32] = _F.tf32,
    name: Annotated[str | None, typer.Option(help="Name of the head's folder. [from the settings]")] = _F.name,
    results: Annotated[Path | None, _RESULTS] = _F.results,
    as_json: Annotated[bool, _JSON] = False,
) -> None:
    """Stage two: fit a head for each task on the cached features."""
    settings = head_settings(
        head,
        hidden=hidden,
        rank=rank,
        kl_weight=kl_weight,
        samples=samples,
        steps=steps,
        batch_size=batch_size,
        lr=lr,
        loss=loss,
        penalty=penalty,
    )
    config = FitConfig(
        cache=cache,
        head=settings,
        tasks=_names(tasks),
        shared=shared,
        fraction=fraction,
        holdout=holdout,
        fit_split=fit_split,
        online=online,
        seed=seed,
        device=device,
        workers=workers,
        tf32=tf32,
        name=name,
        results=results,
    )
    from probsurgery.pipeline.fitting.fit import fit

    with _progress("head-steps") as progress:
        result = fit(config, progress)
    if as_json:
        _print_json({"path": str(result.path), "repeated": result.repeated, "results": result.rows})
        return
    if result.repeated:
        _note(f"{result.path} is there already, with the same settings; nothing to do")
    _print_fit(result.path, result.rows)


@app.command("sweep")
def sweep_command(
    cache: Annotated[Path, _CACHE],
    head: Annotated[str, typer.Option(help="Kinds of head, a,b,...: " + ", ".join(HEAD_SETTINGS) + ".")] = "prob",
    hidden: Annotated[str | None, typer.Option(help="prob: widths h, such as 32,64,128.")] = None,
    rank: Annotated[str | None, typer.Option(help="surgery: ranks r.")] = None,
    kl_weight: Annotated[str | None, typer.Option(help="prob: KL weights.")] = None,
    samples: Annotated[str | None, typer.Option(help="prob: draws in a step.")] = None,
    steps: Annotated[str | None, typer.Option(help="Updates for each task.")] = None,
    batch_size: Annotated[str | None, typer.Option(help="Rows in a step.")] = None,
    lr: Annotated[str | None, typer.Option(help="Adam's learning rates.")] = None,
    loss: Annotated[str | None, typer.Option(help=f"Losses: {', '.join(LOSSES)}.")] = None,
    penalty: Annotated[str | None, typer.Option(help="ridge: penalties.")] = None,
    fraction: Annotated[str, typer.Option(help="Shares of the rows that the fit may see.")] = "1",
    seed: Annotated[str, typer.Option(help="Seeds; figures are means and standard deviations over them.")] = "0",
    shared: Annotated[bool, _SHARED] = _S.shared,
    holdout: Annotated[float, _HOLDOUT] = _S.holdout,
    fit_split: Annotated[str, _FIT_SPLIT] = _S.fit_split,
    online: Annotated[bool, _ONLINE] = _S.online,
    tasks: Annotated[str | None, _TASKS] = None,
    device: Annotated[str, _DEVICE] = _S.device,
    workers: Annotated[int | None, _WORKERS] = _S.workers,
    tf32: Annotated[bool, _TF32] = _S.tf32,
    results: Annotated[Path | None, _RESULTS] = _S.results,
    keep_heads: Annotated[
        bool, typer.Option("--keep-heads", help="Keep the heads too, and not their results alone.")
    ] = _S.keep_heads,
    as_json: Annotated[bool, _JSON] = False,
) -> None:
    """Stage two for every combination of comma-separated values; what was fitted before is not fitted again."""
    given = {
        "hidden": _numbers("--hidden", hidden, int),
        "rank": _numbers("--rank", rank, int),
        "kl_weight": _numbers("--kl-weight", kl_weight, float),
        "samples": _numbers("--samples", samples, int),
        "steps": _numbers("--steps", steps, int),
        "batch_size": _numbers("--batch-size", batch_size, int),
        "lr": _numbers("--lr", lr, float),
        "loss": _names(loss),
        "penalty": _numbers("--penalty", penalty, float),
    }
    config = SweepConfig(
        cache=cache,
        head=_names(head),
        values={name: values for name, values in given.items() if values is not None},
        fraction=_numbers("--fraction", fraction, float),
        seed=_numbers("--seed", seed, int),
        tasks=_names(tasks),
        shared=shared,
        holdout=holdout,
        fit_split=fit_split,
        online=online,
        device=device,
        workers=workers,
        tf32=tf32,
        results=results,
        keep_heads=keep_heads,
    )
    from probsurgery.pipeline.fitting.fit import failure_lines
    from probsurgery.pipeline.fitting.sweep import sweep

    with _progress("head-steps") as progress:
        result = sweep(config, progress)
    if as_json:
        _print_json(asdict(result))
    else:
        _print_sweep(result)
    if result.failures:
        raise ProbsurgeryError("; ".join(failure_lines(result.failures)))


@app.command("study")
def study_command(
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME]...", help="Studies; none lists them.")] = None,
    cache: Annotated[Path | None, _CACHE] = None,
    seed: Annotated[str, typer.Option(help="Seeds; figures are means and standard deviations over them.")] = "0,1,2",
    tasks: Annotated[str | None, _TASKS] = None,
    device: Annotated[str, _DEVICE] = _S.device,
    workers: Annotated[int | None, _WORKERS] = _S.workers,
    tf32: Annotated[bool, _TF32] = _S.tf32,
    results: Annotated[Path | None, _RESULTS] = _S.results,
    form: Annotated[str, _FORMAT] = "text",
    as_json: Annotated[bool, _SAME_AS_JSON] = False,
) -> None:
    """The papers' analyses, each a sweep of its own: what was fitted before is not fitted again."""
    from probsurgery.pipeline.analysis.study import STUDIES, study

    form = _checked_format("json" if as_json else form)
    if not names:
        if form == "json":
            _print_json({name: {"title": row.title, "paper": row.paper} for name, row in STUDIES.items()})
            return
        for name, row in STUDIES.items():
            print(f"{name:<10} {row.title}{f' ({row.paper})' if row.paper else ''}")
        return
    for name in names:
        if name not in STUDIES:
            raise unknown("study", name, STUDIES)
    if cache is None:
        raise InputError("a study needs a cache; give --cache, such as cache/mini_ta")
    base = SweepConfig(
        cache=cache,
        seed=_numbers("--seed", seed, int),
        tasks=_names(tasks),
        device=device,
        workers=workers,
        tf32=tf32,
        results=results,
    )
    from probsurgery.pipeline.fitting.fit import failure_lines

    found = []
    for name in dict.fromkeys(names):
        with _progress("head-steps") as progress:
            found.append(study(name, base, progress))
        _note(f"{name}: {found[-1].fitted:,} heads fitted")
    _print_tables([one.table for one in found], form)
    failures = [failure for one in found for failure in one.failures]
    if failures:
        raise ProbsurgeryError("; ".join(failure_lines(failures)))


@app.command("report")
def report_command(
    cache: Annotated[list[Path], typer.Option("--cache", help="Folder of a cache; may be repeated.")],
    results: Annotated[Path | None, typer.Option(help="Where heads and results were kept. [in the cache]")] = None,
    with_published: Annotated[
        bool, typer.Option("--published", help="Add the figures published for this architecture, with differences.")
    ] = False,
    everything: Annotated[
        bool, typer.Option("--all", help="A line for every setting of every sweep, too. [kept heads and defaults]")
    ] = False,
    uncertain: Annotated[
        bool, typer.Option("--uncertainty", help="Add what kept ProbSurgery heads say of their own certainty.")
    ] = False,
    plots: Annotated[Path | None, typer.Option(help="Write figures here, as PNG and SVG.")] = None,
    page: Annotated[Path | None, typer.Option("--html", help="Write one page with all of it here.")] = None,
    tsne: Annotated[bool, typer.Option("--tsne", help="Project features by t-SNE. [PCA]")] = False,
    form: Annotated[str, _FORMAT] = "text",
    as_json: Annotated[bool, _SAME_AS_JSON] = False,
) -> None:
    """Tables of the results kept with caches: accuracy, bias, what heads cost, and sweeps."""
    from probsurgery.pipeline.analysis.published import published
    from probsurgery.pipeline.analysis.report import report

    form = _checked_format("json" if as_json else form)
    reports = report(cache, results, with_published=with_published, everything=everything)
    for arch in dict.fromkeys(one.arch for one in reports):
        if with_published and not published(arch):
            _note(f"no figures were published for {arch}")
    if plots is not None:
        from probsurgery.pipeline.analysis.figures import draw, prepare

        prepare(plots)
    if page is not None:
        from probsurgery.pipeline.analysis.page import check_page, write_page

        check_page(page)
    hidden = sum(one.others for one in reports)
    if hidden and not everything:
        _note(f"{hidden:,} more settings of sweeps are summed up against what varies; --all gives each a line")
    from probsurgery.pipeline.analysis.projection import projection
    from probsurgery.pipeline.analysis.uncertainty import uncertainties, uncertainty_table
    from probsurgery.pipeline.store.cache import Cache

    opened = [Cache(path) for path in cache] if uncertain or plots or page else []
    found = [one for its in opened for one in uncertainties(its, results)]
    if uncertain and not found:
        _note("no ProbSurgery head is kept with these caches; `probsurgery fit` keeps one")
    certainty = [uncertainty_table(one) for one in found] if uncertain else []
    figures = plots is not None or page is not None
    method = "t-SNE" if tsne else "PCA"
    projections = [made for its in opened if figures and (made := projection(its, results, method))]
    if plots is not None:
        for one in draw(reports, plots, found, projections):
            _note(f"{one.path} and .svg")
    if page is not None:
        write_page(page, reports, found, projections)
        _note(f"{page}: written")
    if form == "json":
        ours = [_report_as_json(one) for one in reports]
        _print_json(ours + [{"uncertainty": table.to_json()} for table in certainty])
    else:
        _print_tables([table for one in reports for table in one.tables] + certainty, form)


def _report_as_json(one: Report) -> dict:
    about = {name: getattr(one, name) for name in ("caches", "arch", "merges", "protocol", "tasks")}
    tables = {name: getattr(one, name).to_json() for name in ("accuracy", "bias", "costs")}
    return about | tables | {"curves": [table.to_json() for table in one.tables[3:]]}


@app.command("transfer")
def transfer_command(
    cache: Annotated[Path, _CACHE],
    on: Annotated[
        list[Path] | None, typer.Option("--on", help="Another cache, of corrupted images say; may be repeated.")
    ] = None,
    results: Annotated[Path | None, typer.Option(help="Where heads were kept. [in the cache]")] = None,
    form: Annotated[str, _FORMAT] = "text",
    as_json: Annotated[bool, _SAME_AS_JSON] = False,
) -> None:
    """How kept heads do on tasks, and on caches, that they were not fitted on."""
    from probsurgery.pipeline.analysis.transfer import transfer

    form = _checked_format("json" if as_json else form)
    _print_tables(transfer(cache, on or (), results), form)


_HEAD = typer.Option("--head", help="Name of a head that is kept with the cache, or its folder.")
_CHECKPOINTS = typer.Option(help="Folder of checkpoints, as for extract. [the published ones]")
_MERGED = typer.Option(help="The merged checkpoint that the cache is of, if it was made elsewhere.")


@app.command("predict")
def predict_command(
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Image files.")],
    cache: Annotated[Path, _CACHE],
    head: Annotated[str, _HEAD],
    task: Annotated[str, typer.Option(help="Task whose classes to choose from.")],
    checkpoints: Annotated[str | None, _CHECKPOINTS] = None,
    merged: Annotated[Path | None, _MERGED] = None,
    results: Annotated[Path | None, typer.Option(help="Where heads were kept. [in the cache]")] = None,
    top: Annotated[int, typer.Option(min=1, help="Classes to name.")] = 3,
    device: Annotated[str, _DEVICE] = _F.device,
    as_json: Annotated[bool, _JSON] = False,
) -> None:
    """Classify images with the merged encoder and a head of the cache."""
    from probsurgery.pipeline.deploy.model import assemble, predict
    from probsurgery.pipeline.device import choose_device

    where = choose_device(device)
    model = assemble(cache, head, checkpoints, merged, results)
    found = predict(model, task, images, where, top)
    if as_json:
        _print_json([asdict(one) for one in found])
        return
    for one in found:
        sigma = "" if one.sigma is None else f"; sigma {one.sigma:.3f}"
        print(_plain(f"{one.image}: {', '.join(f'{name} {100 * p:.1f} %' for name, p in one.classes)}{sigma}"))


@app.command("export")
def export_command(
    cache: Annotated[Path, _CACHE],
    head: Annotated[str, _HEAD],
    out: Annotated[Path, typer.Option(help="The new folder.")],
    checkpoints: Annotated[str | None, _CHECKPOINTS] = None,
    merged: Annotated[Path | None, _MERGED] = None,
    results: Annotated[Path | None, typer.Option(help="Where heads were kept. [in the cache]")] = None,
    onnx: Annotated[bool, typer.Option("--onnx", help="Write TASK.onnx for each task too, and check it.")] = False,
    as_json: Annotated[bool, _JSON] = False,
) -> None:
    """Write merged weights, heads, classifiers and preprocessing to a folder that `probsurgery.load_model` reads."""
    from probsurgery.pipeline.deploy.model import FILES, assemble
    from probsurgery.pipeline.deploy.onnx_export import require_onnx, write_onnx

    if out.exists():  # before the merging
        raise InputError(f"{out} exists; choose another --out, or delete it")
    if onnx:
        require_onnx()
    model = assemble(cache, head, checkpoints, merged, results)
    with _progress("tasks") as progress:
        model.save(out, lambda folder: write_onnx(model, folder, progress) if onnx else None)
    if as_json:
        files = ["model.json", *FILES] + [f"{task}.onnx" for task in model.tasks if onnx]
        _print_json({"path": str(out), "tasks": list(model.tasks), "files": files})
        return
    print(f"{out}: written, {len(model.tasks)} tasks; probsurgery.load_model({str(out)!r}) reads it")


@cache_app.command("ls")
def cache_ls(
    root: Annotated[Path, typer.Argument(metavar="ROOT", help="Folder of caches, or one cache.")] = _E.root,
    as_json: Annotated[bool, _JSON] = False,
) -> None:
    """The caches in a folder."""
    from probsurgery.pipeline.store.maintenance import list_caches, size_of

    found = list_caches(root)
    if as_json:
        _print_json([_listed(one) for one in found])
        return
    table = _table(["cache", "arch", "merge", "tasks", "rows", "store", "dtype", "size", "heads", "state"])
    for one in found:
        about = _listed(one)
        if one.cache is None:
            table.add_row(_plain(one.path.name), *[""] * 6, _size(one.size), "", _plain(one.problem))
            continue
        state = "complete" if not about["missing"] else f"{about['missing']} shards missing"
        figures = (str(len(about["tasks"])), f"{about['rows']:,}", about["store"], about["dtype"], _size(one.size))
        names = map(_plain, (one.path.name, about["arch"], about["merge"]))
        table.add_row(*names, *figures, str(about["heads"]), state)
    if found:
        _console().print(table)
    shared = size_of(*(one.path for one in found))
    print(f"{len(found)} cache{'s' * (len(found) != 1)} in {root}, {_size(shared)} on disk (shared files once)")


def _listed(one: Listed) -> dict:
    about = {"path": str(one.path), "bytes": one.size}
    if one.cache is None:
        return about | {"problem": one.problem}
    manifest, identity = one.cache.manifest, one.cache.identity
    rows = sum(data["rows"] for task in manifest["tasks"].values() for data in task["splits"].values())
    from probsurgery.pipeline.merging.registry import label

    about |= {"arch": identity["arch"], "merge": label(identity["merge"]), "tasks": identity["tasks"], "rows": rows}
    about |= {"store": manifest["store"], "dtype": identity["dtype"], "missing": one.missing, "heads": one.heads}
    return about | {"content": one.cache.content}


@cache_app.command("info")
def cache_info(cache: Annotated[Path, _CACHE_ARGUMENT], as_json: Annotated[bool, _JSON] = False) -> None:
    """What a cache holds, what it was made from, and what is complete."""
    from probsurgery.pipeline.store.cache import Cache
    from probsurgery.pipeline.store.maintenance import size_of
    from probsurgery.pipeline.store.manifest import array_digest

    opened = Cache(cache)
    manifest, identity = opened.manifest, opened.identity
    if as_json:
        kept = ("store", "created", "software", "identity", "requested", "tasks", "files", "merge", "runs", "precision")
        about = {"path": str(cache), "fingerprint": opened.fingerprint, "content": opened.content}
        about |= {"bytes": size_of(cache)} | {name: manifest[name] for name in kept if name in manifest}
        about["arrays"] = {
            name: {
                "shape": spec["shape"],
                "dtype": spec["dtype"],
                "shards": len(spec["shards"]),
                "missing": spec["shards"].count(None),
                "bytes": sum(sealed["bytes"] for sealed in spec["shards"] if sealed),
                "digest": array_digest(spec),
            }
            for name, spec in manifest["arrays"].items()
        }
        _print_json(about)
        return
    merge = identity["merge"]
    settings = "".join(f" {name}={value}" for name, value in merge["settings"].items())
    lines = [
        f"{cache}: {identity['arch']}, merged by {merge.get('name') or merge['method']}{settings}, d={opened.dim}",
        *([f"images corrupted by {identity['corruption']}"] if "corruption" in identity else []),
        f"kept in {manifest['store']}, {identity['dtype']}, {_size(size_of(cache))}; encoded in "
        f"{identity.get('precision')}",
        f"identity {opened.fingerprint[:16]}, content {opened.content[:16]}",
        f"made {manifest.get('created')} by "
        + ", ".join(f"{name} {number}" for name, number in manifest.get("software", {}).items()),
    ]
    if "converted_from" in manifest:
        lines.append(f"converted from {manifest['converted_from']}")
    for name, file in manifest.get("files", {}).items():
        lines.append(f"  {name}: {file.get('source')}, sha256 {str(file.get('sha256'))[:16]}")
    for run in manifest.get("runs", []):
        taken = "".join(f", {rows:,} taken from {name}" for name, rows in run.get("taken", {}).items())
        passes = f"{run['passes']:,} passes of " if "passes" in run else ""
        lines.append(f"  run on {run.get('device')}: {passes}{run['images']:,} images{taken}")
    for line in lines:
        print(_plain(line))
    table = _table(["task", "split", "rows", "classes", "arrays", "size", "images from", "state"])
    for requested in manifest["requested"]:
        split, task = requested.split("/")
        about = manifest["tasks"].get(task, {})
        arrays = {name: spec for name, spec in manifest["arrays"].items() if name.startswith(f"{requested}/")}
        missing, total = opened.missing_shards(task, split)
        size = sum(sealed["bytes"] for spec in arrays.values() for sealed in spec["shards"] if sealed)
        table.add_row(
            task,
            split,
            f"{about['splits'][split]['rows']:,}" if split in about.get("splits", {}) else "-",
            str(about.get("classes", "-")),
            ", ".join(name.rpartition("/")[2] for name in arrays),
            _size(size),
            _plain(str(about.get("origins", {}).get(split, {}).get("source", "-"))),
            "not begun" if not total else f"{missing} of {total} shards missing" if missing else "complete",
        )
    _console().print(table)


@cache_app.command("verify")
def cache_verify(
    cache: Annotated[Path, _CACHE_ARGUMENT],
    repair: Annotated[
        bool, typer.Option("--repair", help="Drop what is bad, so that the same extract fills it again.")
    ] = False,
    as_json: Annotated[bool, _JSON] = False,
) -> None:
    """Read everything and compare it with the manifest; exit status 1 if anything is damaged, repaired or not."""
    from probsurgery.pipeline.store import maintenance
    from probsurgery.pipeline.store.cache import Cache

    opened = Cache(cache)
    damaged = shards = 0
    checks = []
    for one in maintenance.repair(cache) if repair else maintenance.check(opened):
        checks.append(one)
        shards += one.shards - one.missing
        damaged += len(one.problems)
        if as_json:
            continue
        state = "DAMAGED" if one.problems else f"{one.missing} missing" if one.missing else "ok"
        shape = " x ".join(map(str, one.shape))
        print(f"{one.name:<32} {shape:<12} {one.dtype:<8} {(one.digest or '-')[:16]:<16} {state}")
        for problem in one.problems:
            print(f"  {problem}")
    if as_json:
        found = [problem for one in checks for problem in one.problems]
        arrays = {one.name: asdict(one) for one in checks}
        _print_json({"path": str(cache), "content": opened.content, "damage": found, "arrays": arrays})
    else:
        again = "; run the same `probsurgery extract` again to fill them" if damaged else ""
        what = f"{damaged} damaged" + (f" and dropped{again}" if repair and damaged else "")
        arrays = sum(1 for one in checks if one.shards)
        print(f"{cache}: {arrays} arrays, {shards} shards checked, {what}; content {opened.content[:16]}")
    if damaged:
        raise typer.Exit(1)


@cache_app.command("convert")
def cache_convert(
    cache: Annotated[Path, _CACHE_ARGUMENT],
    store: Annotated[str | None, typer.Option(help=" or ".join(STORES) + ". [as it is]")] = None,
    dtype: Annotated[str | None, typer.Option(help=" or ".join(DTYPES) + ". [as it is]")] = None,
    out: Annotated[Path | None, typer.Option(help="The new cache. [CACHE_STORE or CACHE_DTYPE beside it]")] = None,
    as_json: Annotated[bool, _JSON] = False,
) -> None:
    """Write a cache anew in another store or type; the old one, its heads and its results stay."""
    from probsurgery.pipeline.store.cache import Cache
    from probsurgery.pipeline.store.maintenance import convert

    with _progress("shards") as progress:
        path = convert(cache, store, dtype, out, progress)
    old, new = Cache(cache), Cache(path)
    same = old.identity["dtype"] == new.identity["dtype"] and old.content == new.content
    if as_json:
        _print_json({"path": str(path), "content": new.content, "same_values": same})
        return
    print(f"{path}: written, content {new.content[:16]}{', the same values' if same else ''}")


@cache_app.command("rm")
def cache_rm(
    caches: Annotated[list[Path], typer.Argument(metavar="CACHE", help="Folders of the caches.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Delete caches, with their heads and results; other caches that share files with one keep theirs."""
    from probsurgery.pipeline.store.maintenance import Listed, removable, remove, size_of

    caches = list(dict.fromkeys(caches))
    for path in caches:
        removable(path)
    for path in caches:
        one = Listed(path, size_of(path))
        heads = f", {one.heads} head{'s' * (one.heads != 1)} and their results" if one.heads else ""
        if not yes:
            if not sys.stdin.isatty():
                raise InputError(f"there is no terminal to ask whether to delete {path}; give --yes to delete it")
            if not typer.confirm(f"delete {path} ({_size(one.size)}{heads})?", err=True):
                _note(f"{path} is kept")
                continue
        remove(path)
        print(f"{path}: removed{', but for files in it that are no part of a cache' if path.exists() else ''}")


# Rendering


def _note(text: str) -> None:
    print(text, file=sys.stderr)


def _size(count: int) -> str:
    from rich.filesize import decimal

    return decimal(count)


def _plain(text: str) -> str:
    """Text from a file that may be someone else's, without what a terminal would obey."""
    return "".join(c if c.isprintable() else "?" for c in text)


def _print_json(value: object) -> None:
    print(json.dumps(value, indent=1, default=str))


def _console():
    from rich.console import Console

    # A pipe has no width: give tables what they need instead of wrapping them at 80.
    shape = {} if sys.stdout.isatty() else {"width": 200, "force_terminal": False}
    return Console(markup=False, emoji=False, **shape)  # a name may look like markup


def _table(columns: list[str]):
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for index, column in enumerate(columns):
        # A narrow terminal folds long names; it cuts nothing off.
        table.add_column(column, justify="right" if index else "left", overflow="fold")
    return table


def _print_fit(path: Path, rows: list[dict]) -> None:
    from statistics import fmean

    from probsurgery.pipeline.analysis.report import cost

    one = rows[0]
    table = _table(["task", "merged", "with head", "expert", "bias before", "after"])
    figures = [
        (
            *(100 * row["accuracy"][kind] for kind in ("merged", "head", "individual")),
            *(row["bias"][when] for when in ("before", "after")),
        )
        for row in rows
    ]
    averages = tuple(map(fmean, zip(*figures, strict=True)))
    for task, (merged, head, expert, before, after) in zip(
        [*(row["task"] for row in rows), "average"], [*figures, averages], strict=True
    ):
        table.add_row(task, f"{merged:.1f}", f"{head:.1f}", f"{expert:.1f}", f"{before:.3f}", f"{after:.3f}")
    print(f"{path} ({one['protocol']})")
    _console().print(table)
    took = cost(rows)
    heads = 1 if one["shared"] else len(rows)
    print(f"{heads} head{'s' * (heads > 1)}, {took.parameters:,} parameters each, {took.seconds:.1f} s of training")


def _print_sweep(result: SweepResult) -> None:
    console = _console()
    tasks = result.tasks
    what = "; mean and standard deviation over seeds" if result.seeds > 1 else ""
    print(f"Accuracy in % ({result.cache}: {result.protocol}){what}")
    table = _table(["", *tasks, "Avg", "bias"])
    for kind, values in result.baselines.items():
        average = sum(values.values()) / len(tasks) if len(values) == len(tasks) else None
        figures = [*(values.get(task) for task in tasks), average]
        table.add_row(kind, *("-" if value is None else f"{value:.1f}" for value in figures), "")
    for line in result.lines:
        figures = [*(line.accuracy.get(task) for task in tasks), line.average_accuracy]
        bias = _spread(line.average_bias, ".4f")
        incomplete = f" ({line.seeds} of {result.seeds} seeds)" if line.seeds < result.seeds else ""
        table.add_row(_setting_label(line.setting) + incomplete, *(_spread(figure, ".1f") for figure in figures), bias)
    console.print(table)
    if len(result.varied) == 2 and all(len(line.setting) == 2 for line in result.lines):
        for title, name, form in (("Average accuracy", "average_accuracy", ".1f"), ("Bias", "average_bias", ".4f")):
            _print_grid(title, result, name, form)
    there = result.heads - result.fitted - len(result.failures)
    notes = [f"{result.fitted:,} of {result.heads:,} heads fitted in {result.seconds:.1f} s"]
    notes += [f"{there:,} were there already"] if there else []
    notes += [f"{len(result.failures):,} failed"] if result.failures else []
    print(", ".join(notes))


def _print_grid(title: str, result: SweepResult, figure: str, form: str) -> None:
    """Two settings that vary: one down, one across."""
    (down, rows), (across, columns) = result.varied.items()
    found = {(line.setting.get(down), line.setting.get(across)): getattr(line, figure) for line in result.lines}
    table = _table([f"{_option(down)} \\ {_option(across)}", *map(_value, columns)])
    for row in rows:
        table.add_row(_value(row), *(_spread(found.get((row, column)), form) for column in columns))
    print(title)
    _console().print(table)


def _setting_label(setting: dict[str, object]) -> str:
    return " ".join(f"{_option(name)} {_value(value)}" for name, value in setting.items()) or "with head"


def _option(name: str) -> str:
    return name.replace("_", "-")


def _value(value: object) -> str:
    return number_text(value) if isinstance(value, float) else str(value)


def _spread(figure: Spread | None, form: str) -> str:
    from probsurgery.pipeline.analysis.tables import spread_text

    return "-" if figure is None else spread_text(figure, form)


def _checked_format(form: str) -> str:
    from probsurgery.pipeline.analysis.tables import FORMATS

    known = ("text", *FORMATS, "json")
    if form not in known:
        raise unknown("format", form, known)
    return form


def _print_tables(tables: Sequence[Table], form: str) -> None:
    from probsurgery.pipeline.analysis.tables import FORMATS

    if form == "json":
        _print_json([table.to_json() for table in tables])
    elif form in FORMATS:
        print(FORMATS[form](tables), end="")
    else:
        for table in tables:
            _print_table(table)


def _print_table(table: Table) -> None:
    from rich.text import Text

    shown = _table([table.first, *table.columns])
    for line in table.lines:
        cells = [Text(table.text(line, c), "bold" if table.is_best(line, c) else "") for c in table.columns]
        shown.add_row(_plain(line.label), *cells)
    print(table.title)
    _console().print(shown)
    for note in table.notes:
        print(note)


@contextmanager
def _progress(unit: str) -> Iterator[Callable[..., None]]:
    """A bar with a rate and an ETA on a terminal; elsewhere a plain line now and then. Both on standard error."""
    if launched_rank()[0]:  # rank 0 shows what all have done
        yield lambda *_, **__: None
        return
    if not sys.stderr.isatty():
        yield _plain_progress(unit)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (BarColumn(16), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.description}"), console=console, transient=True) as bar:
        task = bar.add_task("", total=None, rate="", unit=unit)

        def show(done: int, total: int, what: str = "", unit: str = unit) -> None:
            nonlocal task
            if unit != bar.tasks[0].fields["unit"]:  # other work, with a rate of its own
                bar.remove_task(task)
                task = bar.add_task("", total=None, rate="", unit=unit)
            speed = bar.tasks[0].speed
            rate = f"{speed:,.0f} {unit}/s" if speed else ""
            # What does not fit is cut here, and not from the numbers before it.
            room = max(0, console.width - 16 - 2 * len(f"{total:,}") - len(rate) - 14)
            bar.update(task, completed=done, total=total, description=what[:room], rate=rate)

        yield show


def _plain_progress(unit: str, every: float = 10.0) -> Callable[..., None]:
    begun, already, last, of = 0.0, 0, 0.0, ""

    def show(done: int, total: int, what: str = "", unit: str = unit) -> None:
        nonlocal begun, already, last, of
        now = time.monotonic()
        if unit != of:
            begun, already, last, of = now, done, now - every + 1, unit
        if now - last < every:
            return
        last = now
        rate = (done - already) / (now - begun)
        speed = f", {rate:,.0f}/s, {(total - done) / rate:,.0f} s left" if rate else ""
        _note(f"{what + ': ' if what else ''}{done:,} of {total:,} {unit}{speed}")

    return show


def main(arguments: list[str] | None = None) -> None:
    """Run the command; every error becomes one line on standard error and an exit status."""
    # A stream that was closed before the start is None.
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))  # noqa: SIM115
    with suppress(AttributeError):  # a terminal or file that cannot show a character gets a question mark
        sys.stdout.reconfigure(errors="replace")
    with suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGTERM, _terminate)
    for variable in ("HF_HUB_VERBOSITY", "DATASETS_VERBOSITY"):  # retries are no news; what fails in the end is said
        os.environ.setdefault(variable, "error")
    try:
        status = app(arguments, prog_name="probsurgery", standalone_mode=False) or 0
    except ProbsurgeryError as error:
        status = _fail(str(error), error.exit_status)
    except PermissionError as error:
        status = _fail(f"no permission: {error.filename or error}", InputError.exit_status)
    except BrokenPipeError:
        # The reader of our output has gone; Python would complain of that at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    except OSError as error:
        what = str(error.filename or "system")
        wrong_path = error.errno in (errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR)
        status = _fail(f"{what[:80]}: {error.strerror or error}", 2 if wrong_path else 1)
    except MemoryError:
        status = _fail("out of memory; use a smaller --batch-size or fewer --tasks", 1)
    except KeyboardInterrupt:
        warnings.simplefilter("ignore")  # libraries complain of what was cut short
        status = 130
    except Exception as error:
        # Typer's usage errors have no public base class; they all say their message so.
        if not hasattr(error, "format_message"):
            raise
        status = 2
        if type(error).__name__ == "NoArgsIsHelpError":
            _note(error.format_message())
        else:
            _fail(error.format_message(), status)
    if status == 130:
        _note("interrupted; nothing is half-written, and the same command may be run again (extract and sweep go on)")
    sys.exit(status if isinstance(status, int) else 0)


def _terminate(*_: object) -> None:
    """Batch systems end a job with SIGTERM: clean up as after Ctrl-C, and leave in silence."""
    warnings.simplefilter("ignore")
    sys.exit(128 + signal.SIGTERM)


def _fail(message: str, status: int) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return status
