"""Files of the Hugging Face Hub: fetched by its own client, and checked against the Hub's digests."""

import errno
import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path

from probsurgery.pipeline.errors import InputError, first_line
from probsurgery.pipeline.files import SourceFile
from probsurgery.pipeline.fingerprints import file_digest

WEIGHT_FILES = (
    "model.safetensors",
    "pytorch_model.bin",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
)
"""Names of the file with a model's weights in a repository, or with the names of several; the first that exists."""
ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")
"""What peft calls an adapter's weights."""
ADAPTER_CONFIG = "adapter_config.json"
PUBLISHED = (*WEIGHT_FILES[:2], ADAPTERS[0])
"""Names of a repository's weights that are asked for."""


def weights_in(path: Path) -> Path:
    """The file with a model's weights in its folder, or the file itself."""
    return next(filter(Path.is_file, (path / name for name in (*WEIGHT_FILES, *ADAPTERS))), path)


def download(repo: str, option: str, names: Sequence[str] = PUBLISHED) -> Path:
    """The first of these files that a repository has: its weights, if no names are given.

    It is from the client's cache or the network (`HF_HUB_OFFLINE`, `HF_ENDPOINT` apply).

    Raises `InputError` that says what is missing, where it was looked for, and how to give a local copy by `option`.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import RemoteEntryNotFoundError

    for name in names:
        try:
            return Path(hf_hub_download(repo, name))
        except Exception as error:  # the client raises its own, its transport's and the OS's errors
            problem = error
            if not isinstance(error, RemoteEntryNotFoundError):
                break
    raise InputError(explain(problem, repo, option, names=names)) from None


def explain(problem: Exception, repo: str, option: str, kind: str = "model", names: Sequence[str] = PUBLISHED) -> str:
    """One line on why a repository could not be fetched, and what to do about it."""
    from huggingface_hub import constants, errors

    fetch = f"hf download {repo}{' --repo-type dataset' if kind == 'dataset' else ''} --local-dir DIR/{repo}"
    elsewhere = f"or fetch it elsewhere with `{fetch}` and give {option} DIR"
    chain = _causes(problem)
    if storage := storage_problem(problem, f"the {kind} {repo}"):
        return storage
    not_found = type(problem).__name__ == "DatasetNotFoundError"  # the datasets library hides the client's error
    if any(isinstance(error, errors.GatedRepoError) for error in chain) or (not_found and "gated" in str(problem)):
        return f"the {kind} {repo} is gated: ask for access on its page and log in with `hf auth login`, {elsewhere}"
    if any(isinstance(error, errors.RepositoryNotFoundError) for error in chain) or not_found:
        return (
            f"there is no {kind} {repo} at {constants.ENDPOINT}, or it is private: log in with `hf auth login`, "
            f"or give {option} DIR"
        )
    if any(isinstance(error, errors.RemoteEntryNotFoundError) for error in chain):
        return f"the {kind} {repo} holds none of {', '.join(names)} ({first_line(problem)})"
    offline = " because HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else ""
    return (
        f"the {kind} {repo} is not in {constants.HF_HUB_CACHE} and could not be fetched from {constants.ENDPOINT}"
        f"{offline} ({first_line(problem)}); check the connection, {elsewhere}"
    )


def storage_problem(problem: BaseException, what: str) -> str | None:
    """One line on a folder of the Hugging Face libraries that cannot be written, if that is an error's cause.

    They write there when they read local files too.
    """
    from huggingface_hub import constants

    for error in _causes(problem):
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return f"no space left for {what}; free some in {constants.HF_HOME}, or point HF_HOME elsewhere"
        if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            place, home = Path(os.fsdecode(error.filename or constants.HF_HOME)), Path(constants.HF_HOME)
            if place.is_relative_to(home) or home.is_relative_to(place):
                return (
                    f"cannot write {place} for {what}: {error.strerror}; point HF_HOME to a folder that you can write"
                )
            return f"{place} cannot be read for {what}: {error.strerror}"
    return None


def _causes(problem: BaseException) -> list[BaseException]:
    chain = [problem]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and len(chain) < 10:
        chain.append(cause)
    return chain


def cached(repo: str, folder: Path) -> Path | None:
    """The weights of a repository in a folder with the layout of the client's cache, if they are there."""
    from huggingface_hub import try_to_load_from_cache

    paths = (try_to_load_from_cache(repo, name, cache_dir=folder) for name in (*WEIGHT_FILES, *ADAPTERS))
    return next((Path(path) for path in paths if isinstance(path, str)), None)


def checked_digest(path: Path) -> SourceFile:
    """Size and SHA-256 of a file, and whether the Hub's digest of it is known. Raises `InputError` if it differs."""
    sha256, expected = file_digest(path), _hub_digest(path)
    if expected is not None:
        actual = sha256 if len(expected) == 64 else _git_digest(path)
        if actual != expected:
            raise InputError(
                f"{path} is damaged: its digest is {actual[:12]}..., but the Hub's is {expected[:12]}...; "
                "delete it and fetch it again"
            )
    return SourceFile(bytes=path.stat().st_size, sha256=sha256, hub_digest="agrees" if expected else "unknown")


def _hub_digest(path: Path) -> str | None:
    """The Hub's digest: the client names files in its cache by it, and writes it next to files in a local folder."""
    metadata = path.parent / ".cache" / "huggingface" / "download" / f"{path.name}.metadata"
    candidates = [path.resolve().name] if path.resolve().parent.name == "blobs" else []
    if metadata.is_file():
        candidates += metadata.read_text(errors="replace").splitlines()[1:2]
    return next((c for c in candidates if re.fullmatch(r"[0-9a-f]{64}|[0-9a-f]{40}", c)), None)


def _git_digest(path: Path) -> str:
    """The digest of a file in git, and in the Hub for small files."""
    total = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            total.update(block)
    return total.hexdigest()
