"""How accurate is each merge on the mini suite, how much do heads recover, and what does the merge cost?

Every merge goes through `extract` and `fit` as in the commands, with three seeds, which seed the heads and any
randomness of the merge. Accuracies are averages over the tasks, as mean and standard deviation over seeds. Seconds and
memory are of the merge only, in a separate process; memory is its peak in MiB beyond what the process held before,
decoded images included.

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
    """Figures of one merge after both stages, in this process."""
    import torch

    import probsurgery
    from probsurgery.pipeline.extraction import extract
    from probsurgery.pipeline.merging.registry import METHODS

    figures, make_merge = {}, extract.make_merge

    def measured(*arguments):
        model, peak = peak_of(lambda: make_merge(*arguments))
        figures["memory"] = peak / 2**20
        return model

    extract.make_merge = measured
    settings = {"seed": seed} if "seed" in METHODS[merge].settings else {}
    run = probsurgery.extract(probsurgery.ExtractConfig("mini", (merge,), settings, root=Path(root)))
    figures["seconds"] = run.seconds["merge"]
    for head in ("surgery", "prob"):
        fit = probsurgery.FitConfig(run.caches[0], probsurgery.head_settings(head), seed=seed)
        rows = probsurgery.fit(fit).rows
        figures[head] = 100 * fmean(row.accuracy.head for row in rows)
    for kind in ("merged", "individual"):
        figures[kind] = 100 * fmean(getattr(row.accuracy, kind) for row in rows)
    entropy = dict(probsurgery.open_cache(run.caches[0]).manifest.merge.entropy)
    return figures | {"entropy": entropy, "torch": torch.__version__, "threads": torch.get_num_threads()}


def main() -> None:
    from probsurgery.pipeline.merging.registry import METHODS

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--merge", nargs="+", default=list(METHODS))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        merge, seed, root = arguments.measure
        print(json.dumps(measure(merge, int(seed), root)))
        return
    seeds = list(map(int, arguments.seeds.split(",")))
    print(f"{'merge':<17} merged      + Surgery   + ProbSurgery  individual  entropy       seconds  MiB", flush=True)
    for merge in arguments.merge:
        runs = []
        for seed in seeds:
            with tempfile.TemporaryDirectory() as root:
                command = [sys.executable, __file__, "--measure", merge, str(seed), root]
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
