"""Sweeps: what they fit, skip and print, and what remains after a failure or an interrupt."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
from msgspec import structs

import processes
from probsurgery.commands import progress as progress_module
from probsurgery.pipeline.analysis.report import report
from probsurgery.pipeline.config import FitConfig, ProbSettings, RidgeSettings, SurgerySettings, SweepConfig
from probsurgery.pipeline.errors import InputError
from probsurgery.pipeline.fitting import fit as fit_module
from probsurgery.pipeline.fitting import sweep as sweep_module
from probsurgery.pipeline.fitting.fit import FitResult, fit
from probsurgery.pipeline.fitting.sweep import sweep
from probsurgery.pipeline.heads.head import load_head
from probsurgery.pipeline.store.results import Bias, read_results
from support import refused, write_cache

GRID = {"hidden": (4, 8), "kl_weight": (0.0, 1e-2), "steps": (60,)}


def grid(cache, **other):
    return SweepConfig(cache.path, values=GRID, **({"seed": (0, 1, 2)} | other))


def test_a_grid_is_the_product_of_its_values():
    config = SweepConfig(cache=None, values=GRID, seed=(0, 1), fraction=(0.5, 1.0))
    runs = config.expand()
    assert len(runs) == config.size == 2 * 2 * 2 * 2
    assert len({(run.head, run.seed, run.fraction) for run in runs}) == 16
    assert {run.head.steps for run in runs} == {60}


def test_a_kind_of_head_takes_the_settings_that_it_has():
    config = SweepConfig(
        cache=None, head=("prob", "surgery", "ridge"), values={"hidden": (4, 8), "rank": (2, 3, 4), "lr": (0.1, 0.2)}
    )
    kinds = [type(run.head) for run in config.expand()]
    counts = [kinds.count(kind) for kind in (ProbSettings, SurgerySettings, RidgeSettings)]
    assert counts == [4, 6, 1]
    assert config.size == 11


def test_a_line_is_what_single_fits_give_over_seeds(small_cache, tmp_path):
    result = sweep(grid(small_cache))
    assert (result.heads, result.fitted, result.failures) == (24, 24, ())
    assert result.varied == {"hidden": (4, 8), "kl_weight": (0.0, 1e-2)}
    assert len(result.lines) == 4
    line = next(line for line in result.lines if line.setting == {"hidden": 8, "kl_weight": 1e-2})
    settings = ProbSettings(hidden=8, kl_weight=1e-2, steps=60)
    fits = [fit(FitConfig(small_cache.path, settings, seed=seed, results=tmp_path)).rows for seed in range(3)]
    accuracy = np.array([[100 * row.accuracy.head for row in rows] for rows in fits])
    bias = np.array([[row.bias.after for row in rows] for rows in fits])
    for t, task in enumerate(("a", "b")):
        assert line.accuracy[task].mean == pytest.approx(accuracy[:, t].mean())
        assert line.accuracy[task].sd == pytest.approx(accuracy[:, t].std(ddof=1))
        assert line.bias[task].mean == pytest.approx(bias[:, t].mean(), rel=1e-5)
    assert line.average_accuracy.mean == pytest.approx(accuracy.mean())
    assert line.average_accuracy.sd == pytest.approx(accuracy.mean(1).std(ddof=1))
    assert line.average_bias.mean == pytest.approx(bias.mean(), rel=1e-5)
    assert result.baselines["merged"]["b"] == pytest.approx(100 * fits[0][1].accuracy.merged)


@pytest.mark.parametrize("other", [{}, {"holdout": 0.3}, {"fit_split": "train"}], ids=str)
def test_heads_of_a_sweep_are_fitted_and_evaluated_on_the_rows_of_their_own_fraction_and_seed(tmp_path, other):
    path = write_cache(tmp_path / "cache", {"a": 90, "b": 30}, splits=("test", "train"))
    values = {"rank": (2,), "steps": (60,)}
    sweep(SweepConfig(path, ("surgery",), values, fraction=(0.3, 0.6, 1.0), seed=(0, 1), **other))
    by_run = {(row.protocol, row.seed, row.task): row for row in read_results(path)}
    assert len(by_run) == 12
    for fraction in (0.3, 0.6, 1.0):
        for seed in (0, 1):
            settings = SurgerySettings(rank=2, steps=60)
            config = FitConfig(path, settings, fraction=fraction, seed=seed, results=tmp_path / "alone", **other)
            for row in fit(config).rows:
                same = by_run[row.protocol, seed, row.task]
                assert same.fit_rows == row.fit_rows
                assert structs.asdict(same.bias) == pytest.approx(structs.asdict(row.bias), rel=1e-5)
                assert same.accuracy == row.accuracy
    assert len({row.bias.after for row in by_run.values()}) == 12


def test_evaluation_in_parts_is_that_of_all_rows(small_cache, tmp_path, monkeypatch):
    whole = sweep(grid(small_cache)).lines
    monkeypatch.setattr("probsurgery.pipeline.fitting.splits.EVALUATION_ROWS", 7)
    parts = sweep(grid(small_cache, results=tmp_path)).lines
    for line, other in zip(whole, parts, strict=True):
        assert line.average_accuracy == other.average_accuracy
        assert line.average_bias.mean == pytest.approx(other.average_bias.mean, rel=1e-6)


def test_values_that_are_nearly_equal_are_told_apart(small_cache):
    lrs = (0.002, 0.0020000001, 0.003)
    values = {"hidden": (4,), "steps": (60,), "lr": lrs}
    result = sweep(SweepConfig(small_cache.path, values=values, fraction=(0.5, 0.50000001), keep_heads=True))
    assert result.fitted == 2 * 2 * 3
    assert len(list((small_cache.path / "heads").iterdir())) == 6


def test_rows_are_those_of_a_fit_and_name_their_plan(small_cache, tmp_path):
    sweep(grid(small_cache, seed=(1,)))
    row = next(row for row in read_results(small_cache.path) if row.head == "prob-h4-steps60-kl0-seed1")
    same = fit(FitConfig(small_cache.path, ProbSettings(hidden=4, steps=60, kl_weight=0), seed=1, results=tmp_path))
    expected = next(other for other in same.rows if other.task == row.task)
    values, expected_values = row.to_json(), expected.to_json()
    assert values.keys() == expected_values.keys()
    assert values["plan"].keys() == {"stack", "workers", "graph", "precision", "kernel"}
    for changing in ("seconds", "plan", "bias", "accuracy"):
        del values[changing], expected_values[changing]
    assert values == expected_values
    assert row.bias.after == pytest.approx(expected.bias.after, rel=1e-5)
    assert row.plan.stack == 4
    assert not (small_cache.path / "heads").exists()


def test_existing_results_are_not_fitted_again(small_cache):
    assert sweep(grid(small_cache)).fitted == 24
    before = (small_cache.path / "results.jsonl").read_bytes()
    again = sweep(grid(small_cache))
    assert (again.fitted, again.heads) == (0, 24)
    assert (small_cache.path / "results.jsonl").read_bytes() == before
    assert len(again.lines) == 4
    assert again.lines[0].average_accuracy is not None
    wider = SweepConfig(small_cache.path, values=GRID | {"hidden": (4, 8, 16)}, seed=(0, 1, 2, 3))
    assert sweep(wider).fitted == 2 * (3 * 2 * 4 - 12)
    assert (small_cache.path / "results.jsonl").read_bytes().startswith(before)


def test_results_of_other_data_or_settings_are_not_reused(small_cache, tmp_path):
    results = tmp_path / "results"
    sweep(grid(small_cache, results=results))
    other = write_cache(tmp_path / "other", {"a": 50, "b": 11})
    assert sweep(SweepConfig(other, values=GRID, seed=(0, 1, 2), results=results)).fitted == 12  # b is the same
    assert sweep(grid(small_cache, results=results, fraction=(0.5,))).fitted == 24
    assert sweep(grid(small_cache, results=results, shared=True)).fitted == 12
    assert sweep(grid(small_cache, results=results, holdout=0.3)).fitted == 24


def test_tasks_can_follow_later(small_cache):
    assert sweep(grid(small_cache, tasks=("b",))).fitted == 12
    result = sweep(grid(small_cache))
    assert result.fitted == 12
    assert all(line.average_accuracy is not None for line in result.lines)
    (section,) = report(small_cache.path)
    assert all("Avg" in line.values for line in section.accuracy.lines)


def test_a_fit_is_a_sweep_of_one_and_each_knows_the_others_results(small_cache):
    first = fit(FitConfig(small_cache.path, ProbSettings(hidden=4, kl_weight=0, steps=60)))
    assert sweep(grid(small_cache)).fitted == 22
    rows = read_results(small_cache.path)
    assert len(rows) == 24
    settings = ProbSettings(hidden=8, kl_weight=0, steps=60)
    second = fit(FitConfig(small_cache.path, settings))  # the results exist, the head does not
    assert not second.repeated
    assert load_head(second.path).settings == settings
    assert read_results(small_cache.path) == rows
    assert first.rows[0] in rows


def test_heads_are_kept_on_request(small_cache):
    sweep(grid(small_cache, seed=(0,)))
    config = grid(small_cache, seed=(0, 1), keep_heads=True)
    assert sweep(config).fitted == 16
    names = sorted(path.name for path in (small_cache.path / "heads").iterdir())
    assert len(names) == 8
    head = load_head(small_cache.path / "heads" / "prob-h8-steps60-kl0.01-seed1")
    alone = fit(FitConfig(small_cache.path, head.settings, seed=1))
    assert alone.repeated
    assert sweep(config).fitted == 0
    assert len(read_results(small_cache.path)) == 16


def test_an_interrupt_keeps_every_finished_head(small_cache):
    """Some stacks are done while others are not: the heads have two shapes, and six streams of batches."""
    seen = []

    def interrupt(done, total, best):
        seen.append((done, total))
        if done > 0.7 * total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep(grid(small_cache), interrupt)
    kept = len(read_results(small_cache.path))
    assert 12 <= kept < 24
    assert seen[0][1] == 24 * 60
    assert sweep(grid(small_cache)).fitted == 24 - kept


def test_the_best_so_far_is_by_bias_and_does_not_depend_on_labels(tmp_path):
    def permute(task, arrays):
        return arrays | {"labels": np.random.default_rng(1).permutation(arrays["labels"])}

    shown, accuracies = [], []
    for name, change in (("straight", lambda task, arrays: arrays), ("permuted", permute)):
        path = write_cache(tmp_path / name, {"a": 200, "b": 80}, change=change)
        texts = []
        result = sweep(SweepConfig(path, values=GRID), lambda done, total, best, texts=texts: texts.append(best))
        shown.append(texts)
        accuracies.append([line.average_accuracy.mean for line in result.lines])
        least = min(result.lines, key=lambda line: line.average_bias.mean)
        assert f"{least.average_bias.mean:.3f}" in texts[-1]
        assert f"h{least.setting['hidden']}-" in texts[-1]
    assert shown[0] == shown[1]
    assert shown[0][0] == ""
    assert accuracies[0] != accuracies[1]


def result_of(small_cache, head, biases):
    """A result with these biases after the head, by task."""
    (row,) = fit(FitConfig(small_cache.path, SurgerySettings(steps=1), tasks=("a",))).rows
    rows = [
        structs.replace(row, head=head, task=task, bias=Bias(before=1.0, after=bias)) for task, bias in biases.items()
    ]
    return FitResult(FitConfig(cache=None, tasks=("a", "b")), rows)


def test_the_best_so_far_has_every_task(small_cache):
    best = sweep_module._BestSoFar()
    best.note(result_of(small_cache, "one", {"a": 0.1}))
    assert best.text == ""
    best.note(result_of(small_cache, "one", {"a": 0.1, "b": 0.3}))
    assert best.text == "least bias so far 0.200 (one)"
    best.note(result_of(small_cache, "two", {"a": 0.25, "b": 0.25}))
    assert best.text == "least bias so far 0.200 (one)"


def test_settings_are_finished_one_by_one(small_cache):
    """Those that exist come first, and each as soon as its last head is evaluated."""
    configs = grid(small_cache, seed=(0,)).expand()
    fit_module.fit_all(configs[-1:], keep_heads=False)
    events = []
    results = fit_module.fit_all(
        configs,
        keep_heads=False,
        progress=lambda done, total, *_: events.append((done, total)),
        finished=lambda result: events.append(result),
    )
    finished = [event for event in events if isinstance(event, FitResult)]
    assert finished[0] == results[-1]
    assert sorted(map(id, (r.config.head for r in finished))) == sorted(map(id, (r.config.head for r in results)))
    assert all(len(result.rows) == 2 for result in finished)
    assert events.index(finished[1]) < len(events) - 2


def test_the_command_prints_a_table_and_a_grid(small_cache, run):
    common = ("sweep", "--cache", small_cache.path, "--steps", "60", "--seed", "0,1")
    code, out, _ = run(*common, "--hidden", "4,8", "--kl-weight", "0,1e-2")
    assert code == 0
    assert "transductive); mean and standard deviation over seeds" in out
    assert "hidden 8 kl-weight 0.01" in out
    assert "±" in out
    assert r"hidden \ kl-weight" in out
    assert "16 of 16 heads fitted" in out
    code, out, _ = run(*common, "--hidden", "4,8")
    assert "0 of 8 heads fitted" not in out
    code, out, _ = run(*common, "--hidden", "4,8", "--kl-weight", "0,1e-2", "--json")
    printed = json.loads(out)
    assert printed["fitted"] == 0
    assert len(printed["lines"]) == 4
    assert printed["lines"][0]["accuracy"]["a"].keys() == {"mean", "sd", "seeds", "by_seed"}


def test_several_kinds_of_head_in_one_table(small_cache, run):
    code, out, err = run(
        *("sweep", "--cache", small_cache.path, "--head", "prob,surgery,ridge"),
        *("--rank", "2,4", "--steps", "60", "--fraction", "0.5,1"),
    )
    assert code == 0, err
    assert "head surgery rank 4 fraction 0.5" in out
    assert "head ridge fraction 1" in out
    assert "16 of 16 heads fitted" in out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--hidden", ","), ["--hidden", "an item of ',' is empty"]),
        (("--seed", ""), ["--seed is empty"]),
        (("--head", ","), ["--head", "an item of ',' is empty"]),
        (("--hidden", "64,32,64"), ["--hidden names 64 2 times"]),
        (("--kl-weight", "1e-4,0.0001"), ["--kl-weight names 0.0001 2 times"]),
        (("--tasks", "a,a"), ["a task is named twice"]),
        (("--tasks", "a,z"), ["unknown task 'z'", "a, b"]),
        (("--hidden", "64,wide"), ["--hidden", "'wide' is not a whole number"]),
        (("--hidden", "64,0"), ["--hidden is 0", "from 1 to"]),
        (("--lr", "0.1,-1"), ["--lr is -1.0"]),
        (("--kl-weight", "0,nan"), ["--kl-weight is nan"]),
        (("--fraction", "0.5,1.5"), ["--fraction is 1.5"]),
        (("--seed", "0,-1"), ["--seed is -1"]),
        (("--loss", "l1,l3"), ["unknown loss 'l3'", "l1, mse"]),
        (("--head", "prob,magic"), ["unknown head 'magic'"]),
        (("--optimizer", "joint,both"), ["unknown optimizer 'both'", "separate, joint"]),
        (("--optimizer", "joint", "--shared"), ["--optimizer joint is for heads of one task each"]),
        (("--rank", "4,8"), ["--rank is not a setting of prob heads"]),
        (("--head", "ridge", "--shared"), ["--shared is for heads that correct features step by step"]),
        (("--workers", "-1"), ["--workers is -1"]),
        (("--device", "tpu"), ["unknown device 'tpu'"]),
        (("--tf32", "--device", "cpu"), ["--tf32 is for CUDA devices"]),
        (("--holdout", "1"), ["--holdout is 1.0"]),
    ],
)
def test_bad_grids_are_refused_before_anything_is_fitted(small_cache, run, options, words):
    before = sorted(small_cache.path.rglob("*"))
    refused(run("sweep", "--cache", small_cache.path, *options), *words)
    assert sorted(small_cache.path.rglob("*")) == before


def test_a_grid_that_memory_does_not_hold_is_refused_with_its_size(small_cache, run, monkeypatch):
    many = ",".join(map(str, range(3_000)))
    refused(
        run("sweep", "--cache", small_cache.path, "--seed", many, "--hidden", many.removeprefix("0,"), "--lr", "1,2"),
        *("35,988,000 heads need about", "GiB", "in parts"),
    )
    names = ("hidden", "kl-weight", "samples", "steps", "batch-size")
    every = [part for name in names for part in (f"--{name}", ",".join(map(str, range(1, 1_000))))]
    refused(run("sweep", "--cache", small_cache.path, "--seed", many, *every), "GiB", "in parts")
    monkeypatch.setattr("probsurgery.pipeline.training.plan.available_memory", lambda device: 2**15)
    with pytest.raises(InputError, match="24 heads need about .*run the grid in parts"):
        sweep(grid(small_cache))


def test_an_interrupt_from_the_terminal_is_one_line_and_leaves_nothing_behind(small_cache, tmp_path, torch_trains):
    """Ctrl-C goes to the whole process group, workers that are just starting included; SIGTERM to the command."""
    (scratch := tmp_path / "scratch").mkdir()
    command = [sys.executable, "-m", "probsurgery", "sweep", "--cache", small_cache.path, "--workers", "2"]
    command += ["--hidden", "64,32", "--steps", "1000000"]
    for number, status in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        sent = subprocess.Popen(
            list(map(str, command)),
            env=os.environ | {"TMPDIR": str(scratch)},
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        parent, deadline = psutil.Process(sent.pid), time.monotonic() + 60
        while len(parent.children()) < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.3)
        workers = parent.children()
        assert len(workers) == 2
        os.killpg(sent.pid, number)
        _, err = sent.communicate(timeout=60)
        assert sent.returncode == status
        assert err.count("\n") == (1 if number == signal.SIGINT else 0), err
        assert not any(worker.is_running() for worker in workers)
        assert list(scratch.iterdir()) == []


def test_a_full_scratch_folder_is_one_line(small_cache, run, monkeypatch, torch_trains):
    def full(*arguments):
        raise OSError("94528 requested and 25568 written")

    monkeypatch.setattr("probsurgery.pipeline.store.memmap.np.lib.format.write_array_header_1_0", full)
    refused(run("sweep", "--cache", small_cache.path, "--workers", "1", "--hidden", "4,8"), "TMPDIR", status=1)


def test_a_line_with_a_malformed_request_is_skipped(small_cache):
    sweep(grid(small_cache))
    file = small_cache.path / "results.jsonl"
    row = json.loads(file.read_text().splitlines()[0])
    with file.open("a") as out:
        out.writelines(json.dumps(row | {"request": request}) + "\n" for request in (["x"], {}, 7))
    assert sweep(grid(small_cache)).fitted == 0


def test_ridge_beside_heads_that_take_steps(small_cache, run, monkeypatch):
    """Ridge takes no step, so that progress stands still; time passes nevertheless."""
    now = iter(range(1, 10_000))
    monkeypatch.setattr(progress_module, "time", SimpleNamespace(monotonic=lambda: float(next(now))))
    code, out, err = run("sweep", "--cache", small_cache.path, "--head", "ridge", "--penalty", "0.1,0.2,0.3")
    assert code == 0, err
    assert "6 of 6 heads fitted" in out
    assert {row.plan.precision for row in read_results(small_cache.path)} == {"fp64"}


def test_a_narrow_character_set_gets_its_table(small_cache):
    command = "import sys; sys.stdout.reconfigure(encoding='ascii'); from probsurgery.cli import main; main()"
    grid = ("--hidden", "4,8", "--steps", "10", "--seed", "0,1")
    done = processes.python(command, "sweep", "--cache", small_cache.path, *grid)
    assert done.returncode == 0, done.stderr
    assert "8 of 8 heads fitted" in done.stdout


def test_a_head_that_fails_is_named_and_the_others_are_kept(tmp_path, run):
    def overflow(task, arrays):
        return arrays | {"merged": arrays["merged"] * np.float32(1e8)} if task == "b" else arrays

    path = write_cache(tmp_path / "cache", {"a": 60, "b": 40}, change=overflow)
    command = ("sweep", "--cache", path, "--hidden", "4,8", "--loss", "mse", "--steps", "100")
    code, out, err = run(*command)
    assert code == 1
    assert err.count("error: ") == 1
    assert "prob-h4-steps100-lossmse of b, prob-h8-steps100-lossmse of b: the loss is" in err
    assert "2 of 4 heads fitted" in out
    assert "2 failed" in out
    assert {row.task for row in read_results(path)} == {"a"}
    code, out, _ = run(*command)
    assert code == 1
    assert "0 of 4 heads fitted" in out


def test_a_dead_workers_heads_are_named_and_the_others_are_kept(small_cache, run, monkeypatch, torch_trains):
    real = fit_module.execute

    def with_a_kill(jobs, plan, pool, advance):
        def kill(head_steps):
            if head_steps and not killed:
                killed.append(pool._workers[0])
                killed[0].process.kill()
            advance(head_steps)

        yield from real(jobs, plan, pool, kill)

    killed = []
    monkeypatch.setattr(fit_module, "execute", with_a_kill)
    command = ("sweep", "--cache", small_cache.path, "--hidden", "64,8", "--steps", "5000", "--workers", "1")
    code, _, err = run(*command)
    assert code == 1
    assert "prob-h64 of a, prob-h64 of b: the worker that trained it died (SIGKILL)" in err
    assert len(read_results(small_cache.path)) == 2
    monkeypatch.setattr(fit_module, "execute", real)
    code, out, _ = run(*command)
    assert code == 0
    assert "2 of 4 heads fitted" in out


def test_a_sweep_over_steps_is_one_run_whose_heads_are_those_of_runs_of_their_own(small_cache, tmp_path, monkeypatch):
    trained = []
    real = fit_module.execute
    monkeypatch.setattr(fit_module, "execute", lambda jobs, *rest: trained.extend(jobs) or real(jobs, *rest))
    config = SweepConfig(
        small_cache.path, ("surgery",), {"rank": (2, 3), "steps": (30, 90, 60)}, results=tmp_path / "one"
    )
    sweep(config)
    assert [(job.settings.steps, job.stops) for job in trained] == [(90, (30, 60))] * 4
    for number, steps in enumerate((30, 60, 90)):
        sweep(replace(config, values={"rank": (2, 3), "steps": (steps,)}, results=tmp_path / str(number)))
        own = {(row.request, row.task): row for row in read_results(tmp_path / str(number))}
        rows = [row for row in read_results(tmp_path / "one") if row.settings["steps"] == steps]
        assert len(rows) == len(own) == 4
        for row in rows:
            alone = own[row.request, row.task]
            assert (row.accuracy, row.bias) == (alone.accuracy, alone.bias)
            assert row.from_run_of == (90 if steps < 90 else None)
    assert sweep(config).fitted == 0


def test_a_long_run_that_fails_does_not_fail_the_short_ones(small_cache):
    values = {"steps": (1, 2_000), "lr": (10.0,), "kl_weight": (1e6,)}
    result = sweep(SweepConfig(small_cache.path, values=values))
    assert len(result.failures) == 2
    assert all("the loss is" in reason for _, reason in result.failures)
    assert {row.settings["steps"] for row in read_results(small_cache.path)} == {1}
    assert result.fitted == 2


def test_online_is_a_protocol_of_its_own_and_sees_every_row_once(small_cache, monkeypatch):
    trained = []
    real = fit_module.execute
    monkeypatch.setattr(fit_module, "execute", lambda jobs, *rest: trained.extend(jobs) or real(jobs, *rest))
    result = sweep(SweepConfig(small_cache.path, ("surgery",), fraction=(0.5, 1.0), online=True))
    assert result.protocol == "transductive, online"
    assert sorted((job.settings.steps, job.settings.batch_size, job.online) for job in trained) == [
        (6, 1, True),
        (11, 1, True),
        (30, 1, True),
        (60, 1, True),
    ]
    rows = read_results(small_cache.path)
    assert {row.protocol for row in rows} == {"transductive, online", "transductive, online, fraction 0.5"}
    assert {row.settings["steps"] for row in rows} == {1}
