"""How accurate is each merge on the mini suite, how much does each head recover, and what does the merge cost?

Every merge goes through `extract` and `fit` as in the commands, with three seeds, which seed the heads and any
randomness of the merge. Heads have their default settings; `joint` stands for
`--optimizer joint`. Accuracies are averages over the tasks, as mean and standard deviation over seeds. Seconds and
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

FOLLOWED = ("ta+svc", "iso-c+svc", "ta+featcal", "iso-cts+featcal")


def heads() -> dict[str, tuple[str, dict[str, str]]]:
    """Kind and settings of each head, by the title of its column."""
    from probsurgery.pipeline.config import HEAD_SETTINGS

    columns = {}
    for kind, settings in HEAD_SETTINGS.items():
        columns[settings.title] = kind, {}
        if hasattr(settings, "loss"):
            columns[f"{settings.title}, joint"] = kind, {"optimizer": "joint"}
    return columns


def measure(merge: str, seed: int, root: str) -> dict:
    """Figures of one merge after both stages, in this process."""
    import torch

    import probsurgery
    from probsurgery.pipeline.extraction import extract
    from probsurgery.pipeline.merging.registry import find_merge

    figures, make_merge = {}, extract.make_merge

    def measured(*arguments):
        model, peak = peak_of(lambda: make_merge(*arguments))
        figures["memory"] = peak / 2**20
        return model

    extract.make_merge = measured
    settings = {"seed": seed} if "seed" in find_merge(merge).settings else {}
    run = probsurgery.extract(probsurgery.ExtractConfig("mini", (merge,), settings, root=Path(root)))
    figures["seconds"] = run.seconds["merge"]
    for title, (kind, changes) in heads().items():
        fit = probsurgery.FitConfig(run.caches[0], probsurgery.head_settings(kind, **changes), seed=seed)
        rows = probsurgery.fit(fit).rows
        figures[title] = 100 * fmean(row.accuracy.head for row in rows)
    for kind in ("merged", "individual"):
        figures[kind] = 100 * fmean(getattr(row.accuracy, kind) for row in rows)
    entropy = dict(probsurgery.open_cache(run.caches[0]).manifest.merge.entropy)
    return figures | {"entropy": entropy, "torch": torch.__version__, "threads": torch.get_num_threads()}


def main() -> None:
    from probsurgery.pipeline.merging.registry import METHODS

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--merge", nargs="+", default=[*(n for n, row in METHODS.items() if not row.follows), *FOLLOWED]
    )
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        merge, seed, root = arguments.measure
        print(json.dumps(measure(merge, int(seed), root)))
        return
    seeds = list(map(int, arguments.seeds.split(",")))
    columns = ["merged", *heads(), "individual", "entropy", "seconds", "MiB"]
    widths = {column: max(len(column), 12 if column == "entropy" else 8) + 2 for column in columns}
    print(f"{'merge':<17} " + "".join(f"{column:<{width}}" for column, width in widths.items()), flush=True)
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

        cells = {column: spread(column) for column in columns if column in runs[0] and column != "entropy"}
        cells["entropy"] = "-"
        if runs[0]["entropy"]:
            cells["entropy"] = " to ".join(
                f"{fmean(run['entropy'][end] for run in runs):.2f}" for end in ("first", "last")
            )
        cells["MiB"] = f"{fmean(run['memory'] for run in runs):.0f}"
        print(f"{merge:<17} " + "".join(f"{cells[column]:<{width}}" for column, width in widths.items()), flush=True)
    print(f"torch {runs[0]['torch']}, CPU, {runs[0]['threads']} threads; seeds {arguments.seeds}")


if __name__ == "__main__":
    main()
