"""How good is each merge on the mini suite, what do heads win back, and what does the merge cost?

Every merge goes through `extract` and `fit` as the commands do, three seeds each: the seed of the heads, and of what
the merge draws, if it draws anything. Accuracies are averages over the tasks, mean and standard deviation over seeds.
Seconds and memory are of the merge alone, in a process of its own; the memory is what it takes at its peak beyond what
the process held before it, in models (P, float32), decoded images included.

    python benchmarks/merges.py [--merge NAME ...] [--seeds 0,1,2]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import fmean, stdev

from peak import peak_of


def measure(merge: str, seed: int, root: str) -> dict:
    """One merge through both stages, in this process."""
    import torch

    import probsurgery
    from probsurgery.pipeline.extraction import merges
    from probsurgery.pipeline.merging.registry import METHODS

    found, make = {}, merges.make

    def watched(request, weights, pretrained, *rest):
        model, peak = peak_of(lambda: make(request, weights, pretrained, *rest))
        found["memory"] = peak / 2**20
        return model

    merges.make = watched
    drawn = {"seed": seed} if "seed" in METHODS[merge].settings else {}
    config = probsurgery.ExtractConfig("mini", (merge,), drawn, root=Path(root))
    run = probsurgery.extract(config)
    found["seconds"] = run.seconds["merge"]
    for head in ("surgery", "prob"):
        fit = probsurgery.FitConfig(run.caches[0], probsurgery.head_settings(head), seed=seed)
        rows = probsurgery.fit(fit).rows
        found[head] = 100 * fmean(row["accuracy"]["head"] for row in rows)
    for kind in ("merged", "individual"):
        found[kind] = 100 * fmean(row["accuracy"][kind] for row in rows)
    record = json.loads((run.caches[0] / "manifest.json").read_text()).get("merge", {})
    return found | {"entropy": record.get("entropy"), "torch": torch.__version__, "threads": torch.get_num_threads()}


def main() -> None:
    from probsurgery.pipeline.merging.registry import METHODS

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--merge", nargs="+", default=list(METHODS))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        merge, seed, root = arguments.one
        print(json.dumps(measure(merge, int(seed), root)))
        return
    seeds = list(map(int, arguments.seeds.split(",")))
    print(f"{'merge':<17} merged      + Surgery   + ProbSurgery  individual  entropy       seconds  MiB", flush=True)
    for merge in arguments.merge:
        runs = []
        for seed in seeds:
            with tempfile.TemporaryDirectory() as root:
                command = [sys.executable, __file__, "--one", merge, str(seed), root]
                done = subprocess.run(command, stdout=subprocess.PIPE, check=True, env=os.environ, text=True)
            runs.append(json.loads(done.stdout))

        def spread(name: str, runs=runs) -> str:
            values = [run[name] for run in runs]
            return f"{fmean(values):.1f}" + (f"±{stdev(values):.1f}" if len(values) > 1 else "")

        entropy = "-"
        if runs[0]["entropy"]:
            entropy = " to ".join(f"{fmean(run['entropy'][end] for run in runs):.2f}" for end in ("first", "last"))
        print(
            f"{merge:<17} {spread('merged'):<11} {spread('surgery'):<11} {spread('prob'):<14} "
            f"{spread('individual'):<11} {entropy:<13} {spread('seconds'):<8} {fmean(r['memory'] for r in runs):.0f}",
            flush=True,
        )
    print(f"torch {runs[0]['torch']}, CPU, {runs[0]['threads']} threads; seeds {arguments.seeds}")


if __name__ == "__main__":
    main()
