"""`predict` classes of images, and `export` a model."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from probsurgery.commands.options import AsJson, CacheFolder, Device, StoredResults, Whole
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
    top: Annotated[int, Whole(help="Classes to name, from 1.")] = 3,
    device: Device = FitConfig.device,
    as_json: AsJson = False,
) -> None:
    """Classify images with the merged encoder and a head of the cache."""
    from probsurgery.pipeline.deploy.assemble import assemble
    from probsurgery.pipeline.deploy.predict import check_images, predict
    from probsurgery.pipeline.device import choose_device

    if top < 1:
        raise InputError(f"--top is {top}; it must be a whole number from 1")
    torch_device = choose_device(device)
    check_images(images)
    model = assemble(cache, head, checkpoints, merged, results, task)
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
    from probsurgery.pipeline.deploy.model import FILES, require_new
    from probsurgery.pipeline.deploy.onnx_export import require_onnx, write_onnx

    require_new(out)  # before the merge, which takes long
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
