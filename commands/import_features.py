"""`import` of features that were made elsewhere."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from probsurgery.commands.options import AsJson
from probsurgery.commands.progress import shown_progress
from probsurgery.commands.render import counted, print_json, say
from probsurgery.pipeline.config import DTYPES, STORES


def import_command(
    folder: Annotated[Path, Argument(metavar="FOLDER", help="Has TASK/merged.npy and expert.npy: docs/own-tasks.md.")],
    out: Annotated[Path, Option(help="The new cache.")],
    name: Annotated[str, Option(help="Name of the encoder in tables.")] = "imported",
    store: Annotated[str, Option(help=" or ".join(STORES) + ".")] = STORES[0],
    dtype: Annotated[str, Option(help=f"Store features in {' or '.join(DTYPES)}.")] = DTYPES[0],
    plain_features: Annotated[
        bool, Option("--plain-features", help="Classifiers take features as they are. [L2-normalised]")
    ] = False,
    fresh: Annotated[bool, Option("--fresh", help="First delete the cache that exists, heads included.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write features from files to a cache, for fit and all commands after it."""
    from probsurgery.pipeline.models.feature_files import read_folder
    from probsurgery.pipeline.store.cache import Cache
    from probsurgery.pipeline.store.imports import write_features

    with shown_progress("arrays") as progress:
        tasks = read_folder(folder, plain_features=plain_features)
        path = write_features(out, tasks, name=name, store=store, dtype=dtype, fresh=fresh, progress=progress)
    cache = Cache(path)
    rows = sum(split.rows for task in cache.manifest.tasks.values() for split in task.splits.values())
    if as_json:
        print_json({"path": str(path), "tasks": list(tasks), "rows": rows, "content": cache.content})
    else:
        say(f"{path}: written, {counted(len(tasks), 'task')}, {rows:,} rows, d={cache.dim}")
