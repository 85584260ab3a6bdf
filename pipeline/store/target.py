"""The folder where a cache is to go: what is there, whether this run may add to it, and removing it."""

import os
import shutil
from contextlib import suppress
from pathlib import Path

from msgspec.structs import replace

from probsurgery.pipeline.errors import DamagedCacheError, InputError
from probsurgery.pipeline.files import refuse_links
from probsurgery.pipeline.fingerprints import differences
from probsurgery.pipeline.store import manifest as manifests
from probsurgery.pipeline.store import results
from probsurgery.pipeline.store.claims import CLAIMS
from probsurgery.pipeline.store.lock import LOCK, OWNER, require_writable
from probsurgery.pipeline.store.manifest import COEFFICIENTS, MERGED, Identity, Manifest, read_manifest

JOURNAL = "journal"
FEATURES = (manifests.FILE, "features.h5", "features.zarr", "shards", JOURNAL, MERGED, COEFFICIENTS)
HEADS = ("heads", results.FILE)
OWN = (*FEATURES, *HEADS, LOCK, OWNER, CLAIMS)
"""Names in a cache's folder that are no user's."""


def check_target(path: Path, identity: Identity, store: str, *, fresh: bool = False) -> Manifest | None:
    """The manifest of the cache at `path` if this identity can be added to it; None if a new one is to begin there.

    Changes nothing. Raises `InputError` if a cache of another identity or store is there (with the difference;
    `fresh` is to replace it), if the folder holds something else, or if it cannot be written. The merge's digest is not
    compared where the identity has none yet.
    """
    refuse_own_files(path, "--root or --out")
    require_writable(path, "--root or --out")
    if not path.exists():
        return None
    if not (path / manifests.FILE).exists():
        first = min((p.name for p in path.iterdir()), default=None)
        if first and not is_remains(path):
            raise InputError(f"{path} exists and is not a cache (it holds {first}); choose another --out")
        refuse_links(path)
        return None
    if fresh:
        with suppress(DamagedCacheError):  # a damaged one may be replaced, another program's may not
            read_manifest(path)
        return None
    manifest = read_manifest(path)
    held = manifest.identity
    if identity.merge.digest is None:
        held = replace(held, merge=replace(held.merge, digest=None))
    differ = differences(held.to_json(), identity.to_json())
    if manifest.store != store:
        differ.insert(0, f"store: {manifest.store} / {store}")
    if differ:
        listed = "; ".join(differ[:3]) + (f" (and {len(differ) - 3} more)" if len(differ) > 3 else "")
        advice = "choose another --out, or replace it with --fresh"
        raise InputError(f"{path} was written with other settings (there / asked): {listed}; {advice}")
    return manifest


def refuse_own_files(path: Path, option: str) -> None:
    """Raise `InputError` if an output would take the place of a cache's own files, or lie among them."""
    place = Path(os.path.realpath(path))
    for folder in place.parents:
        name = place.relative_to(folder).parts[0].lower().removesuffix(".partial")
        if name in OWN and any((folder / kept).exists() for kept in (manifests.FILE, results.FILE)):
            raise InputError(f"{path} is among the files of the cache {folder}; choose another place with {option}")


def is_remains(path: Path) -> bool:
    """Whether a folder is what a kill left of a cache: its files without a manifest, and its lock, which is empty.

    Other programs' files may have some of these names, but not all of them and nothing else.
    """
    lock = path / LOCK
    known = all(p.name.removesuffix(".partial") in OWN for p in path.iterdir())
    return known and not (path / manifests.FILE).exists() and lock.is_file() and not lock.stat().st_size


def remove_features(path: Path, *, heads: bool) -> None:
    """Remove a cache's heads, then its manifest, then its features: a kill leaves a cache or remains of one."""
    for name in (HEADS if heads else ()) + FEATURES:
        if (path / name).is_dir() and not (path / name).is_symlink():
            shutil.rmtree(path / name)
        else:
            (path / name).unlink(missing_ok=True)
