"""At which size of features does ProbSurgery's noise, which starts at 1, stop doing harm?

Fits default heads on features multiplied by several factors, those of the mini suite (d=64) and synthetic ones of the
width of CLIP ViT-B (d=512), and prints accuracy and the bias that is left, in the features' first unit:

    python benchmarks/feature_scale.py [--cache cache/mini_ta]

`pipeline/fitting/scale.py` takes its target from this output, which is in RESULTS.md. Caches and heads go to a folder
that is removed afterwards.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from statistics import fmean

import numpy as np

from probsurgery import ExtractConfig, FitConfig, extract, fit, head_settings, open_cache, write_cache

SIZES = (0.07, 0.15, 0.3, 0.45, 1.0, 2.0, 4.0, 8.0)


def synthetic(rows: int = 1_500, dim: int = 512, classes: int = 20) -> dict[str, np.ndarray]:
    """Experts' features cluster by class; merged ones are shifted, lack some directions, and are bent."""
    drawn = np.random.default_rng(0)
    directions = drawn.normal(size=(classes, dim))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    labels = drawn.integers(0, classes, rows)
    expert = 0.8 * drawn.normal(size=dim) + 6 * directions[labels] + 0.6 * drawn.normal(size=(rows, dim))
    lost, bent = drawn.normal(size=(dim, 12)) / dim**0.5, drawn.normal(size=(dim, dim)) / dim**0.5
    merged = expert + 0.5 * drawn.normal(size=dim) - 3 * (expert @ lost) @ lost.T + 0.25 * np.tanh(expert @ bent)
    return {"merged": merged, "expert": expert, "labels": labels, "classifier": 100 * directions}


def compare(title: str, tasks: dict[str, dict[str, np.ndarray]], folder: Path) -> None:
    """Print a line for each size of the experts' features."""
    experts = [parts["expert"] for parts in tasks.values()]
    size = (sum(np.square(e, dtype=float).sum() for e in experts) / sum(e.size for e in experts)) ** 0.5
    print(f"{title}: root mean square {size:.2f} a dimension")
    for wanted in SIZES:
        factor = wanted / size
        scaled = {
            task: parts | {kind: parts[kind] * factor for kind in ("merged", "expert")} for task, parts in tasks.items()
        }
        path = write_cache(folder / "cache", scaled, fresh=True)
        texts = []
        for kind in ("prob", "surgery"):
            rows = fit(FitConfig(path, head_settings(kind), device="cpu")).rows
            accuracy, bias = (fmean(row.accuracy.head for row in rows), fmean(row.bias.after for row in rows) / factor)
            texts.append(f"{kind} {100 * accuracy:.1f} %, bias {bias:.4f}")
        print(f"  {wanted:<5} {'; '.join(texts)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=Path("cache/mini_ta"))
    options = parser.parse_args()
    extract(ExtractConfig(arch="mini", out=options.cache))
    cache = open_cache(options.cache)
    mini = {
        task: {
            "merged": cache.features(task).numpy(),
            "expert": cache.features(task, "expert").numpy(),
            "labels": cache.labels(task).numpy(),
            "classifier": cache.classifier(task).numpy(),
        }
        for task in cache.tasks()
    }
    with tempfile.TemporaryDirectory() as folder:
        compare("mini suite, d=64, seven tasks", mini, Path(folder))
        compare("synthetic, d=512, one task", {"t": synthetic()}, Path(folder))


if __name__ == "__main__":
    main()
