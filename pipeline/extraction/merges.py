"""The merged models of a run: made by their methods, or read from the cache that keeps what a merge has learned.

The result of a merge that learns, or that takes singular vectors, depends on the machine, to float noise, and takes
minutes. So it is made once, under the cache's lock, and kept with the cache: `merged.safetensors`, and the coefficients
of AdaMerging as `coefficients.json`.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from msgspec.structs import replace
from safetensors.torch import save_file
from torch import Tensor

from probsurgery.pipeline.config import ExtractConfig
from probsurgery.pipeline.datasets.tasks import Task
from probsurgery.pipeline.errors import InputError, ProbsurgeryError, unknown
from probsurgery.pipeline.files import broken_seal, replaced, seal, write_json
from probsurgery.pipeline.merging.coefficients import Coefficients, read_coefficients
from probsurgery.pipeline.merging.entropy import window
from probsurgery.pipeline.merging.method import Value
from probsurgery.pipeline.merging.registry import METHODS, Chain, changed, find_merge, is_merge, merge
from probsurgery.pipeline.merging.vectors import ImageStream, Machine, Merged
from probsurgery.pipeline.models.checkpoints import digest
from probsurgery.pipeline.models.encoders import Encoder
from probsurgery.pipeline.models.sources import Weights
from probsurgery.pipeline.store import manifest as manifests
from probsurgery.pipeline.store.arrays import array_kind
from probsurgery.pipeline.store.manifest import COEFFICIENTS, MERGED, Identity, Manifest, MergeIdentity, MergeRecord
from probsurgery.pipeline.store.writer import CacheWriter


@dataclass(frozen=True)
class MergeRequest:
    """One merge that was asked for, and where its cache goes."""

    name: str
    """A method, a method with followers, or the path of a merged checkpoint."""
    path: Path
    identity: MergeIdentity
    """Method and settings; the digest of the result is known later."""
    coefficients: Coefficients | None = None
    """Coefficients that are given and not to be learned."""

    @cached_property
    def chain(self) -> Chain | None:
        """What the name stands for; None for the path of a merged checkpoint."""
        return find_merge(self.name) if is_merge(self.name) else None

    @property
    def learns(self) -> bool:
        """Whether images are needed."""
        return self.chain is not None and self.chain.learns and self.coefficients is None

    @property
    def is_kept(self) -> bool:
        """Whether the result depends on the machine, to float noise, so that the cache keeps it."""
        return self.chain is not None and (self.learns or self.chain.varies)

    @property
    def classifies(self) -> bool:
        """Whether predictions are needed."""
        return self.chain is not None and self.learns and self.chain.classifies

    @property
    def splits(self) -> list[str]:
        """The splits whose images are needed if it learns."""
        settings = self.identity.settings.items()
        return list(dict.fromkeys(str(value) for key, value in settings if key.rpartition(".")[2] == "split"))


@dataclass(frozen=True)
class MergedModel:
    """One merged model, as it was asked for."""

    request: MergeRequest
    state: Mapping[str, Tensor]
    identity: MergeIdentity
    """Method, settings and digest."""
    record: MergeRecord = field(default_factory=MergeRecord)
    """How it was learned."""
    coefficients: Coefficients | None = None
    is_new: bool = False
    """Whether this run made it and the cache keeps it, so that its weights have to be written."""


def merge_requests(
    config: ExtractConfig, encoder: Encoder, tasks: Sequence[Task], stem: str, *, whole_suite: bool
) -> list[MergeRequest]:
    """The merges of a run, in caches whose default names begin with `stem`.

    Raises `InputError` for an unknown one, or for settings that none of them takes.
    """
    chains = {}
    for name in config.merges:
        if is_merge(name) or not (name and Path(name).exists()):
            chains[name] = find_merge(name, "or the path of a merged checkpoint")
    for setting in config.merge_args:
        if not any(chain.meant(setting) for chain in chains.values()):
            known = dict.fromkeys(s for chain in chains.values() for s in chain.settings)
            raise unknown(f"setting of {', '.join(config.merges)}", setting, known or ["(there is none)"])
    if config.name is not None and (config.name in METHODS or is_merge(config.name)):
        raise InputError(f"--name {config.name} is the name of a method; choose another")
    if config.name is not None and len(config.merges) - len(chains) != 1:
        raise InputError("--name names a merged checkpoint; give exactly one path with --merge")
    if config.coefficients is not None and sum(chain.takes_coefficients for chain in chains.values()) != 1:
        able = ", ".join(name for name, row in METHODS.items() if row.takes_coefficients)
        raise InputError(f"--coefficients are for one --merge of: {able}, without followers that learn")
    requests = [_merge_request(name, config, tasks, stem, whole_suite) for name in config.merges]
    names = list(encoder.shapes)
    for request in requests:  # before another merge of this run learns, which takes long
        if request.coefficients is not None:
            request.coefficients.table([task.name for task in tasks], names)
    if len({request.path for request in requests}) < len(requests):
        raise InputError("two of the merges would go to one cache; rename one of the checkpoints")
    return requests


def _merge_request(
    name: str, config: ExtractConfig, tasks: Sequence[Task], stem: str, whole_suite: bool
) -> MergeRequest:
    coefficients, source = None, ""
    if is_merge(name):
        chain = find_merge(name)
        given = chain.addressed({key: value for key, value in config.merge_args.items() if chain.meant(key)})
        settings = chain.checked(given)
        if config.coefficients is not None and chain.takes_coefficients:
            file, own = Path(config.coefficients), chain.own(chain.first, given)
            coefficients, known = _given_coefficients(chain.first, file, own)
            source = "" if "steps" in known else f"-{file.stem}"
            settings = known | {key: value for key, value in settings.items() if "." in key}
        label = name + "".join(f"-{key}{value}" for key, value in changed(name, settings).items()) + source
        identity = MergeIdentity(name, chain.recorded(settings))
    else:
        label = config.name or Path(name).stem
        identity = MergeIdentity("file", {}, config.name)
    suffix = "" if whole_suite else "_" + "+".join(task.name for task in tasks)
    suffix += "" if config.corrupt is None else "-" + config.corrupt.replace(":", "")
    path = config.out or Path(config.root) / f"{stem}_{label}{suffix}"
    return MergeRequest(name, Path(path), identity, coefficients)


def _given_coefficients(name: str, path: Path, given: dict[str, object]) -> tuple[Coefficients, dict[str, Value]]:
    """Coefficients from a file, and the settings that they were learned with, if the file says so."""
    method, coefficients = METHODS[name], read_coefficients(path)
    if coefficients.method not in (None, name):
        raise InputError(f"{path} has coefficients that were learned for {coefficients.method}, not {name}")
    layerwise = coefficients.values.ndim == 2
    if layerwise != method.is_layerwise:
        content = "a coefficient for each tensor" if layerwise else "one coefficient for each task"
        other = f"{'lw' if layerwise else 'tw'}{name[2:]}"
        raise InputError(f"{path} has {content}, which is not {name}; use --merge {other}")
    if "steps" in coefficients.settings:
        settings = method.checked(name, coefficients.settings)
        for key, value in given.items():
            if method.settings[key].check(key, value) != settings[key]:
                raise InputError(f"{path} was learned with {key}={settings[key]}; leave --merge-arg {key} out")
        return coefficients, settings
    processing = ("keep", "counted")
    unused = next((key for key in given if key not in processing), None)
    if unused:
        raise InputError(f"--merge-arg {unused} would have no effect: with --coefficients nothing is learned")
    known = {key: coefficients.settings[key] for key in processing if key in coefficients.settings}
    return coefficients, {key: v for key, v in method.checked(name, known | given).items() if key in processing}


def load_learned(request: MergeRequest, identity: Identity, weights: Weights) -> MergedModel | None:
    """The model that an earlier run has learned for this identity, from the cache; None if it is missing or damaged.

    With given coefficients alone nothing was learned: they are merged again, which is cheap, and the digest tells
    whether they are the cache's.
    """
    if not request.is_kept:
        return None
    manifest = _manifest(request)
    if manifest is None or not _is_whole(request, manifest, MERGED):
        return None
    learned, merged = manifest.merge, manifest.identity.merge
    if manifest.identity != replace(identity, merge=merged) or replace(merged, digest=None) != request.identity:
        return None
    state = weights.load(request.path / MERGED)
    if digest(state) != merged.digest:
        return None
    recorded = _recorded(request, learned, weights.names)
    if request.coefficients is not None:
        tables = [c.table(identity.tasks, weights.names) for c in (request.coefficients, recorded) if c]
        if len(tables) < 2 or not torch.equal(*tables):
            return None
    is_lost = not _is_whole(request, manifest, COEFFICIENTS)
    return MergedModel(request, state, merged, coefficients=recorded if is_lost else None)


def _recorded(request: MergeRequest, record: MergeRecord, names: Sequence[str]) -> Coefficients | None:
    """The coefficients of a manifest, for tensors of these names."""
    if not record.coefficients:
        return None
    values = torch.tensor(list(record.coefficients.values()))
    return Coefficients(
        tuple(record.coefficients), None if values.ndim == 1 else tuple(names), values, *_first(request)
    )


def _first(request: MergeRequest) -> tuple[str, dict[str, Value]]:
    """The method that coefficients are of, without the followers, and its settings."""
    assert request.chain is not None, "a checkpoint has no coefficients"
    return request.chain.first, request.chain.own(request.chain.first, request.identity.settings)


def _manifest(request: MergeRequest) -> Manifest | None:
    try:
        return manifests.read_manifest(request.path)
    except InputError:
        return None


def _is_whole(request: MergeRequest, manifest: Manifest, name: str) -> bool:
    """Whether a file that keeps what a merge has learned is as it was written."""
    sealed = manifest.merge.files.get(name)
    return sealed is not None and not broken_seal(request.path / name, sealed)


def has_no_features(request: MergeRequest) -> bool:
    """Whether a cache of this learned merge was begun, and no merged feature of it was written.

    The learned weights may then be lost. Learned again, they may differ by float noise; as nothing depends on them yet,
    the cache is begun again.
    """
    manifest = _manifest(request) if request.is_kept else None
    if manifest is None:
        return False
    return not any(spec.size for name, spec in manifest.arrays.items() if array_kind(name) == "merged")


def make_merge(
    request: MergeRequest,
    weights: Weights,
    pretrained: dict[str, Tensor],
    tasks: Sequence[Task],
    open_stream: Callable[[], ImageStream | None],
    machine: Machine | None = None,
) -> MergedModel:
    """Merge, or read the merged checkpoint. Raises `InputError` if the models or coefficients do not fit."""
    begun = time.perf_counter()
    if request.chain is None:
        merged = Merged(weights.merged(Path(request.name)))
    elif request.chain.is_checkpoint:
        merged = Merged(weights.own(request.name))
    else:
        stream, experts = open_stream() if request.learns else None, weights.experts(tasks)
        try:
            settings = request.identity.settings
            merged = merge(request.name, pretrained, experts, stream, request.coefficients, machine, **settings)
        except torch.OutOfMemoryError as error:
            device = stream.device if stream else machine.device if machine else "the CPU"
            problem = f"does not fit into {device}'s memory ({str(error).partition('.')[0]})"
            advice = "use --device cpu, or fewer --tasks"
            raise ProbsurgeryError(f"{request.name} of {len(tasks)} experts {problem}; {advice}") from None
    coefficients = merged.coefficients
    seconds = round(time.perf_counter() - begun, 1) if request.is_kept else None
    entropy = dict(zip(("first", "last"), window(merged.entropy), strict=True)) if merged.entropy else {}
    if coefficients is not None:
        names = tuple(task.name for task in tasks), tuple(pretrained)
        coefficients = coefficients.named(*_first(request), *names)
    identity = replace(request.identity, digest=digest(merged.state))
    record = MergeRecord(seconds, entropy, chosen=dict(merged.chosen))
    return MergedModel(request, merged.state, identity, record, coefficients, request.is_kept)


def store_learned(writer: CacheWriter, model: MergedModel) -> None:
    """Write what a merge has learned to its cache, and record how."""
    record = model.record if model.is_new else writer.manifest.merge
    files = dict(writer.manifest.merge.files)
    if model.is_new:
        with writer.room(), replaced(writer.path / MERGED) as partial:
            save_file({name: tensor.contiguous() for name, tensor in model.state.items()}, partial)
        files[MERGED] = seal(writer.path / MERGED)
    if model.coefficients is not None:
        plain = model.coefficients.to_json()
        with writer.room():
            write_json(writer.path / COEFFICIENTS, plain)
        files[COEFFICIENTS] = seal(writer.path / COEFFICIENTS)
        record = replace(record, coefficients=plain["coefficients"])
    if model.is_new or model.coefficients is not None:
        writer.update(merge=replace(record, files=files))
