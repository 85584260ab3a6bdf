"""How wide are the margins that the mini suite shows, and do they hold over seeds?

Fits every head of the demo with each seed on one cache of the whole suite and prints the averages over tasks:

    python benchmarks/mini_margins.py [--cache cache/mini_ta] [--seeds 0,1,2]

The cache is extracted if it does not exist. Heads and results go to a folder that is removed afterwards. The
thresholds of the end-to-end test were set from this output, which is in RESULTS.md.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from statistics import fmean, stdev

import torch

from probsurgery import ExtractConfig, FitConfig, extract, fit, head_settings

HEADS = {
    "ProbSurgery (h=128, 5000 steps)": head_settings("prob"),
    "Surgery (r=16, 1000 steps)": head_settings("surgery"),
    "Surgery (r=128, 5000 steps)": head_settings("surgery", rank=128, steps=5_000),
    "ridge": head_settings("ridge"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=Path("cache/mini_ta"))
    parser.add_argument("--seeds", default="0,1,2")
    options = parser.parse_args()
    seeds = [int(seed) for seed in options.seeds.split(",")]
    extract(ExtractConfig(arch="mini", out=options.cache))

    average: dict[str, list[float]] = {}
    bias: dict[str, list[float]] = {}
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for label, settings in HEADS.items():
            for seed in seeds:
                rows = fit(FitConfig(options.cache, settings, seed=seed, results=folder)).rows
                average.setdefault(label, []).append(100 * fmean(row.accuracy.head for row in rows))
                bias.setdefault(label, []).append(fmean(row.bias.after for row in rows))
                seconds.setdefault(label, []).append(sum(row.seconds for row in rows))
    fixed = {k: 100 * fmean(getattr(row.accuracy, k) for row in rows) for k in ("pretrained", "individual", "merged")}

    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, seeds {options.seeds}, {len(rows)} tasks")
    for label, value in fixed.items():
        print(f"{label:<34}{value:6.1f}")
    print(f"{'merged: bias':<34}{fmean(row.bias.before for row in rows):6.3f}")
    gap = fixed["individual"] - fixed["merged"]
    print(f"merging loses {gap:.1f} points")
    for label, values in average.items():
        print(
            f"{label:<34}{fmean(values):6.1f} +- {stdev(values) if len(values) > 1 else 0:.2f}  by seed "
            f"{', '.join(f'{v:.1f}' for v in values)}  bias {fmean(bias[label]):.3f}  wins back "
            f"{100 * (fmean(values) - fixed['merged']) / gap:.0f} %  {fmean(seconds[label]):.1f} s"
        )


if __name__ == "__main__":
    main()
