"""What does a second merge cost after the first, and how much faster are two ranks than one?

    python benchmarks/stage_one_again.py [--arch vitb32] [--images 128] [--ranks 2] [--rounds 1]

Every run is the command itself, on two tasks with the given number of images and random weights, or on the whole mini
suite. Work is the time that `extract` reports for reading, encoding, writing and waiting for other ranks; "in all" also
includes start-up and checkpoints. The second merge is compared with the same merge in an empty folder; the ranks are
compared with one rank that has as many threads as they have together. Figures are medians over the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from stage_one import write_checkpoints, write_images

from probsurgery.pipeline.datasets.suites import select_tasks

TASKS = ("resisc45", "eurosat")


def extract(args: argparse.Namespace, root: Path, merge: str, ranks: int = 1, threads: int | None = None) -> dict:
    """Run the command; returns its JSON result with its wall time."""
    command = ["-m", "probsurgery", "extract", "--arch", args.arch, "--merge", merge, "--root", str(root), "--json"]
    if args.arch != "mini":
        command += ["--tasks", ",".join(TASKS), "--checkpoints", str(args.folder / "weights"), "--any-rows"]
        command += ["--data", str(args.folder / "data"), "--batch-size", "32"]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    environment = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    begun = time.perf_counter()
    done = subprocess.run([sys.executable, *launch, *command], capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout) | {"wall": time.perf_counter() - begun}


def content(cache: str) -> str:
    """Digest of the values in a cache."""
    command = [sys.executable, "-m", "probsurgery", "cache", "info", cache, "--json"]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)["content"]


def work(run: dict) -> float:
    """Seconds of all phases but preparation and merging."""
    return sum(seconds for phase, seconds in run["seconds"].items() if phase not in ("prepare", "merge"))


def line(label: str, its: list[dict]) -> tuple[float, float]:
    """Print one kind of run; returns its median seconds of work and in all."""
    seconds = statistics.median(map(work, its)), statistics.median(run["wall"] for run in its)
    print(f"  {label:<28} {its[0]['passes']:>8,} passes {seconds[0]:7.1f} s of work {seconds[1]:7.1f} s in all")
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", default="vitb32")
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=1)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        args.folder = Path(folder)
        if args.arch != "mini":
            (args.folder / "weights").mkdir()
            tasks = select_tasks("clip8", TASKS)
            write_checkpoints(args.folder / "weights", args.arch, tasks)
            for task in tasks:
                write_images(args.folder / "data" / task.name, args.images, task.class_names)
        compare(args)


def compare(args: argparse.Namespace) -> None:
    threads = torch.get_num_threads()
    few = threads // args.ranks
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {threads} threads"
    print(f"torch {torch.__version__}, {device}; {args.arch}, {args.rounds} rounds")
    runs: dict[str, list[dict]] = {name: [] for name in ("alone", "beside", "one", "many")}
    for _ in range(args.rounds):
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            at = {name: Path(folder) / name for name in ("alone", "shared", "one", "many", "few")}
            extract(args, at["shared"], "ta")
            runs["beside"].append(extract(args, at["shared"], "ties"))
            runs["alone"].append(extract(args, at["alone"], "ties"))
            runs["one"].append(extract(args, at["one"], "ta", threads=threads))
            runs["many"].append(extract(args, at["many"], "ta", ranks=args.ranks, threads=few))
            single = extract(args, at["few"], "ta", threads=few)
            contents = {name: content(its[-1]["caches"][0]) for name, its in runs.items()}
            contents["few"] = content(single["caches"][0])
    print("A second merge (ties, after ta):")
    alone = line("in a folder of its own", runs["alone"])
    beside = line("beside the first", runs["beside"])
    saved = 1 - runs["beside"][0]["passes"] / runs["alone"][0]["passes"]
    print(
        f"  {saved:.0%} of the passes saved, {alone[0] / beside[0]:.1f}x less work, {alone[1] / beside[1]:.2f}x in all"
    )
    print(f"  same content: {contents['beside'] == contents['alone']}")
    print(f"{args.ranks} ranks beside one (ta):")
    one = line(f"one rank, {threads} threads", runs["one"])
    many = line(f"{args.ranks} ranks, threads each: {few}", runs["many"])
    print(f"  {one[0] / many[0]:.2f}x in work, {one[1] / many[1]:.2f}x in all")
    print(f"  same content as one rank with as many threads as each: {contents['many'] == contents['few']}")


if __name__ == "__main__":
    main()
