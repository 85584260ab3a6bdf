"""The manifest of a cache: what the cache holds, how it was made, and a seal for each of its files.

docs/cache-format.md describes it. A shard counts only when the manifest, replaced atomically after it, has its seal.
The manifest carries a digest of its own; that finds damage, and not forgery, so its form is checked before anything in
it is used: no name leads out of the cache's folder, and no size is larger than the files bear out.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import math
import os
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

from probsurgery.pipeline.config import DTYPES, SPLITS, fingerprint
from probsurgery.pipeline.errors import DamagedCacheError, InputError
from probsurgery.pipeline.files import refuse_links, write_atomically
from probsurgery.pipeline.store.formats import BACKENDS, part_shape, shard_count

SCHEMA = 1
MERGED, COEFFICIENTS = "merged.safetensors", "coefficients.json"
"""Files that keep what a merge has learned."""
KINDS = ("merged", "expert", "pretrained")
MOST_BYTES = 2**28
"""Of a manifest; a cache of the papers' eight tasks has some 100 KB."""
_MOST_DIM, _MOST_ROWS = 2**16, 2**40
_TASK = r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,99}"
_ARRAY = re.compile(rf"(?:({'|'.join(SPLITS)})/({_TASK})/({'|'.join(KINDS)}|labels)|classifiers/({_TASK}))")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_METADATA = re.compile(rf"features\.h5|features\.zarr/(?:{_TASK}/){{0,3}}zarr\.json")


def new_manifest(identity: dict, store: str) -> dict:
    """The manifest of a cache that holds nothing yet."""
    return {
        "schema": SCHEMA,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "software": software(),
        "store": store,
        "identity": identity,
        "requested": [],
        "tasks": {},
        "arrays": {},
        "metadata": {},
    }


def software() -> dict[str, str]:
    """Versions of what a cache's numbers depend on."""
    found = {}
    for name in ("probsurgery", "torch", "open_clip_torch", "zarr", "h5py", "numpy", "pillow"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def values_digest(values: np.ndarray) -> str:
    """SHA-256 of an array's values.

    It has its own because what describes an array, its byte order say, lies outside the shard; and it is the same in
    every store.
    """
    return hashlib.sha256(np.ascontiguousarray(values).data).hexdigest()


def learned_files(manifest: dict) -> dict[str, dict]:
    """Seals of the files that keep what the merge has learned, if it has."""
    return manifest.get("merge", {}).get("files", {})


def is_features(name: str) -> bool:
    """Whether an array is of features, which have the cache's type, and not of labels or a classifier."""
    return name.count("/") == 2 and name.endswith(KINDS)


def array_digest(spec: dict) -> str | None:
    """Digest of an array's shape, type and values, whatever store it is in; None if a shard is missing."""
    if None in spec["shards"]:
        return None
    return fingerprint([spec["shape"], spec["dtype"], [shard["values"] for shard in spec["shards"]]])


def content_digest(manifest: dict) -> str:
    """Digest of everything that a cache holds, whatever store it is in."""
    return fingerprint({name: array_digest(spec) for name, spec in manifest["arrays"].items()})


def write_manifest(path: Path, manifest: dict) -> None:
    """Replace a cache's manifest, with a digest of itself."""
    sealed = manifest | {"digest": fingerprint(manifest)}
    write_atomically(path / "manifest.json", json.dumps(sealed, indent=1) + "\n")


def read_manifest(path: Path) -> dict:
    """The manifest of the cache at `path`, its form checked.

    Raises `InputError` if there is no cache, one of a newer schema or one that holds links, and `DamagedCacheError` if
    the manifest is not as it was written.
    """
    file = path / "manifest.json"
    if os.path.lexists(file):  # else it is any folder, and may be a large one
        refuse_links(path)
    try:
        if file.stat().st_size > MOST_BYTES:
            raise DamagedCacheError(f"{file} has more than {MOST_BYTES:,} bytes; it is not a cache's manifest")
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        what = "is not a cache (it has no manifest.json)" if path.exists() else "does not exist"
        raise InputError(f"{path} {what}; `probsurgery extract` writes one") from None
    except NotADirectoryError:
        raise InputError(f"{path} is not a cache; `probsurgery extract` writes one") from None
    except (ValueError, RecursionError) as error:
        raise DamagedCacheError(f"{file} is not valid JSON ({error}); delete the folder and extract again") from None
    schema = manifest.get("schema") if isinstance(manifest, dict) else None
    if type(schema) is not int:
        raise InputError(f"{file} is not a cache's manifest")
    if schema > SCHEMA:
        raise InputError(
            f"{path} was written by a newer version (schema {schema}, this one reads up to {SCHEMA}); "
            "update probsurgery"
        )
    if "identity" not in manifest:
        raise InputError(f"{file} is not a cache's manifest")
    if manifest.pop("digest", None) != fingerprint(manifest):
        raise DamagedCacheError(f"{file} was changed since it was written (its digest differs); extract with --fresh")
    manifest.setdefault("metadata", {})  # which the first caches did not have
    check_form(manifest, file)
    return manifest


def check_form(manifest: dict, file: Path) -> None:
    """Raise `DamagedCacheError` unless a manifest has the form that docs/cache-format.md describes."""
    try:
        _check(manifest)
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        what = f"{type(error).__name__}: {error}" if not isinstance(error, _FormError) else str(error)
        raise DamagedCacheError(
            f"{file} does not have a manifest's form ({what[:200]}); do not use this cache, and extract it anew"
        ) from None


class _FormError(ValueError):
    pass


def _need(holds: bool, what: str) -> None:
    if not holds:
        raise _FormError(what)


def _whole(value: object, most: float = math.inf) -> bool:
    return type(value) is int and 0 <= value <= most


def _check(manifest: dict) -> None:
    identity, store = manifest["identity"], manifest["store"]
    _need(store in BACKENDS, "its store is unknown")
    _need(_whole(identity["dim"], _MOST_DIM) and identity["dim"] > 0, "its dim is no width")
    _need(identity["dtype"] in DTYPES, "its dtype is unknown")
    names = identity["tasks"]
    _need(
        isinstance(names, list) and all(isinstance(n, str) and re.fullmatch(_TASK, n) for n in names),
        "its tasks are no plain names",
    )
    _need(len(set(names)) == len(names), "it names a task twice")
    merge = identity["merge"]
    _need(isinstance(merge["method"], str) and isinstance(merge["settings"], dict), "its merge is not described")
    _need(isinstance(merge.get("name", ""), str), "its merge is not described")
    _need(isinstance(identity["checkpoints"], dict) and isinstance(identity["arch"], str), "its models are not named")
    for requested in manifest["requested"]:
        split, _, task = requested.partition("/")
        _need(split in SPLITS and task in names, "it asks for a task that it does not merge")
    for task, about in manifest["tasks"].items():
        _need(task in names, "it describes a task that it does not merge")
        _need(_whole(about["classes"]) and isinstance(about["classifier"], str), f"it garbles the classes of {task}")
        origins = about.get("origins", {}).values()
        _need(all(isinstance(origin, dict) for origin in origins), f"it garbles where {task} is from")
        for split, data in about["splits"].items():
            skipped = data.get("skipped", {})
            _need(split in SPLITS and _whole(data["rows"], _MOST_ROWS), f"it garbles the rows of {task}")
            _need(isinstance(skipped, dict), f"it garbles what {task} leaves out")
            _need(all(r.isdecimal() and int(r) < data["rows"] for r in skipped), f"it garbles what {task} leaves out")
    for name, spec in manifest["arrays"].items():
        _check_array(name, spec, manifest)
    for name, sealed in manifest["metadata"].items():
        _need(re.fullmatch(_METADATA, name) is not None, "it seals a file that is none of its own")
        _check_seal(name, sealed, 0)
    _check_provenance(manifest)


def _check_provenance(manifest: dict) -> None:
    """What is only shown, and may be missing."""
    files, runs = manifest.get("files", {}), manifest.get("runs", [])
    _need(all(isinstance(file, dict) for file in files.values()), "it garbles the files that it is made from")
    _need(isinstance(manifest.get("software", {}), dict), "it garbles the versions that it was made by")
    _need(isinstance(manifest.get("converted_from", {}), dict), "it garbles what it was converted from")
    kept = manifest.get("merge", {})
    _need(learned_files(manifest).keys() <= {MERGED, COEFFICIENTS}, "it garbles what was learned")
    for name, sealed in learned_files(manifest).items():
        _check_seal(name, sealed, 0)
    rows = [row if isinstance(row, list) else [row] for row in kept.get("coefficients", {}).values()]
    _need(len(set(map(len, rows))) <= 1, "it garbles the coefficients of its merge")
    _need(all(isinstance(number, int | float) for row in rows for number in row), "it garbles what was learned")
    numbers = manifest.get("precision", {}).values()
    _need(all(isinstance(number, int | float) for number in numbers), "it garbles the precision")
    _need(isinstance(runs, list), "it garbles its runs")
    for run in runs:
        counts = (run["images"], run.get("passes", 0), *run.get("taken", {}).values())
        _need(all(map(_whole, counts)), "it garbles its runs")


def _check_array(name: str, spec: dict, manifest: dict) -> None:
    found = _ARRAY.fullmatch(name)
    _need(found is not None, "it names an array that no cache has")
    split, task, kind, classifier = found.groups()
    identity, shape = manifest["identity"], spec["shape"]
    _need((task or classifier) in identity["tasks"], "it holds a task that it does not merge")
    _need(all(_whole(n, _MOST_ROWS) for n in shape) and bool(shape) and shape[0] > 0, f"the shape of {name} is none")
    if kind == "labels":
        dtype, rest = "int64", []
    else:
        dtype, rest = ("float32" if classifier else identity["dtype"]), [identity["dim"]]
    _need(spec["dtype"] == dtype and shape[1:] == rest, f"{name} has another type or width than its kind")
    about = manifest["tasks"].get(task, {}).get("splits", {}).get(split)
    _need(about is None or shape[0] == about["rows"], f"{name} has another number of rows than its task")
    shards = spec["shards"]
    _need(isinstance(shards, list) and len(shards) == shard_count(shape[0]), f"{name} has another number of shards")
    for part, sealed in enumerate(shards):
        if sealed is not None:
            _check_seal(name, sealed, np.dtype(dtype).itemsize * math.prod(part_shape(spec, part)))
            _need(_DIGEST.fullmatch(sealed["values"]) is not None, f"a seal of {name} has no digest of its values")


def _check_seal(name: str, sealed: dict, least: int) -> None:
    _need(_whole(sealed["bytes"]) and sealed["bytes"] >= least, f"a file of {name} is smaller than what it should hold")
    _need(_DIGEST.fullmatch(sealed["sha256"]) is not None, f"a seal of {name} has no digest")
