"""How much memory and time does each merge take, in models, and does it grow with the number of experts?

The checkpoints are random ViT-B/32 image towers (P = 335 MiB in float32) in safetensors files. Each merge runs in a
separate process; its peak is the resident memory beyond what the process held before, plus theta_0, divided by P.
Merges that learn take two steps on batches of two images of 224 x 224 (Fisher and RegMean four images), so that
activations are small. On a CPU all memory is counted; with CUDA, part of it is on the device, see the modules'
docstrings.

    python benchmarks/merge_memory.py [--experts 2,8] [--merge NAME ...]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from peak import peak_of

BRIEF = {"steps": 2, "batch_size": 2, "images": 4}


def write_checkpoints(folder: Path, count: int) -> None:
    """A pre-trained tower and `count` experts close to it."""
    import torch
    from safetensors.torch import save_file

    from probsurgery.pipeline.models.encoders import get_encoder

    generator = torch.Generator().manual_seed(0)
    base = {n: 0.02 * torch.randn(s, generator=generator) for n, s in get_encoder("vitb32").shapes.items()}
    save_file(base, folder / "0.safetensors")
    for index in range(1, count + 1):
        near = {n: t + 0.002 * torch.randn(t.shape, generator=generator) for n, t in base.items()}
        save_file(near, folder / f"{index}.safetensors")


def measure(folder: Path, method: str, count: int) -> tuple[float, float]:
    """The peak memory of one merge in models, and its seconds, in this process."""
    import torch

    from probsurgery.pipeline.classifier import Classifier
    from probsurgery.pipeline.merging.registry import find_merge, merge
    from probsurgery.pipeline.merging.vectors import ImageStream
    from probsurgery.pipeline.models.checkpoints import VisualState, read_tensors
    from probsurgery.pipeline.models.encoders import get_encoder
    from probsurgery.pipeline.models.sources import LazyMapping

    def opened(index: int) -> VisualState:
        return VisualState(read_tensors(folder / f"{index}.safetensors"))

    def batches(task: str, split: str, size: int, seed: int):
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield torch.randn(size, 3, 224, 224, generator=generator), torch.zeros(size, dtype=torch.int64)

    row = find_merge(method)
    pretrained = {name: tensor.clone() for name, tensor in opened(0).items()}
    experts = LazyMapping({f"task{i}": (lambda i=i: opened(i)) for i in range(1, count + 1)})
    stream = ImageStream(
        get_encoder("vitb32").functional(), {task: Classifier(torch.randn(10, 512)) for task in experts}, batches
    )
    settings = {name: value for name, value in BRIEF.items() if row.meant(name)}
    with torch.no_grad():
        stream.forward(pretrained, next(batches("", "", 2, 0))[0])  # loads libraries
    begun = time.perf_counter()
    _, peak = peak_of(lambda: merge(method, pretrained, experts, stream if row.learns else None, **settings))
    seconds = time.perf_counter() - begun
    return 1 + peak / (4 * sum(tensor.numel() for tensor in pretrained.values())), seconds


def main() -> None:
    from probsurgery.pipeline.merging.registry import METHODS

    merges = [f"wa+{name}" if row.follows else name for name, row in METHODS.items() if row.function is not None]
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--experts", default="2,8")
    parser.add_argument("--merge", nargs="+", default=merges)
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        folder, method, count = arguments.measure
        print(json.dumps(measure(Path(folder), method, int(count))))
        return
    counts = list(map(int, arguments.experts.split(",")))
    print(f"{'peak in models':<18}" + "".join(f"{f'{count} experts':>20}" for count in counts), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoints(Path(folder), max(counts))
        for method in arguments.merge:
            peaks = []
            for count in counts:
                command = [sys.executable, __file__, "--measure", folder, method, str(count)]
                done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
                peaks.append(json.loads(done.stdout))
            print(f"{method:<18}" + "".join(f"{peak:>10.1f}{f'{s:.0f} s':>10}" for peak, s in peaks), flush=True)


if __name__ == "__main__":
    main()
