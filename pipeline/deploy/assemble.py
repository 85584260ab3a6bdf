"""A cache and one of its heads -> the model that they stand for."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from msgspec.structs import replace
from torch import Tensor

from probsurgery.pipeline.datasets.tasks import Task
from probsurgery.pipeline.deploy.model import Provenance, SurgeryModel
from probsurgery.pipeline.errors import DamagedCacheError, InputError, unknown
from probsurgery.pipeline.extraction.merges import MergeRequest, load_learned, make_merge
from probsurgery.pipeline.files import MalformedError, decode, folders_in, is_folder
from probsurgery.pipeline.heads.head import Head, load_head
from probsurgery.pipeline.merging.coefficients import read_coefficients
from probsurgery.pipeline.models.checkpoints import digest
from probsurgery.pipeline.models.encoders import encoder_of
from probsurgery.pipeline.models.preprocessing import Preprocessing
from probsurgery.pipeline.models.sources import SUFFIXES, Weights
from probsurgery.pipeline.store.cache import Cache
from probsurgery.pipeline.store.manifest import COEFFICIENTS, IMPORTED, MERGED, software


def assemble(
    cache: str | Path,
    head: str | Path,
    checkpoints: str | None = None,
    merged: Path | None = None,
    results: Path | None = None,
    task: str | None = None,
) -> SurgeryModel:
    """The model that a cache and one of its heads stand for.

    A cache keeps features and not weights, so the encoder is merged again from the checkpoints, unless the merge was
    learned, and must have the cache's digest. `head` is a name under heads/ or a folder; `merged` is the checkpoint of
    a merge that was made elsewhere; `task` is one that the head must have. Raises `InputError` if the checkpoints are
    others, or if the head was fitted on other features.
    """
    opened = Cache(cache)
    identity = opened.identity
    if identity.merge.method == IMPORTED:
        raise InputError(f"{opened.path} holds features that were imported, and no encoder to encode images with")
    try:
        preprocessing = decode(Preprocessing, identity.preprocessing)
    except MalformedError as error:
        raise DamagedCacheError(f"{opened.path} records no preprocessing of images ({error}); extract again") from None
    fitted = _fitted_head(opened, head, results)
    if task is not None and task not in fitted.tasks:  # before the merge, which takes long
        raise unknown("task", task, fitted.tasks)
    for name in fitted.tasks if task is None else [task]:
        if not opened.manifest.tasks[name].classifier:
            raise InputError(f"{opened.path} holds no classifier of {name}, so there are no classes to predict")
    encoder = encoder_of(identity)
    folder = Path(checkpoints) if checkpoints else encoder.arch.folder
    weights = Weights(encoder, checkpoints, _recorded_places(opened, folder))
    state = _merged_state(
        opened, weights, [Task(name, title=opened.titles.get(name, "")) for name in identity.tasks], merged
    )
    if digest(state) != identity.merge.digest:
        where = merged or weights.folder or "the published place"
        advice = "give --checkpoints as for its `probsurgery extract`"
        raise InputError(f"the checkpoints in {where} do not merge to what {opened.path} was made from; {advice}")
    origin = {name: getattr(identity, name) for name in ("arch", "dim", "merge", "encoder")}
    provenance = Provenance(cache=opened.fingerprint, software=software(), preprocessing=preprocessing, **origin)
    own = fitted.classifiers  # of a classifier head, which is exported as these
    classifiers = {task: c for task in fitted.tasks if (c := own.get(task) or opened.linear_classifier(task))}
    class_names = {
        task: opened.manifest.tasks[task].class_names or tuple(map(str, range(len(classifier.weight))))
        for task, classifier in classifiers.items()
    }
    return SurgeryModel(encoder.build(state), fitted, classifiers, class_names, provenance).eval()


def _recorded_places(cache: Cache, folder: Path | None) -> dict[str, str]:
    """Where `extract` read the checkpoints, by task or `pretrained`: in a folder, at a path, or on the Hub."""
    places = {}
    for content in ("pretrained", *cache.identity.tasks):
        file = cache.manifest.files.get(content)
        source = file.source if file else ""
        path = (folder or Path()) / source
        if source and (folder or path.is_absolute()) and path.exists():
            places[content] = str(path)
        elif re.fullmatch(r"[\w.-]+/[\w.-]+", source) and path.suffix not in SUFFIXES:
            places[content] = f"hf:{source}"
    return places


def _fitted_head(cache: Cache, name: str | Path, results: Path | None) -> Head:
    folder = (results or cache.path) / "heads"
    path = folder / name if is_folder(folder / name) else Path(name)
    if not is_folder(path):
        names = [p.name for p in folders_in(folder)]
        raise unknown("head", str(name), names or ["(none is saved; `probsurgery fit` saves one)"])
    head = load_head(path)
    fitted_on = {row.task: row.cache for row in (head.record.results if head.record else ())}
    for task in head.tasks:
        cache.require(task)
        if fitted_on.get(task) != cache.task_fingerprint(task):
            raise InputError(f"the head at {path} was fitted on other features of {task} than {cache.path} holds")
    return head


def _merged_state(cache: Cache, weights: Weights, tasks: Sequence[Task], file: Path | None) -> Mapping[str, Tensor]:
    merge = cache.identity.merge
    if merge.method == "file":
        if file is None:
            raise InputError(f"{cache.path} is of a merged checkpoint; say where it is with --merged FILE")
        return weights.load(file)
    if file is not None:
        raise InputError(f"--merged is for caches of a merged checkpoint; {cache.path} was merged by {merge.method}")
    learned = cache.manifest.merge.files
    were_given = COEFFICIENTS in learned and MERGED not in learned
    coefficients = read_coefficients(cache.path / COEFFICIENTS) if were_given else None
    request = MergeRequest(merge.method, cache.path, replace(merge, digest=None), coefficients)
    known = load_learned(request, cache.identity, weights)
    if known is None and request.is_kept:
        raise InputError(f"{cache.path / MERGED} is missing or damaged; run the same `probsurgery extract` again")
    # A merge that still has to learn was refused above, so no images are needed.
    return known.state if known else make_merge(request, weights, weights.pretrained(), tasks, lambda: None).state
