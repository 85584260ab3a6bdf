"""How fast is `extract` on JPEG files, compared with bare forward passes of the same encoders on prepared tensors?

    python benchmarks/stage_one.py [--arch vitb32] [--images 192] [--batch-size 64] [--precision fp32,bf16] [--device X]

The files are photographs from scikit-learn and scikit-image, cropped to the sizes of SUN397's images. The encoders have
random weights, which take as long as trained ones. Both sides run the merged, the expert and the pre-trained encoder at
the same batch size and in the same type in the same process, alternating for three rounds; ratios are those of medians.
Autocast, which casts weights in every pass, is timed beside weights that were cast once. The time of `extract` is from
its first batch to the end of its last write. The last line shows whether memory grows with the data.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import numpy as np
import open_clip
import skimage.data
import torch
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_sample_images

from probsurgery.pipeline.config import ExtractConfig
from probsurgery.pipeline.datasets.suites import select_tasks
from probsurgery.pipeline.datasets.tasks import Task
from probsurgery.pipeline.device import choose_device
from probsurgery.pipeline.extraction import extract
from probsurgery.pipeline.extraction.encode import TYPES, cast, encode
from probsurgery.pipeline.models.encoders import get_encoder
from probsurgery.pipeline.models.sources import Weights

ROUNDS = 3


def write_images(folder: Path, count: int, classes: tuple[str, ...]) -> None:
    """Write crops of photographs, 400 to 600 pixels wide and high, as JPEGs of quality 90 in class folders."""
    photographs = [*load_sample_images().images, skimage.data.astronaut(), skimage.data.coffee(), skimage.data.rocket()]
    random = np.random.default_rng(0)
    for number in range(count):
        picture = Image.fromarray(photographs[number % len(photographs)]).resize((800, 640))
        width, height = random.integers(400, 600, 2)
        left, top = random.integers(0, 800 - width), random.integers(0, 640 - height)
        path = folder / "test" / classes[number % len(classes)] / f"{number:06}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.crop((left, top, left + width, top + height)).save(path, quality=90)


def write_checkpoints(folder: Path, arch: str, tasks: Sequence[Task]) -> None:
    """Write a random pre-trained model, and a random expert and classifier for each task."""
    for name in ("pretrained", *(task.name for task in tasks)):
        state = open_clip.CLIP(**get_encoder(arch).config).visual.state_dict()
        save_file({n: t.contiguous() for n, t in state.items()}, folder / f"{name}.safetensors")
    dim = get_encoder(arch).dim
    classifiers = {task.name: torch.randn(len(task.class_names), dim) for task in tasks}
    save_file(classifiers, folder / "classifiers.safetensors")


def bare(
    args: argparse.Namespace, device: torch.device, checkpoints: Path, precision: str, *, autocast: bool = False
) -> float:
    """Images per second of three encoders on tensors that are already on the device."""
    state = Weights(args.arch, checkpoints).pretrained()
    towers = [get_encoder(args.arch).build(state).to(device) for _ in range(3)]
    if precision != "fp32" and not autocast:
        towers = [cast(tower, precision) for tower in towers]
    size = get_encoder(args.arch).preprocessing.image_size
    batch = torch.randn(args.batch_size, 3, size, size, device=device)
    batches = max(1, args.images // args.batch_size)
    with torch.autocast(device.type, TYPES.get(precision), enabled=autocast):
        for tower in towers:
            encode(tower, batch)
        synchronise(device)
        begun = time.perf_counter()
        for _ in range(batches):
            kept = [encode(tower, batch) for tower in towers]
    assert all(features.isfinite().all() for features in kept)
    synchronise(device)
    return batches * args.batch_size / (time.perf_counter() - begun)


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def whole(
    args: argparse.Namespace, folder: Path, data: str, precision: str, number: int
) -> tuple[float, dict[str, float]]:
    """Images per second of `extract`, and the seconds that its main thread waited, by phase."""
    result = extract.extract(
        ExtractConfig(
            arch=args.arch,
            tasks=("eurosat",),
            checkpoints=str(folder / "checkpoints"),
            data=str(folder / data),
            precision=precision,
            batch_size=args.batch_size,
            device=args.device,
            root=folder / f"caches-{precision}-{number}",
            any_rows=True,
        )
    )
    seconds = {phase: s for phase, s in result.seconds.items() if phase not in ("prepare", "merge")}
    return result.images / sum(seconds.values()), seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", default="vitb32")
    parser.add_argument("--images", type=int, default=192)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="fp32,bf16")
    args = parser.parse_args()
    device = choose_device(args.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, {name}; {args.arch}, batches of {args.batch_size}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "checkpoints").mkdir()
        tasks = select_tasks("clip8", ["eurosat"])
        write_checkpoints(folder / "checkpoints", args.arch, tasks)
        classes = tasks[0].class_names
        write_images(folder / "small" / "eurosat", args.images, classes)
        write_images(folder / "large" / "eurosat", 4 * args.images, classes)
        precisions = args.precision.split(",")
        rates: dict[tuple[str, str], list[float]] = defaultdict(list)
        for number, precision in product(range(ROUNDS), precisions):
            rates[precision, "bare"].append(bare(args, device, folder / "checkpoints", precision))
            if precision != "fp32":
                rate = bare(args, device, folder / "checkpoints", precision, autocast=True)
                rates[precision, "autocast"].append(rate)
            rate, seconds = whole(args, folder, "small", precision, number)
            rates[precision, "extract"].append(rate)
            waited = ", ".join(f"{phase} {s:.2f} s" for phase, s in seconds.items())
            own = [f"{what} {values[-1]:,.1f}" for (of, what), values in rates.items() if of == precision]
            print(f"  round {number + 1}, {precision}: images/s {', '.join(own)} ({waited})")
        medians = {key: statistics.median(values) for key, values in rates.items()}
        for precision in precisions:
            ratio = medians[precision, "extract"] / medians[precision, "bare"]
            print(f"  {precision}: extract runs at {ratio:.2f} of the bare rate of that type")
            for what in ("bare", "autocast", "extract"):
                if precision != "fp32" and (precision, what) in medians and ("fp32", "bare") in medians:
                    full = medians["fp32", "extract" if what == "extract" else "bare"]
                    print(f"  {precision}: {what} {medians[precision, what] / full:.2f}x of fp32")
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        whole(args, folder, "large", precisions[0], ROUNDS)
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(f"  peak memory: {before / 1024:,.0f} MiB; with four times the images {after / 1024:,.0f} MiB")


if __name__ == "__main__":
    main()
