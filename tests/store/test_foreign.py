"""Results, heads and caches of other people: what has not its form is one line that names the file, or passed over."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from probsurgery.pipeline.config import FitConfig, ProbSettings
from probsurgery.pipeline.errors import DamagedCacheError, InputError, PassedOverWarning
from probsurgery.pipeline.files import MalformedError, open_file, parse_json, read_json
from probsurgery.pipeline.fitting.fit import fit
from probsurgery.pipeline.heads.head import load_head
from probsurgery.pipeline.store.cache import Cache
from probsurgery.pipeline.store.results import read_results
from probsurgery.pipeline.store.zarr_format import ZarrFormat, zarr
from support import damage, refused, write_cache

PROB = ProbSettings(hidden=8, steps=5)


@pytest.fixture
def fitted(small_cache):
    """A cache with one kept head of both tasks, and a row of results for each."""
    fit(FitConfig(small_cache.path, PROB, name="mine"))
    return small_cache


def add_line(cache, change):
    """Append the first row, changed, to results.jsonl. Text is written as it is."""
    file = cache.path / "results.jsonl"
    row = json.loads(file.read_text(errors="replace").splitlines()[0]) | {"request": "other"}
    with file.open("a", encoding="utf-8", errors="surrogatepass") as out:
        out.write((change if isinstance(change, str) else json.dumps(row | change(row))) + "\n")


ROWS = {
    "infinite": lambda row: {"accuracy": row["accuracy"] | {"head": float("inf")}},
    "NaN": lambda row: {"bias": {"before": float("nan"), "after": 0.1}},
    "huge integer": lambda row: {"seconds": 10**400},
    "accuracy of 5": lambda row: {"accuracy": row["accuracy"] | {"head": 5}},
    "accuracy of -3": lambda row: {"accuracy": row["accuracy"] | {"merged": -3}},
    "pretrained of 2": lambda row: {"accuracy": row["accuracy"] | {"pretrained": 2.0}},
    "negative bias": lambda row: {"bias": {"before": 0.1, "after": -0.1}},
    "lone surrogate": lambda row: {"protocol": "\ud800"},
    "long name": lambda row: {"head": "x" * 5_000},
    "name of another folder": lambda row: {"head": "../../x"},
    "formula": lambda row: {"kind": "=cmd|' /C calc'!A0"},
    "list among settings": lambda row: {"settings": {"rank": [4]}},
    "huge setting": lambda row: {"settings": {"rank": 10**400}},
    "odd setting": lambda row: {"settings": {"\x1b": 1}},
    "bool for int": lambda row: {"seed": True},
    "negative size": lambda row: {"eval_rows": -1},
    "seed beyond all": lambda row: {"seed": 2**70},
    "not a row": "[]",
    "not JSON": "{",
    "too large a number": '{"seconds": 1e400}',
    "not UTF-8": "\udcff",
    "deep": "[" * 100_000,
}


@pytest.mark.parametrize("change", ROWS.values(), ids=ROWS)
def test_a_bad_row_is_passed_over_with_a_note_of_its_file_and_line(fitted, run, change):
    before = run("report", "--cache", fitted.path, "--all")
    add_line(fitted, change)
    add_line(fitted, lambda row: {"seed": 1})
    with pytest.warns(PassedOverWarning, match="results.jsonl: line 3 is passed over"):
        assert [row.seed for row in read_results(fitted.path)] == [0, 0, 1]
    status, out, err = run("report", "--cache", fitted.path, "--all")
    assert (status, before[0]) == (0, 0)
    assert err.count("\n") == 1
    assert f"{fitted.path / 'results.jsonl'}: line 3 is passed over" in err
    assert err[:-1].isprintable()
    assert len(err) < 500
    assert "ProbSurgery" in out


def test_many_bad_rows_are_one_note(fitted, run):
    for _ in range(3):
        add_line(fitted, "{}")
    assert "3 lines are passed over (the first is line 3: " in run("report", "--cache", fitted.path)[2]


def test_results_are_no_pipe_and_no_link(fitted, tmp_path, run):
    """A link would be written through, and a pipe waited on."""
    victim, results = tmp_path / "victim", tmp_path / "elsewhere"
    victim.write_text("mine")
    results.mkdir()
    file = results / "results.jsonl"
    command = ("--cache", fitted.path, "--results", results)
    for make in (lambda: file.symlink_to(victim), lambda: file.symlink_to(tmp_path / "new"), lambda: os.mkfifo(file)):
        make()
        refused(run("fit", *command, "--steps", 5, "--hidden", 8), file, "is a")
        refused(run("report", *command), file, "is a")
        file.unlink()
    assert victim.read_text() == "mine"
    assert not (tmp_path / "new").exists()


def test_only_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name in (tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(InputError, match="is a pipe or device"):
            open_file(tmp_path / name)
    with pytest.raises(IsADirectoryError):
        open_file(tmp_path)


@pytest.mark.parametrize("text", ["NaN", "-Infinity", "1e400", "[1, -1e999]", "\ufeff1", "[1,]", '"', "1" * 5_000])
def test_what_is_not_json_is_not_read(tmp_path, text):
    (tmp_path / "x").write_text(text)
    with pytest.raises(MalformedError, match="not valid JSON"):
        read_json(tmp_path / "x", 10_000)
    assert parse_json(b"[1.5, -0.0, 1e-400]") == [1.5, 0.0, 0.0]


HEADS = {
    "results that are no list": lambda plain: plain | {"results": {}},
    "a list for a task": lambda plain: plain | {"tasks": [["a"], "b"]},
    "a task twice": lambda plain: plain | {"tasks": ["a", "a"]},
    "no task": lambda plain: plain | {"tasks": []},
    "huge rate": lambda plain: plain | {"settings": plain["settings"] | {"lr": 10**400}},
    "rate out of range": lambda plain: plain | {"settings": plain["settings"] | {"lr": 11.0}},
    "bool for a rate": lambda plain: plain | {"settings": plain["settings"] | {"lr": True}},
    "bool for steps": lambda plain: plain | {"settings": plain["settings"] | {"steps": True}},
    "negative width": lambda plain: plain | {"settings": plain["settings"] | {"hidden": -8}},
    "a list for a loss": lambda plain: plain | {"settings": plain["settings"] | {"loss": ["l1"]}},
    "unknown setting": lambda plain: plain | {"settings": plain["settings"] | {"head": "prob"}},
    "unknown kind": lambda plain: plain | {"head": "linear"},
    "negative dim": lambda plain: plain | {"dim": -16},
    "bool for dim": lambda plain: plain | {"dim": True},
    "seconds of NaN": lambda plain: plain | {"seconds": float("nan")},
    "accuracy of 5": lambda plain: plain | {"results": [plain["results"][0] | {"accuracy": dict.fromkeys("mh", 5)}]},
}


@pytest.mark.parametrize("change", HEADS.values(), ids=HEADS)
def test_a_bad_description_of_a_head_is_one_line(fitted, run, change):
    file = fitted.path / "heads" / "mine" / "head.json"
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    said = refused(run("fit", "--cache", fitted.path, "--name", "mine", "--steps", 5, "--hidden", 8))
    assert str(file.parent) in said
    assert len(said) < 500


@pytest.mark.parametrize("command", [["report", "--uncertainty"], ["transfer"]])
def test_a_bad_head_among_several_is_passed_over_with_a_note(fitted, run, command):
    fit(FitConfig(fitted.path, PROB, name="other", seed=1))
    file = fitted.path / "heads" / "mine" / "head.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"dim": 0}))
    status, out, err = run(*command, "--cache", fitted.path)
    assert status == 0
    assert "seed 1" in out
    assert f"a head is passed over: the head at {file.parent} is damaged" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int32, torch.int64, torch.bool])
def test_a_head_of_another_type_is_one_line(fitted, dtype):
    file = fitted.path / "heads" / "mine" / "head.safetensors"
    save_file({name: values.to(dtype) for name, values in load_file(file).items()}, file)
    with pytest.raises(InputError, match="mine is damaged .*float32"):
        load_head(file.parent)


def test_metadata_that_change_while_a_cache_is_open_are_noticed(tmp_path, monkeypatch):
    """Arrays stay open: each is opened once, and again when its metadata are others."""
    monkeypatch.setattr("probsurgery.pipeline.store.arrays.SHARD_ROWS", 512)
    cache = Cache(write_cache(tmp_path / "cache", {"a": 2_000}))
    assert isinstance(cache.format, ZarrFormat)
    opened, open_array = [], zarr.open_array
    monkeypatch.setattr(zarr, "open_array", lambda *a, **named: opened.append(named["path"]) or open_array(*a, **named))
    features = cache.features("a")
    assert torch.equal(cache.features("a"), features)
    assert opened == ["test/a/merged"]
    file = cache.path / "features.zarr" / "test" / "a" / "merged" / "zarr.json"
    about = file.read_text()
    file.write_text(about.replace('"c/', '"d/').replace('"separator": "/"', '"separator": "."'))
    assert file.read_text() != about
    with pytest.raises(DamagedCacheError, match="metadata was changed"):
        cache.features("a")
    assert damage(cache)
    file.write_text(about)
    assert torch.equal(cache.features("a"), features)


EVIL = "\x1b[31m$x_{ \u202e"


@pytest.mark.parametrize("form", ["text", "markdown", "latex", "csv", "json"])
def test_text_of_results_controls_nothing_in_any_format(fitted, run, form):
    add_line(fitted, lambda row: {"protocol": EVIL, "settings": row["settings"] | {"loss": EVIL}})
    status, out, err = run("report", "--cache", fitted.path, "--all", "--format", form)
    assert (status, err) == (0, "")
    assert "31m" in out
    assert out.replace("\n", "").isprintable()


def test_text_of_results_controls_nothing_in_figures_and_pages(tmp_path, run, recwarn):
    """Nor does a folder's name, which matplotlib would take for a formula and may not close."""
    path = write_cache(tmp_path / "a$b{ \x1b[31m_", {"a": 60, "b": 11})
    fit(FitConfig(path, PROB))
    cache = Cache(path)
    add_line(cache, lambda row: {"settings": row["settings"] | {"loss": EVIL}})
    add_line(cache, lambda row: {"protocol": EVIL, "settings": row["settings"] | {"loss": "l1"}})
    add_line(cache, lambda row: {"protocol": EVIL, "settings": row["settings"] | {"loss": EVIL}})
    plots, page = tmp_path / "plots", tmp_path / "page.html"
    status, out, _ = run("report", "--cache", path, "--all", "--plots", plots, "--html", page)
    assert status == 0
    text = page.read_text()
    assert "31m$x_{" in text
    for shown in (out, text, *(file.read_text() for file in plots.glob("*.svg"))):
        assert shown.replace("\n", "").replace("\t", "").isprintable()
    assert not [w for w in recwarn if "Glyph" in str(w.message)]
