"""`cache ls|info|verify|convert|rm`: list, describe, check, convert and delete caches."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.filesize import decimal

from probsurgery.commands.options import AsJson
from probsurgery.commands.progress import shown_progress
from probsurgery.commands.render import counted, note, print_json, print_rows, say
from probsurgery.pipeline.config import CACHES, DTYPES, STORES
from probsurgery.pipeline.errors import InputError

if TYPE_CHECKING:
    from probsurgery.pipeline.store.cache import Cache
    from probsurgery.pipeline.store.maintenance import Listed

CacheArgument = Annotated[Path, typer.Argument(metavar="CACHE", help="Folder of the cache.")]


def list_command(
    root: Annotated[Path, typer.Argument(metavar="ROOT", help="Folder of caches, or one cache.")] = CACHES,
    as_json: AsJson = False,
) -> None:
    """List the caches in a folder."""
    from probsurgery.pipeline.store.maintenance import list_caches, size_of

    caches = list_caches(root)
    if as_json:
        print_json([_described(listed) for listed in caches])
        return
    if caches:
        columns = ("cache", "arch", "merge", "tasks", "rows", "store", "dtype", "size", "heads", "state")
        print_rows(columns, map(_list_row, caches))
    total = decimal(size_of(*(listed.path for listed in caches)))
    say(f"{counted(len(caches), 'cache')} in {root}, {total} on disk (shared files once)")


def _described(listed: Listed) -> dict[str, Any]:
    described: dict[str, Any] = {"path": str(listed.path), "bytes": listed.size}
    if listed.cache is None:
        return described | {"problem": listed.problem}
    from probsurgery.pipeline.merging.registry import merge_label

    manifest, identity, merge = listed.cache.manifest, listed.cache.identity, listed.cache.identity.merge
    return described | {
        "arch": identity.arch,
        "merge": merge_label(merge.method, merge.settings, merge.name),
        "tasks": identity.tasks,
        "rows": sum(split.rows for task in manifest.tasks.values() for split in task.splits.values()),
        "store": manifest.store,
        "dtype": identity.dtype,
        "missing": listed.missing,
        "heads": listed.heads,
        "content": listed.cache.content,
    }


def _list_row(listed: Listed) -> tuple[str, ...]:
    name, size = listed.path.name, decimal(listed.size)
    if listed.cache is None:
        return (name, *[""] * 6, size, "", listed.problem)
    cache = _described(listed)
    state = f"{cache['missing']} shards missing" if cache["missing"] else "complete"
    texts = (str(len(cache["tasks"])), f"{cache['rows']:,}", cache["store"], cache["dtype"], size, str(cache["heads"]))
    return (name, cache["arch"], cache["merge"], *texts, state)


def info_command(cache: CacheArgument, as_json: AsJson = False) -> None:
    """Describe a cache: contents, sources, completeness."""
    from probsurgery.pipeline.store.cache import Cache
    from probsurgery.pipeline.store.maintenance import size_of

    opened, size = Cache(cache), size_of(cache)
    if as_json:
        print_json(_info(opened, size))
        return
    for line in _info_lines(opened, size):
        say(line)
    columns = ("task", "split", "rows", "classes", "arrays", "size", "images from", "state")
    print_rows(columns, (_split_row(opened, *requested.split("/")) for requested in opened.manifest.requested))


def _info(cache: Cache, size: int) -> dict[str, Any]:
    manifest = cache.manifest.to_json()
    names = ("store", "created", "software", "identity", "requested", "tasks", "files", "merge", "runs", "precision")
    info = {"path": str(cache.path), "fingerprint": cache.fingerprint, "content": cache.content, "bytes": size}
    arrays = {}
    for name, spec in cache.manifest.arrays.items():
        counts = {"shards": len(spec.shards), "missing": len(spec.missing), "bytes": spec.size}
        arrays[name] = {"shape": spec.shape, "dtype": spec.dtype, **counts, "digest": spec.digest}
    return info | {name: manifest[name] for name in names if name in manifest} | {"arrays": arrays}


def _info_lines(cache: Cache, size: int) -> Iterator[str]:
    from probsurgery.pipeline.store.manifest import IMPORTED

    manifest, identity, merge = cache.manifest, cache.identity, cache.identity.merge
    settings = "".join(f" {name}={value}" for name, value in merge.settings.items())
    what = f"{identity.arch}, merged by {merge.name or merge.method}{settings}"
    if merge.method == IMPORTED:
        what = "imported features" + (f" of {identity.arch}" if identity.arch != IMPORTED else "")
    yield f"{cache.path}: {what}, d={cache.dim}"
    if manifest.merge.chosen:
        yield "chosen on images: " + ", ".join(f"{key}={value:g}" for key, value in manifest.merge.chosen.items())
    if identity.corruption:
        yield f"images corrupted by {identity.corruption}"
    encoded = f"; encoded in {identity.precision}" if identity.precision else ""
    yield f"stored in {manifest.store}, {identity.dtype}, {decimal(size)}{encoded}"
    yield f"identity {cache.fingerprint[:16]}, content {cache.content[:16]}"
    software = ", ".join(f"{name} {version}" for name, version in manifest.software.items())
    yield f"created {manifest.created} by {software}"
    if manifest.converted_from:
        yield f"converted from {manifest.converted_from.to_json()}"
    for name, file in manifest.files.items():
        yield f"  {name}: {file.source}, sha256 {file.sha256[:16]}"
    for run in manifest.runs:
        taken = "".join(f", {rows:,} taken from {name}" for name, rows in run.taken.items())
        passes = f"{run.passes:,} passes of " if run.passes else ""  # older caches do not count them
        yield f"  run on {run.device}: {passes}{run.images:,} images{taken}"


def _split_row(cache: Cache, split: str, task: str) -> tuple[str, ...]:
    record = cache.manifest.tasks.get(task)
    rows = record.splits[split].rows if record and split in record.splits else None
    origin = record.origins.get(split) if record else None
    arrays = {n.rpartition("/")[2]: s for n, s in cache.manifest.arrays.items() if n.startswith(f"{split}/{task}/")}
    missing, total = cache.missing_shards(task, split)
    return (
        task,
        split,
        "-" if rows is None else f"{rows:,}",
        str(record.classes) if record else "-",
        ", ".join(arrays),
        decimal(sum(spec.size for spec in arrays.values())),
        origin.source if origin else "-",
        "not begun" if not total else f"{missing} of {total} shards missing" if missing else "complete",
    )


def verify_command(
    cache: CacheArgument,
    repair: Annotated[
        bool, typer.Option("--repair", help="Drop damaged shards, so that the same extract fills them again.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Compare every array with the manifest; exit status 1 if anything is damaged, repaired or not."""
    from probsurgery.pipeline.store import maintenance
    from probsurgery.pipeline.store.cache import Cache

    opened, checks = Cache(cache), []
    for check in maintenance.repair(cache) if repair else maintenance.check(opened):
        checks.append(check)
        if not as_json:  # as the check goes on, which takes long
            state = "DAMAGED" if check.problems else f"{check.missing} missing" if check.missing else "ok"
            shape = " x ".join(map(str, check.shape))
            say(f"{check.name:<32} {shape:<12} {check.dtype:<8} {(check.digest or '-')[:16]:<16} {state}")
            for problem in check.problems:
                say(f"  {problem}")
    damage = [problem for check in checks for problem in check.problems]
    if as_json:
        arrays = {check.name: asdict(check) for check in checks}
        print_json({"path": cache, "content": opened.content, "damage": damage, "arrays": arrays})
    else:
        count = sum(check.shards > 0 for check in checks)
        shards = sum(check.shards - check.missing for check in checks)
        dropped = " and dropped; run the same `probsurgery extract` again to fill them" if repair and damage else ""
        counts = f"{count} arrays, {shards} shards checked, {len(damage)} damaged{dropped}"
        say(f"{cache}: {counts}; content {opened.content[:16]}")
    if damage:
        raise typer.Exit(1)


def convert_command(
    cache: CacheArgument,
    store: Annotated[str | None, typer.Option(help=f"{' or '.join(STORES)}. [unchanged]")] = None,
    dtype: Annotated[str | None, typer.Option(help=f"{' or '.join(DTYPES)}. [unchanged]")] = None,
    out: Annotated[Path | None, typer.Option(help="The new cache. [CACHE_STORE or CACHE_DTYPE beside it]")] = None,
    as_json: AsJson = False,
) -> None:
    """Write a copy of a cache in another store or type; the old one, with its heads and results, stays."""
    from probsurgery.pipeline.store.cache import Cache
    from probsurgery.pipeline.store.maintenance import convert

    with shown_progress("shards") as progress:
        path = convert(cache, store, dtype, out, progress)
    old, new = Cache(cache), Cache(path)
    same_values = old.identity.dtype == new.identity.dtype and old.content == new.content
    if as_json:
        print_json({"path": str(path), "content": new.content, "same_values": same_values})
    else:
        say(f"{path}: written, content {new.content[:16]}{', the same values' if same_values else ''}")


def remove_command(
    caches: Annotated[list[Path], typer.Argument(metavar="CACHE", help="Folders of the caches.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Delete caches with their heads and results; caches that share files with them stay whole."""
    from probsurgery.pipeline.store.maintenance import Listed, remove, require_removable, size_of

    caches = list(dict.fromkeys(caches))
    for path in caches:
        require_removable(path)
    for path in caches:
        if not yes:
            if not sys.stdin.isatty():
                raise InputError(f"there is no terminal to ask whether to delete {path}; give --yes to delete it")
            listed = Listed(path, size_of(path))
            heads = f", {counted(listed.heads, 'head')} and their results" if listed.heads else ""
            if not typer.confirm(f"delete {path} ({decimal(listed.size)}{heads})?", err=True):
                note(f"{path} is kept")
                continue
        remove(path)
        say(f"{path}: removed{', but for files in it that are no part of a cache' if path.exists() else ''}")
