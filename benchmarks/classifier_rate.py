"""At which learning rate does FT-Classifier come nearest to the experts' predictions on images that it has not seen?

Fits classifier heads on four fifths of each task's test images, and prints the KL divergence to the experts on the
fifth that is left, over tasks and three seeds. No label is read:

    python benchmarks/classifier_rate.py [--cache cache/mini_ta]

The default of `ClassifierSettings.lr` comes from this output, which is in RESULTS.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import fmean

from probsurgery.pipeline.classifier import Classifier
from probsurgery.pipeline.config import ClassifierSettings, FitConfig
from probsurgery.pipeline.fitting.splits import LoadedTasks, split_rows
from probsurgery.pipeline.store.cache import Cache
from probsurgery.pipeline.training.batches import Job
from probsurgery.pipeline.training.plan import fit_heads

RATES = (5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 2e-2, 4e-2, 8e-2)
SEEDS = (0, 1, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=Path("cache/mini_ta"))
    cache = Cache(parser.parse_args().cache)
    tasks = cache.tasks()
    loaded = LoadedTasks(cache, tasks, "test")
    for steps in (ClassifierSettings.steps, 5_000):
        for rate in RATES:
            head = ClassifierSettings(steps=steps, lr=rate)
            asked = [(FitConfig(cache.path, head, holdout=0.2, seed=seed), task) for seed in SEEDS for task in tasks]
            fitted = fit_heads([Job((loaded.rows(config, task),), head, config.seed) for config, task in asked])
            unseen = [left_out(cache, *one, of.params) for one, of in zip(asked, fitted, strict=True)]
            seen = fmean(of.curve[-1][1] for of in fitted)
            print(f"{steps:,} steps, lr {rate:<6g}  held out {fmean(unseen):.4f}  fitted {seen:.4f}", flush=True)


def left_out(cache: Cache, config: FitConfig, task: str, params: dict) -> float:
    """KL divergence on the rows that were held out."""
    _, rows = split_rows(config, task, cache.rows(task))
    own = cache.linear_classifier(task)
    new = Classifier(params["weight"][0], params["bias"][0], own.normalise)
    target = own.logits(cache.features(task, "expert")[rows]).log_softmax(-1)
    found = new.logits(cache.features(task)[rows]).log_softmax(-1)
    return (target.exp() * (target - found)).sum(-1).mean().item()


if __name__ == "__main__":
    main()
