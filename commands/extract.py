"""`extract`, stage one, and `merges`, the list of merging methods."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Option

from probsurgery.commands.options import AsJson, Device, Several, Whole, comma_list, configured, key_values
from probsurgery.commands.progress import shown_progress
from probsurgery.commands.render import note, print_json, rate_text, say
from probsurgery.pipeline.config import CACHES, DTYPES, PRECISIONS, STORES, SUITES, ExtractConfig, number_text
from probsurgery.pipeline.extraction.distributed import launched_rank

if TYPE_CHECKING:
    from probsurgery.pipeline.extraction.extract import Extraction

default = ExtractConfig  # whose class attributes are the options' defaults
Name = Annotated[str | None, Option(help="Name of the merged checkpoint in tables. [its file's name]")]

Data = Annotated[str | None, Option(help="Folder of data sets; layouts: docs/sources.md. [the published ones]")]
Workers = Annotated[int | None, Whole(help="Processes that decode images. [the number of cores]")]
Fresh = Annotated[bool, Option("--fresh", help="First delete the cache that exists, heads included.")]
SkipBad = Annotated[bool, Option("--skip-bad", help="Leave out images that cannot be decoded, and record which.")]
AnyRows = Annotated[bool, Option("--any-rows", help="Accept data sets of another size than the suite states.")]


def extract_command(
    arch: Annotated[
        str | None,
        Option(
            help="mini, vitb32, vitb16, vitl14, any model of open_clip, the path of a JSON configuration of one, or a "
            "folder or hf:NAME of a vision model of transformers. [the suite's]"
        ),
    ] = default.arch,
    merges: Annotated[
        list[str],
        Option(
            "--merge",
            help="A method of `probsurgery merges`, also with followers (ta+svc), or the path of a merged checkpoint; "
            "may be repeated.",
        ),
    ] = list(default.merges),  # noqa: B006
    merge_args: Annotated[
        list[str] | None,
        Option(
            "--merge-arg",
            metavar="KEY=VALUE",
            help="A setting, for the merges that have it (METHOD.KEY: for this part alone); may be repeated.",
        ),
    ] = None,
    coefficients: Annotated[
        Path | None, Option(help="Read AdaMerging's coefficients from this file instead of learning them.")
    ] = None,
    name: Name = default.name,
    suite: Annotated[
        str | None,
        Option(help=f"Tasks: {', '.join(SUITES)}, or a TOML file (docs/own-tasks.md). [the architecture's own]"),
    ] = default.suite,
    tasks: Annotated[Several | None, comma_list(str, "Tasks to merge and extract. [all of the suite]")] = default.tasks,
    only: Annotated[Several | None, comma_list(str, "Extract only these of the merged tasks. [all]")] = default.only,
    checkpoints: Annotated[
        str | None, Option(help="Folder of checkpoints; layouts: docs/sources.md. [the published ones]")
    ] = default.checkpoints,
    data: Data = default.data,
    split: Annotated[str, Option(help="test, train or both.")] = default.split,
    limit: Annotated[int | None, Whole(help="Take only the first N images of each task.")] = default.limit,
    store: Annotated[str, Option(help=" or ".join(STORES) + ".")] = default.store,
    dtype: Annotated[str, Option(help=f"Store features in {' or '.join(DTYPES)}.")] = default.dtype,
    precision: Annotated[str, Option(help=f"Run the encoders in {', '.join(PRECISIONS)}.")] = default.precision,
    batch_size: Annotated[int, Whole(help="Images in a batch.")] = default.batch_size,
    workers: Workers = default.workers,
    device: Device = default.device,
    root: Annotated[Path, Option(help="Folder for caches under their default names.")] = CACHES,
    out: Annotated[Path | None, Option(help="Write the cache to exactly this folder (one merge only).")] = None,
    pretrained: Annotated[bool, Option(help="Store the pre-trained encoder's features too.")] = default.pretrained,
    fresh: Fresh = default.fresh,
    skip_bad: SkipBad = default.skip_bad,
    corrupt: Annotated[
        str | None,
        Option(metavar="KIND[:1-5]", help="Corrupt every image first: noise, blur, contrast or jpeg. [none]"),
    ] = default.corrupt,
    any_rows: AnyRows = default.any_rows,
    as_json: AsJson = False,
) -> None:
    """Stage one: run the encoders over every image once and store the features."""
    config = configured(ExtractConfig, locals(), merge_args=key_values("--merge-arg", merge_args or []))
    from probsurgery.pipeline.extraction.extract import extract

    with shown_progress("images") as progress:
        result = extract(config, progress)
    if launched_rank()[0]:  # rank 0 reports for all ranks
        return
    for text in result.notes:
        note(text)
    if as_json:
        print_json(asdict(result))
    else:
        _print_result(result)


def _print_result(result: Extraction) -> None:
    encoding = sum(seconds for phase, seconds in result.seconds.items() if phase not in ("prepare", "merge"))
    if result.images:
        phases = ", ".join(f"{phase} {seconds:.1f} s" for phase, seconds in result.seconds.items())
        ranks = launched_rank()[1]
        rate = f"{rate_text(result.images / encoding)} images/s" if ranks == 1 else f"{ranks} ranks"
        note(f"{result.images:,} images, {rate} ({phases})")
    for name, rows in result.taken.items():
        share = f"{100 * rows / (result.passes + sum(result.taken.values())):.0f} %"
        note(f"{rows:,} forward passes saved ({share} of all): their features were in {name}")
    for path in result.caches:
        say(f"{path}: {'written' if result.images or result.taken else 'complete already, nothing to do'}")


def merges_command(as_json: AsJson = False) -> None:
    """The merging methods: description, publication, settings and their defaults."""
    from probsurgery.pipeline.merging.registry import METHODS

    if as_json:
        described = {}
        for name, method in METHODS.items():
            settings = {key: {"default": s.default, "about": s.description} for key, s in method.settings.items()}
            row = {"title": method.title, "paper": method.paper, "learns": method.learns, "follows": method.follows}
            described[name] = row | {"settings": settings}
        print_json(described)
        return
    for name, method in METHODS.items():
        kinds = ", learns from unlabelled images" if method.learns else ""
        kinds += f", follows a merge: ta+{name}" if method.follows else ""
        say(f"{name}: {method.title}{kinds}")
        say(f"  {method.paper}")
        for key, setting in method.settings.items():
            default = number_text(setting.default) if isinstance(setting.default, float) else str(setting.default)
            say(f"    {key + '=' + default:<20} {setting.description}")
