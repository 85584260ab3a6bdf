"""`predict` classes of images, and `export` a model."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from probsurgery.commands.options import AsJson, CacheFolder, Device, StoredResults
from probsurgery.commands.progress import shown_progress
from probsurgery.commands.render import print_json, say
from probsurgery.pipeline.config import FitConfig
from probsurgery.pipeline.errors import InputError

Head = Annotated[str, Option("--head", help="Name of a head saved with the cache, or its folder.")]
Checkpoints = Annotated[str | None, Option(help="Folder of checkpoints, as for extract. [the published ones]")]
Merged = Annotated[
    Path | None, Option(help="The merged checkpoint that the cache was extracted from, if it was made elsewhere.")
]


def predict_command(
    images: Annotated[list[Path], Argument(metavar="IMAGE...", help="Image files.")],
    cache: CacheFolder,
    head: Head,
    task: Annotated[str, Option(help="Task whose classes to choose from.")],
    checkpoints: Checkpoints = None,
    merged: Merged = None,
    results: StoredResults = None,
    top: Annotated[int, Option(min=1, help="Classes to name.")] = 3,
    device: Device = FitConfig.device,
    as_json: AsJson = False,
) -> None:
    """Classify images with the merged encoder and a head of the cache."""
    from probsurgery.pipeline.deploy.assemble import assemble
    from probsurgery.pipeline.deploy.predict import predict
    from probsurgery.pipeline.device import choose_device

    torch_device = choose_device(device)
    model = assemble(cache, head, checkpoints, merged, results)
    predictions = predict(model, task, images, torch_device, top)
    if as_json:
        print_json([asdict(prediction) for prediction in predictions])
        return
    for prediction in predictions:
        classes = ", ".join(f"{name} {100 * p:.1f} %" for name, p in prediction.classes)
        sigma = "" if prediction.sigma is None else f"; sigma {prediction.sigma:.3f}"
        say(f"{prediction.image}: {classes}{sigma}")


def export_command(
    cache: CacheFolder,
    head: Head,
    out: Annotated[Path, Option(help="The new folder.")],
    checkpoints: Checkpoints = None,
    merged: Merged = None,
    results: StoredResults = None,
    onnx: Annotated[bool, Option("--onnx", help="Write and check TASK.onnx for each task too.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write merged weights, heads, classifiers and preprocessing to a folder that `probsurgery.load_model` reads."""
    from probsurgery.pipeline.deploy.assemble import assemble
    from probsurgery.pipeline.deploy.model import FILES
    from probsurgery.pipeline.deploy.onnx_export import require_onnx, write_onnx

    if out.exists():  # checked before the merge, which takes long
        raise InputError(f"{out} exists; choose another --out, or delete it")
    if onnx:
        require_onnx()
    model = assemble(cache, head, checkpoints, merged, results)
    with shown_progress("tasks") as progress:
        model.save(out, lambda folder: write_onnx(model, folder, progress) if onnx else None)
    if as_json:
        files = ["model.json", *FILES] + [f"{task}.onnx" for task in model.tasks if onnx]
        print_json({"path": str(out), "tasks": list(model.tasks), "files": files})
    else:
        say(f"{out}: written, {len(model.tasks)} tasks; probsurgery.load_model({str(out)!r}) reads it")
