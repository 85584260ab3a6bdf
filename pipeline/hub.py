"""Files of the Hugging Face Hub: fetched by its own client, checked against the digests it gives."""

from __future__ import annotations

import errno
import hashlib
import re
from pathlib import Path

from probsurgery.pipeline.errors import InputError, first_line
from probsurgery.pipeline.fingerprints import file_digest

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin", "open_clip_model.safetensors", "open_clip_pytorch_model.bin")
"""Names under which a repository keeps a model's weights; the first that is there counts."""


def download(repo: str, option: str) -> Path:
    """The weights of a repository, from the client's cache or the network (its offline switch and `HF_ENDPOINT` count).

    Raises `InputError` that says what is missing, where it was looked for, and how to bring it from elsewhere; `option`
    is what takes a local copy.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    for name in WEIGHT_FILES[:2]:
        try:
            return Path(hf_hub_download(repo, name))
        except LocalEntryNotFoundError as error:  # one of the next kind, but about the connection
            problem: Exception = error
            break
        except EntryNotFoundError as error:
            problem = error
        except Exception as error:  # the client raises its own, its transport's and the OS's errors
            problem = error
            break
    raise InputError(explain(problem, repo, option)) from None


def explain(problem: Exception, repo: str, option: str, kind: str = "model") -> str:
    """One line on why a repository could not be had, and what to do about it."""
    from huggingface_hub import constants, errors

    fetch = f"hf download {repo}{' --repo-type dataset' if kind == 'dataset' else ''} --local-dir DIR/{repo}"
    elsewhere = f"or fetch it elsewhere with `{fetch}` and give {option} DIR"
    chain = [problem]
    while (chain[-1].__cause__ or chain[-1].__context__) is not None and len(chain) < 10:
        chain.append(chain[-1].__cause__ or chain[-1].__context__)
    if any(isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT) for error in chain):
        return f"no space left for the {kind} {repo}; free some in {constants.HF_HOME}, or point HF_HOME elsewhere"
    unfound = type(problem).__name__ == "DatasetNotFoundError"  # the datasets library hides what it was told
    if any(isinstance(error, errors.GatedRepoError) for error in chain) or (unfound and "gated" in str(problem)):
        return f"the {kind} {repo} is gated: ask for access on its page and log in with `hf auth login`, {elsewhere}"
    if any(isinstance(error, errors.RepositoryNotFoundError) for error in chain) or unfound:
        return (
            f"there is no {kind} {repo} at {constants.ENDPOINT}, or it is private: log in with `hf auth login`, "
            f"or give {option} DIR"
        )
    if any(isinstance(error, errors.RemoteEntryNotFoundError) for error in chain):
        return f"the {kind} {repo} holds none of {', '.join(WEIGHT_FILES[:2])} ({first_line(problem)})"
    offline = " because HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else ""
    return (
        f"the {kind} {repo} is not in {constants.HF_HUB_CACHE} and could not be fetched from {constants.ENDPOINT}"
        f"{offline} ({first_line(problem)}); check the connection, {elsewhere}"
    )


def cached(repo: str, folder: Path) -> Path | None:
    """The weights of a repository in a folder that has the layout of the client's cache."""
    from huggingface_hub import try_to_load_from_cache

    for name in WEIGHT_FILES:
        found = try_to_load_from_cache(repo, name, cache_dir=folder)
        if isinstance(found, str):
            return Path(found)
    return None


def checked_digest(path: Path) -> dict:
    """Size and SHA-256 of a file, and whether the Hub's own digest of it is known and agrees.

    The client names a file in its cache by that digest, and notes it beside a file in a local folder. Raises
    `InputError` if it differs.
    """
    sha256, known = file_digest(path), _known_digest(path)
    if known is not None:
        held = sha256 if len(known) == 64 else _git_digest(path)
        if held != known:
            raise InputError(
                f"{path} is damaged: its digest is {held[:12]}..., but the Hub's is {known[:12]}...; "
                "delete it and fetch it again"
            )
    return {"bytes": path.stat().st_size, "sha256": sha256, "hub_digest": "agrees" if known else "unknown"}


def _known_digest(path: Path) -> str | None:
    note = path.parent / ".cache" / "huggingface" / "download" / f"{path.name}.metadata"
    candidates = [path.resolve().name] if path.resolve().parent.name == "blobs" else []
    if note.is_file():
        candidates += note.read_text(errors="replace").splitlines()[1:2]
    return next((c for c in candidates if re.fullmatch(r"[0-9a-f]{64}|[0-9a-f]{40}", c)), None)


def _git_digest(path: Path) -> str:
    """What git, and the Hub for small files, calls a file's digest."""
    total = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            total.update(block)
    return total.hexdigest()
