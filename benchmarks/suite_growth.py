"""Does `fit` on 20 tasks take longer than on 8 only in proportion to the heads?

    python benchmarks/suite_growth.py [--dim 512] [--steps 5000]

Caches with the rows of clip8 and of clip20 and random features; `fit` of ProbSurgery with its defaults, in turn, twice.
Reading the features and evaluating grow with the rows, training with the heads. Peak memory is of the whole process.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from pathlib import Path

import torch

import probsurgery
from probsurgery.pipeline.datasets.suites import load_suite


def write(folder: Path, suite: str, dim: int) -> tuple[Path, int, int]:
    """A cache of random features for a suite's tasks, with the number of tasks and of rows."""
    tasks = {}
    for name, task in load_suite(suite).tasks.items():
        rows, classes = task.rows["test"][0], len(task.class_names)
        generator = torch.Generator().manual_seed(len(tasks))
        expert = torch.randn(rows, dim, generator=generator)
        tasks[name] = {
            "merged": expert + torch.randn(rows, dim, generator=generator) / 2,
            "expert": expert,
            "labels": torch.randint(classes, (rows,), generator=generator),
            "classifier": torch.randn(classes, dim, generator=generator),
        }
    rows = sum(len(task["labels"]) for task in tasks.values())
    return probsurgery.write_cache(folder / suite, tasks), len(tasks), rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--steps", type=int, default=5_000)
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; d={args.dim}, {args.steps:,} steps")
    with tempfile.TemporaryDirectory() as temporary:
        caches = [write(Path(temporary), suite, args.dim) for suite in ("clip8", "clip20")]
        for seed in range(2):
            for path, heads, rows in caches:
                size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
                settings = probsurgery.head_settings("prob", steps=args.steps)
                begun = time.perf_counter()
                probsurgery.fit(probsurgery.FitConfig(path, settings, seed=seed))
                seconds = time.perf_counter() - begun
                peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
                print(
                    f"  {path.name}: {heads} heads, {rows:,} rows, {size / 2**30:.2f} GiB: {seconds:.1f} s, "
                    f"{seconds / heads:.2f} s a head; peak so far {peak:.2f} GiB"
                )


if __name__ == "__main__":
    main()
