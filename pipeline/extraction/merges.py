"""The merged models of a run: made by their methods, or taken from the cache that keeps what was learned.

What a learned merge comes to depends on the machine, to float noise, and takes minutes. So it is made once, under the
cache's lock, and kept with the cache: `merged.safetensors`, and the coefficients of AdaMerging as `coefficients.json`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from probsurgery.pipeline.config import ExtractConfig
from probsurgery.pipeline.datasets.tasks import Task
from probsurgery.pipeline.errors import DamagedCacheError, InputError, ProbsurgeryError, unknown
from probsurgery.pipeline.files import broken_seal, seal, write_atomically
from probsurgery.pipeline.merging.coefficients import read_coefficients
from probsurgery.pipeline.merging.entropy import window
from probsurgery.pipeline.merging.registry import METHODS, Coefficients, Merged, Samples, changed, merge
from probsurgery.pipeline.models.checkpoints import digest
from probsurgery.pipeline.models.sources import Weights
from probsurgery.pipeline.store.manifest import COEFFICIENTS, MERGED, learned_files, read_manifest
from probsurgery.pipeline.store.writer import CacheWriter


@dataclass(frozen=True)
class Request:
    """One merge that was asked for, and where its cache goes."""

    name: str
    """A method, or the path of a merged checkpoint."""
    path: Path
    about: dict
    """Method and settings, as kept in the identity; the digest of the result is known later."""
    coefficients: Coefficients | None = None
    """What is not to be learned."""

    @property
    def learns(self) -> bool:
        """Whether images are needed."""
        return self.name in METHODS and METHODS[self.name].learns and self.coefficients is None


@dataclass(frozen=True)
class MergedModel:
    """One merged model and where its cache goes."""

    name: str
    path: Path
    state: Mapping[str, Tensor]
    about: dict
    """Method, settings and digest, as kept in the identity."""
    record: dict = field(default_factory=dict)
    """What the manifest keeps of how it was made."""
    coefficients: Coefficients | None = None
    keep: bool = False
    """Whether the weights are to be kept with the cache, because to make them again would be to learn them again."""


def requests(config: ExtractConfig, tasks: Sequence[Task], *, whole_suite: bool) -> list[Request]:
    """The merges of a run. Raises `InputError` for an unknown one, or for settings that none of them takes."""
    for merge_name in config.merges:
        if merge_name not in METHODS and not Path(merge_name).is_file():
            raise InputError(
                f"unknown merge {merge_name!r}; choose from: {', '.join(METHODS)}, or the path of a merged checkpoint"
            )
    methods = [name for name in config.merges if name in METHODS]
    for setting in config.merge_args:
        if not any(setting in METHODS[name].settings for name in methods):
            known = [s for name in methods for s in METHODS[name].settings]
            raise unknown(
                f"setting of {', '.join(config.merges)}", setting, dict.fromkeys(known) or ["(there is none)"]
            )
    if config.name in METHODS:
        raise InputError(f"--name {config.name} is the name of a method; choose another")
    if config.name is not None and len(config.merges) - len(methods) != 1:
        raise InputError("--name names a merged checkpoint; give exactly one path with --merge")
    if config.coefficients is not None and sum(METHODS[n].takes_coefficients for n in methods) != 1:
        able = ", ".join(name for name, row in METHODS.items() if row.takes_coefficients)
        raise InputError(f"--coefficients are for one --merge of: {able}")
    asked = [_request(name, config, tasks, whole_suite) for name in config.merges]
    if len({request.path for request in asked}) < len(asked):
        raise InputError("two of the merges would go to one cache; rename one of the checkpoints")
    return asked


def _request(name: str, config: ExtractConfig, tasks: Sequence[Task], whole_suite: bool) -> Request:
    coefficients = None
    if name in METHODS:
        row = METHODS[name]
        given = {key: value for key, value in config.merge_args.items() if key in row.settings}
        settings = row.checked(name, given)
        if config.coefficients is not None and row.takes_coefficients:
            coefficients, settings = _given_coefficients(name, config.coefficients, given)
        label = name + "".join(f"-{key}{value}" for key, value in changed(name, settings).items())
        if coefficients is not None and "steps" not in settings:
            label += f"-{config.coefficients.stem}"
        about = {"method": name, "settings": settings}
    else:
        label = config.name or Path(name).stem
        about = {"method": "file", "settings": {}} | ({"name": config.name} if config.name else {})
    subset = "" if whole_suite else "_" + "+".join(task.name for task in tasks)
    subset += "" if config.corrupt is None else "-" + config.corrupt.replace(":", "")
    return Request(name, Path(config.out or Path(config.root) / f"{config.arch}_{label}{subset}"), about, coefficients)


def _given_coefficients(name: str, path: Path, given: dict) -> tuple[Coefficients, dict]:
    """Coefficients from a file, and the settings that they stand for: those they were learned with, if it says so."""
    row, coefficients = METHODS[name], read_coefficients(path)
    if coefficients.method not in (None, name):
        raise InputError(f"{path} has coefficients that were learned for {coefficients.method}, not {name}")
    layerwise = coefficients.values.ndim == 2
    if layerwise != row.function.keywords["layerwise"]:
        held = "a coefficient for each tensor" if layerwise else "one coefficient for each task"
        other = f"{'lw' if layerwise else 'tw'}{name[2:]}"
        raise InputError(f"{path} has {held}, which is not {name}; use --merge {other}")
    if "steps" in coefficients.settings:
        settings = row.checked(name, coefficients.settings)
        for key, value in given.items():
            if row.settings[key].check(key, value) != settings[key]:
                raise InputError(f"{path} was learned with {key}={settings[key]}; leave --merge-arg {key} out")
        return coefficients, settings
    idle = next((key for key in given if key != "keep"), None)
    if idle:
        raise InputError(f"--merge-arg {idle} would be of no effect: with --coefficients nothing is learned")
    known = {key: coefficients.settings[key] for key in ("keep",) if key in coefficients.settings}
    return coefficients, {key: value for key, value in row.checked(name, known | given).items() if key == "keep"}


def kept(request: Request, identity: dict, weights: Weights) -> MergedModel | None:
    """What an earlier run has learned for this identity, from the cache itself; None if it is not there, or damaged.

    Given coefficients are merged anew, which is cheap: the digest then tells whether they are the cache's.
    """
    if request.coefficients is not None:
        return None
    try:
        manifest = read_manifest(request.path)
    except (InputError, DamagedCacheError):
        return None
    about = manifest["identity"]["merge"]
    file, sealed = request.path / MERGED, learned_files(manifest).get(MERGED)
    if manifest["identity"] != identity | {"merge": about} or sealed is None or broken_seal(file, sealed):
        return None
    if {key: about.get(key) for key in request.about} != request.about:
        return None
    state = weights.load(file)
    if digest(state) != about.get("digest"):
        return None
    coefficients = None
    sealed = learned_files(manifest).get(COEFFICIENTS)
    if "coefficients" in manifest["merge"] and (not sealed or broken_seal(request.path / COEFFICIENTS, sealed)):
        by_task = manifest["merge"]["coefficients"]
        values = torch.tensor(list(by_task.values()))
        names = None if values.ndim == 1 else tuple(weights.names)
        coefficients = Coefficients(tuple(by_task), names, values, request.name, request.about["settings"])
    return MergedModel(request.name, request.path, state, about, coefficients=coefficients)


def is_blank(request: Request) -> bool:
    """Whether a cache of this learned merge was begun, and no feature of it written: what it learned may be gone.

    Learned again, it may come out different by float noise; as nothing depends on it yet, the cache is begun anew.
    """
    try:
        arrays = read_manifest(request.path)["arrays"] if request.learns else None
    except (InputError, DamagedCacheError):
        return False
    return arrays is not None and not any(
        shard for name, spec in arrays.items() if name.endswith("/merged") for shard in spec["shards"]
    )


def make(
    request: Request,
    weights: Weights,
    pretrained: dict[str, Tensor],
    tasks: Sequence[Task],
    samples: Callable[[], Samples],
) -> MergedModel:
    """Merge, or read the merged checkpoint. Raises `InputError` if the models or coefficients do not fit."""
    begun = time.perf_counter()
    if request.name not in METHODS:
        made = Merged(weights.merged(Path(request.name)))
    elif METHODS[request.name].function is None:
        made = Merged(weights.own(request.name))
    else:
        made = _merge(request, weights, pretrained, tasks, samples)
    course, record = made.about.get("entropy"), {}
    if request.learns:
        record["seconds"] = round(time.perf_counter() - begun, 1)
    if course:
        record["entropy"] = dict(zip(("first", "last"), window(course), strict=True))
    coefficients = made.about.get("coefficients")
    if coefficients is not None:
        names = tuple(task.name for task in tasks), tuple(pretrained)
        coefficients = coefficients.named(request.name, request.about["settings"], *names)
    about = request.about | {"digest": digest(made.state)}
    return MergedModel(request.name, request.path, made.state, about, record, coefficients, request.learns)


def _merge(
    request: Request,
    weights: Weights,
    pretrained: dict[str, Tensor],
    tasks: Sequence[Task],
    samples: Callable[[], Samples],
) -> Merged:
    given = samples() if request.learns else None
    try:
        return merge(
            request.name,
            pretrained,
            weights.experts(tasks),
            given,
            request.coefficients,
            **request.about["settings"],
        )
    except torch.OutOfMemoryError as error:
        raise ProbsurgeryError(
            f"{request.name} of {len(tasks)} experts does not fit into {given.device}'s memory "
            f"({str(error).partition('.')[0]}); use --device cpu, or fewer --tasks"
        ) from None


def keep(writer: CacheWriter, made: MergedModel) -> None:
    """Keep with a cache what was learned, and note how."""
    files = {}
    if made.keep:
        partial = writer.path / f"{MERGED}.partial"
        with writer.room():
            save_file({name: tensor.contiguous() for name, tensor in made.state.items()}, partial)
            partial.replace(writer.path / MERGED)
        files[MERGED] = seal(writer.path / MERGED)
    if made.coefficients is not None:
        about = made.coefficients.to_json()
        with writer.room():
            write_atomically(writer.path / COEFFICIENTS, json.dumps(about, indent=1) + "\n")
        files[COEFFICIENTS] = seal(writer.path / COEFFICIENTS)
    if files:
        record = writer.manifest.get("merge", {}) | made.record
        record["files"] = record.get("files", {}) | files
        if made.coefficients is not None:
            record["coefficients"] = about["coefficients"]
        writer.manifest["merge"] = record
        writer.save()
