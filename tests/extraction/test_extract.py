"""Stage one on small parts of the mini suite: what it writes, how it goes on, what it refuses."""

import errno
import hashlib
import json
import os
import signal
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader

from probsurgery.pipeline.config import ExtractConfig, FitConfig, SurgerySettings
from probsurgery.pipeline.datasets.suites import select_tasks
from probsurgery.pipeline.datasets.tasks import open_images
from probsurgery.pipeline.device import choose_device
from probsurgery.pipeline.errors import InputError, ProbsurgeryError
from probsurgery.pipeline.extraction import encode, extract, loading, run_plan
from probsurgery.pipeline.fitting.fit import fit
from probsurgery.pipeline.merging.registry import merge
from probsurgery.pipeline.models import architectures
from probsurgery.pipeline.models.architectures import MINI
from probsurgery.pipeline.models.checkpoints import digest
from probsurgery.pipeline.models.encoders import get_encoder
from probsurgery.pipeline.models.sources import Weights
from probsurgery.pipeline.store import arrays
from probsurgery.pipeline.store.cache import Cache
from probsurgery.pipeline.store.manifest import MergeIdentity
from probsurgery.pipeline.store.writer import CacheWriter
from support import damage, hub_data_set, hugging_face_config, refused, to_visual

TASKS = ("digits8", "texture")
LIMIT = 90


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch):
    """Several parts even for few rows."""
    monkeypatch.setattr(arrays, "SHARD_ROWS", 32)
    monkeypatch.setattr(arrays, "CHUNK_ROWS", 16)


def config(tmp_path, **other):
    return ExtractConfig(
        **({"arch": "mini", "tasks": TASKS, "limit": LIMIT, "root": tmp_path, "device": "cpu"} | other)
    )


def content(path):
    return {p.relative_to(path): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file() and p.suffix != ".lock"}


def values(path):
    """Every shard's digest, whatever else the manifest says."""
    return {name: spec["shards"] for name, spec in json.loads((path / "manifest.json").read_text())["arrays"].items()}


def test_features_are_those_of_the_encoders(tmp_path, store):
    (path,) = extract.extract(config(tmp_path, store=store)).caches
    cache = Cache(path)
    weights, tasks = Weights("mini"), select_tasks("mini", TASKS)
    merged = merge("ta", weights.pretrained(), weights.experts(tasks)).state
    for task in tasks:
        images = open_images(task, "test", limit=LIMIT)
        batch = torch.stack([get_encoder("mini").preprocessing.transform(images.decode(i)) for i in range(LIMIT)])
        for kind, state in (("expert", weights.expert(task)), ("merged", merged), ("pretrained", weights.pretrained())):
            with torch.no_grad():
                expected = get_encoder("mini").build(state)(batch)
            assert torch.allclose(cache.features(task.name, kind), expected, atol=1e-4), kind
        assert cache.labels(task.name).tolist() == images.labels.tolist()
    assert damage(cache) == []
    assert path.name == "mini_ta_digits8+texture"


def test_several_merges_share_a_pass_and_match_merges_of_their_own(tmp_path):
    counted, shown = [], []

    def count(done, total, what, unit=None):
        counted.append((done, total))
        shown.append((what, unit))

    both = extract.extract(config(tmp_path / "both", merges=("ta", "wa")), count)
    assert both.images == len(TASKS) * LIMIT
    assert counted[-1] == (len(TASKS) * LIMIT,) * 2
    assert ("reading the expert of digits8", "files") in shown
    assert ("merging by wa", "merges") in shown
    for name in ("ta", "wa"):
        (alone,) = extract.extract(config(tmp_path / "alone", merges=(name,))).caches
        (shared,) = (p for p in both.caches if f"_{name}_" in p.name)
        assert values(alone) == values(shared)
    assert values(both.caches[0])["test/texture/merged"] != values(both.caches[1])["test/texture/merged"]


def test_a_rerun_does_nothing(tmp_path):
    first = extract.extract(config(tmp_path))
    before = content(first.caches[0])
    again = extract.extract(config(tmp_path, batch_size=7, workers=2))
    assert again.images == 0
    assert content(first.caches[0]) == before


def test_an_interrupted_run_goes_on_to_the_same_bytes(tmp_path, monkeypatch, store):
    (whole,) = extract.extract(config(tmp_path / "whole", store=store)).caches

    def interrupt(done, total, what, unit=None):
        if unit is None and done > LIMIT * 1.5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extract.extract(config(tmp_path / "torn", store=store), interrupt)
    (torn,) = (tmp_path / "torn").iterdir()
    with pytest.raises(InputError, match="unfinished: texture"):
        Cache(torn).tasks()
    rest = extract.extract(config(tmp_path / "torn", store=store))
    assert 0 < rest.images < len(TASKS) * LIMIT
    assert values(torn) == values(whole)


def test_a_deleted_shard_is_made_again_and_only_it(tmp_path):
    (path,) = extract.extract(config(tmp_path)).caches
    before = content(path)
    lost = path / "features.zarr" / "test" / "texture" / "merged" / "c" / "1" / "0"
    lost.unlink()
    shards = values(path)
    assert extract.extract(config(tmp_path)).images == 32
    assert values(path) == shards
    manifest = Path("manifest.json")  # which records this run too
    assert content(path) | {manifest: b""} == before | {manifest: b""}


def test_splits_and_tasks_can_be_added_later(tmp_path):
    (path,) = extract.extract(config(tmp_path, only=("texture",))).caches
    assert Cache(path).tasks() == ("texture",)
    with pytest.raises(InputError, match=r"does not hold digits8 \(test\); extract it with --only digits8"):
        Cache(path).features("digits8")
    extract.extract(config(tmp_path, split="both", pretrained=False))
    cache = Cache(path)
    assert cache.tasks("train") == cache.tasks("test") == TASKS
    assert not np.array_equal(cache.features("texture", split="train"), cache.features("texture"))
    assert cache.has("texture", "pretrained")
    assert not cache.has("digits8", "pretrained")
    (at_once,) = extract.extract(config(tmp_path / "b", split="both", pretrained=False)).caches
    ours, theirs = values(path), values(at_once)
    assert all(ours[name] == theirs[name] for name in theirs)


def test_batch_size_and_workers_change_nothing_beyond_float_noise(tmp_path):
    caches = [
        Cache(extract.extract(config(tmp_path / str(i), **other)).caches[0])
        for i, other in enumerate([{"batch_size": 128}, {"batch_size": 5, "workers": 2}])
    ]
    assert caches[0].fingerprint == caches[1].fingerprint
    for task in TASKS:
        assert torch.allclose(caches[0].features(task), caches[1].features(task), atol=1e-4)


def test_half_precision_stays_near_full(tmp_path):
    full, half = (
        Cache(extract.extract(config(tmp_path / p, precision=p, dtype=d)).caches[0]).features("texture")
        for p, d in (("fp32", "float32"), ("bf16", "float16"))
    )
    assert not torch.equal(full, half)
    assert (full - half).abs().mean() < 0.1 * full.abs().mean()


@pytest.fixture
def checkpoints(tmp_path):
    """The package's checkpoints, copied into a folder of their own."""
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for name in ("pretrained", "classifiers", *TASKS):
        save_file(load_file(MINI / "weights" / f"{name}.safetensors"), folder / f"{name}.safetensors")
    return folder


def edit(folder, name, change):
    path = folder / f"{name}.safetensors"
    save_file(change(load_file(path)), path)


def test_a_merged_checkpoint_can_be_given(tmp_path, checkpoints):
    weights = Weights("mini")
    state = merge("ta", weights.pretrained(), weights.experts(select_tasks("mini", TASKS))).state
    save_file({f"visual.{n}": t.contiguous() for n, t in state.items()}, tmp_path / "mine.safetensors")
    (path,) = extract.extract(config(tmp_path, merges=(str(tmp_path / "mine.safetensors"),))).caches
    (usual,) = extract.extract(config(tmp_path)).caches
    assert path.name == "mini_mine_digits8+texture"
    assert Cache(path).identity.merge == MergeIdentity("file", {}, digest=digest(state))
    assert values(path) == values(usual)


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("texture", lambda s: {n: t for n, t in s.items() if n != "ln_post.bias"}, "lacks the key 'ln_post.bias'"),
        ("texture", lambda s: s | {"proj": s["proj"][:, :32].contiguous()}, r"has 'proj' of shape \(\d+, 32\)"),
        ("pretrained", lambda s: s | {"head.weight": torch.ones(2)}, "has a key 'head.weight'"),
        ("digits8", lambda s: s | {"proj": s["proj"] * float("nan")}, "'proj' holds NaN"),
    ],
)
def test_wrong_checkpoints_leave_nothing_behind(tmp_path, checkpoints, name, change, words):
    edit(checkpoints, name, change)
    with pytest.raises(InputError, match=words) as caught:
        extract.extract(config(tmp_path / "caches", checkpoints=str(checkpoints)))
    assert f"{name}.safetensors" in str(caught.value)
    assert not (tmp_path / "caches").exists()


def test_a_missing_checkpoint_leaves_nothing_behind(tmp_path, checkpoints):
    (checkpoints / "texture.safetensors").unlink()
    with pytest.raises(InputError, match="no checkpoint of 'texture'"):
        extract.extract(config(tmp_path / "caches", checkpoints=str(checkpoints)))
    assert not (tmp_path / "caches").exists()


def test_another_checkpoint_under_the_same_name_is_another_cache(tmp_path, checkpoints):
    (path,) = extract.extract(config(tmp_path)).caches
    before = content(path)
    edit(checkpoints, "texture", lambda s: s | {"proj": s["proj"] * 1.01})
    with pytest.raises(InputError, match=r"other settings.*checkpoints\.texture"):
        extract.extract(config(tmp_path, checkpoints=str(checkpoints)))
    assert content(path) == before
    extract.extract(config(tmp_path, checkpoints=str(checkpoints), fresh=True))
    assert values(path) != {}
    assert content(path) != before


def test_features_that_overflow_are_an_error_that_names_them(tmp_path, checkpoints):
    edit(checkpoints, "texture", lambda s: {n: t.float() for n, t in s.items()} | {"proj": s["proj"].float() * 1e6})
    with pytest.raises(ProbsurgeryError, match="features test/digits8/merged are NaN, infinite .* in row 0"):
        extract.extract(config(tmp_path, checkpoints=str(checkpoints), dtype="float16"))


def test_an_image_that_cannot_be_decoded_is_named(tmp_path, monkeypatch):
    def decode(row):
        raise OSError("broken data stream")

    monkeypatch.setattr(run_plan, "open_images", lambda *a, **k: replace(open_images(*a, **k), decode=decode))
    for workers in (0, 1):
        with pytest.raises(
            ProbsurgeryError, match=r"^image 0 of test/digits8 cannot be decoded: broken data stream; .*--skip-bad$"
        ):
            extract.extract(config(tmp_path / str(workers), workers=workers))


def test_a_decoder_that_dies_is_one_line_and_what_is_written_stays(tmp_path, monkeypatch, run):
    """The kernel kills a decoder when memory runs out."""
    (whole,) = extract.extract(config(tmp_path / "whole", batch_size=8)).caches
    command = ("extract", "--arch", "mini", "--tasks", ",".join(TASKS), "--limit", LIMIT, "--root", tmp_path)
    command += ("--workers", 1, "--batch-size", 8, "--device", "cpu")

    def decode(row, opened):
        if row == 72:  # in the last shard
            time.sleep(1)  # the shards before it are written meanwhile
            os.kill(os.getpid(), signal.SIGKILL)
        return opened.decode(row)

    def deadly(*arguments, **options):
        opened = open_images(*arguments, **options)
        return replace(opened, decode=partial(decode, opened=opened))

    with monkeypatch.context() as patch:
        patch.setattr(run_plan, "open_images", deadly)
        refused(run(*command), "a process that decodes images was lost", "--workers", "/dev/shm", status=1)
    written = values(tmp_path / "mini_ta_digits8+texture")["test/digits8/merged"]
    assert [shard is not None for shard in written] == [True, True, False]
    assert run(*command)[0] == 0
    assert Cache(tmp_path / "mini_ta_digits8+texture").content == Cache(whole).content


@pytest.mark.parametrize(
    "text",
    [
        "DataLoader worker (pid(s) 7, 8) exited unexpectedly",
        "Caught RuntimeError in DataLoader worker process 0.\nTraceback\nRuntimeError: unable to allocate memory",
        "Too many open files. Communication with the workers is no longer possible. Please increase the limit",
        "received 0 items of ancdata",
    ],
)
def test_every_loss_of_a_decoder_is_one_error(text):
    lost = "a process that decodes images was lost .*fewer --workers"
    with pytest.raises(ProbsurgeryError, match=lost), loading.lost_workers():
        raise RuntimeError(text)
    with pytest.raises(RuntimeError, match="mat1 and mat2"), loading.lost_workers():
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")


def test_decoders_that_cannot_be_started_are_one_error(tmp_path, monkeypatch):
    def fork():
        raise OSError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", fork)
    with pytest.raises(ProbsurgeryError, match="cannot start 2 processes that decode .*fewer --workers"):
        extract.extract(config(tmp_path, workers=2))


def test_decoders_do_not_import_the_callers_script(tmp_path, monkeypatch):
    """A script without an `if __name__ == "__main__":` would start an extraction in each of them, and wait for ever."""
    (tmp_path / "script.py").write_text("from pathlib import Path\nPath(__file__).with_name('ran').touch()\n")
    script = ModuleType("__main__")
    script.__file__ = str(tmp_path / "script.py")
    monkeypatch.setitem(sys.modules, "__main__", script)
    monkeypatch.setattr(loading, "DataLoader", partial(DataLoader, multiprocessing_context="spawn", timeout=100))
    assert extract.extract(config(tmp_path, tasks=("digits8",), limit=8, workers=1)).images == 8
    assert not (tmp_path / "ran").exists()
    assert sys.modules["__main__"] is script


def test_images_that_cannot_be_decoded_can_be_left_out(tmp_path, monkeypatch, store):
    """They are recorded, no reader of the cache sees them, and the others' features are as without them."""
    (whole,) = extract.extract(config(tmp_path / "whole", store=store)).caches

    def some_broken(task, *rest, **named):
        images = open_images(task, *rest, **named)

        def decode(row):
            if task.name == "texture" and row in (3, 40, 41):
                raise Image.DecompressionBombError("too large\nfor anyone")
            return images.decode(row)

        return replace(images, decode=decode)

    monkeypatch.setattr(run_plan, "open_images", some_broken)
    request = config(tmp_path / "holes", store=store, skip_bad=True)
    result = extract.extract(request)
    assert result.notes == ["texture (test): 3 images left out, rows 3, 40, 41"]
    cache, kept = Cache(result.caches[0]), [row for row in range(LIMIT) if row not in (3, 40, 41)]
    assert cache.skipped("texture") == {3: "too large", 40: "too large", 41: "too large"}
    assert cache.skipped("digits8") == {}
    assert cache.rows("texture") == len(cache.labels("texture")) == LIMIT - 3
    for kind in ("merged", "expert", "pretrained"):
        assert torch.allclose(cache.features("texture", kind), Cache(whole).features("texture", kind)[kept], atol=1e-5)
    assert torch.equal(cache.labels("texture"), Cache(whole).labels("texture")[kept])
    assert cache.task_fingerprint("texture") != Cache(whole).task_fingerprint("texture")
    assert cache.task_fingerprint("digits8") == Cache(whole).task_fingerprint("digits8")
    rows = fit(FitConfig(cache.path, SurgerySettings(steps=30))).rows
    assert [row.eval_rows for row in rows] == [LIMIT, LIMIT - 3]
    assert extract.extract(request).images == 0


def test_half_precision_is_compared_with_full_and_what_is_far_off_refused(tmp_path, monkeypatch):
    manifest = Cache(extract.extract(config(tmp_path / "fp32")).caches[0]).manifest
    assert not manifest.precision
    result = extract.extract(config(tmp_path / "bf16", precision="bf16"))
    assert Cache(result.caches[0]).identity.precision == "bf16 weights"  # not mixed with those of autocast
    measured = Cache(result.caches[0]).manifest.precision
    assert set(measured) == {f"test/{t}/{kind}" for t in TASKS for kind in ("merged", "expert", "pretrained")}
    assert all(0 < difference < 0.05 for difference in measured.values())
    assert "differ from fp32 by at most" in result.notes[0]
    monkeypatch.setattr(encode, "_MOST_DIFFERENCE", 1e-6)
    with pytest.raises(ProbsurgeryError, match=r"bf16 changes the first features of .* use --precision fp32"):
        extract.extract(config(tmp_path / "strict", precision="bf16"))


def test_weights_are_cast_once_and_fp32_says_what_that_could_gain(tmp_path, monkeypatch):
    tower = torch.nn.Linear(4, 2)
    assert {p.dtype for p in encode.cast(tower, "bf16").parameters()} == {torch.bfloat16}
    assert tower.weight.dtype == torch.float32
    monkeypatch.setattr(extract, "_WORTH_A_NOTE", 0)
    monkeypatch.setattr(extract, "multiplies_bf16", lambda device: True)
    assert any("--precision bf16" in note for note in extract.extract(config(tmp_path / "fp32")).notes)
    assert not any("--precision" in note for note in extract.extract(config(tmp_path / "bf", precision="bf16")).notes)


def test_the_manifest_says_what_a_cache_was_made_from(tmp_path):
    (path,) = extract.extract(config(tmp_path)).caches
    manifest = json.loads((path / "manifest.json").read_text())
    for name in ("pretrained", *TASKS):
        file = MINI / "weights" / f"{name}.safetensors"
        held = manifest["files"][name]
        assert held["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
        assert (held["source"], held["bytes"]) == (file.name, file.stat().st_size)
    assert manifest["files"]["classifier texture"]["source"] == "classifiers.safetensors"
    (run,) = manifest["runs"]
    assert run["images"] == LIMIT * len(TASKS)
    assert set(run["seconds"]) == {"prepare", "merge", "read", "encode", "write"}


def test_a_write_that_fails_ends_the_run_and_the_next_goes_on(tmp_path, monkeypatch, store):
    (whole,) = extract.extract(config(tmp_path / "whole", store=store)).caches
    write, calls = CacheWriter.write, []

    def full(self, part, values, skipped=None):
        calls.append(part)
        if len(calls) == 5:  # two for the classifiers
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, part, values, skipped)

    monkeypatch.setattr(CacheWriter, "write", full)
    with pytest.raises(OSError, match="No space left"):
        extract.extract(config(tmp_path / "torn", store=store))
    monkeypatch.setattr(CacheWriter, "write", write)
    rest = extract.extract(config(tmp_path / "torn", store=store))
    assert rest.images == len(TASKS) * LIMIT - 2 * 32
    assert values(rest.caches[0]) == values(whole)


def test_the_papers_tasks_are_extracted_from_files_in_the_published_formats(tmp_path, monkeypatch):
    """Two of the eight tasks, with a tower small enough to make here: parquet data, Hugging Face experts without their
    projection, classifiers from a file."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "hf"))
    tiny = architectures.Arch("tiny", config=MINI / "mini.json")
    monkeypatch.setitem(architectures.ARCHS, "tiny", tiny)
    folder, dim = tmp_path / "checkpoints", get_encoder("tiny").dim
    transformers.CLIPVisionModelWithProjection(hugging_face_config()).save_pretrained(folder / "pretrained")
    for task in ("eurosat", "svhn", "kmnist"):
        transformers.CLIPVisionModel(hugging_face_config()).save_pretrained(folder / task)
        hub_data_set(tmp_path / "data" / task, [i % 10 for i in range(40)])
    save_file({t: torch.randn(10, dim) for t in ("eurosat", "svhn", "kmnist")}, folder / "classifiers.safetensors")

    request = {"arch": "tiny", "tasks": ("svhn", "eurosat"), "checkpoints": str(folder), "data": str(tmp_path / "data")}
    request |= {"any_rows": True}
    (path,) = extract.extract(config(tmp_path, merges=("ties",), limit=None, **request)).caches
    cache = Cache(path)
    assert path.name == "tiny_ties_eurosat+svhn"
    assert cache.tasks() == ("eurosat", "svhn")
    assert cache.labels("svhn").tolist() == [i % 10 for i in range(40)]
    assert cache.features("eurosat", "pretrained").equal(cache.features("svhn", "pretrained"))
    assert not cache.features("eurosat", "expert").equal(cache.features("svhn", "expert"))
    rows = fit(FitConfig(path, SurgerySettings(steps=30))).rows
    assert all(row.bias.after < row.bias.before for row in rows)

    request |= {"suite": "clip20", "tasks": ("eurosat", "kmnist")}
    more = extract.extract(config(tmp_path, merges=("ties",), limit=None, **request))
    assert more.caches[0].name == "tiny-clip20_ties_eurosat+kmnist"
    assert Cache(more.caches[0]).identity.suite == "clip20"
    assert more.taken == {path.name: 2 * 40}  # the features of eurosat by its expert and the pre-trained encoder


def test_devices_that_are_not_there_are_refused():
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("auto").type in ("cpu", "cuda")
    for name in ("tpu", "cuda:99", "gpu"):
        with pytest.raises(InputError, match=r"unknown device|CUDA devices"):
            choose_device(name)


def test_packaged_weights_are_read_in_float32():
    state = Weights("mini").pretrained()
    assert {t.dtype for t in state.values()} == {torch.float32}
    packaged = to_visual(load_file(MINI / "weights" / "pretrained.safetensors"))
    assert all(torch.equal(tensor, packaged[name].float()) for name, tensor in state.items())
    assert digest(state) == digest({name: tensor.float() for name, tensor in packaged.items()})


@pytest.mark.gpu
def test_cuda_agrees_with_the_cpu(tmp_path):
    cpu, cuda = (
        Cache(extract.extract(config(tmp_path / device, device=device)).caches[0]) for device in ("cpu", "cuda")
    )
    assert cpu.fingerprint == cuda.fingerprint
    for task in TASKS:
        assert torch.allclose(cpu.features(task), cuda.features(task), atol=1e-3)
