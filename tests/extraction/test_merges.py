"""Merges through both stages: settings, what is learned and kept, coefficients from files, merges made elsewhere."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from msgspec import structs
from safetensors.torch import load_file, save_file

import processes
from probsurgery.pipeline.analysis.report import report
from probsurgery.pipeline.classifier import Classifier
from probsurgery.pipeline.config import ExtractConfig, FitConfig, SurgerySettings
from probsurgery.pipeline.datasets.suites import select_tasks
from probsurgery.pipeline.datasets.tasks import Images, open_images
from probsurgery.pipeline.errors import DamagedCacheError, InputError, ProbsurgeryError
from probsurgery.pipeline.extraction import extract, loading, merges, run_plan
from probsurgery.pipeline.extraction.image_stream import image_stream, shuffled
from probsurgery.pipeline.extraction.merges import merge_requests
from probsurgery.pipeline.fitting.fit import fit
from probsurgery.pipeline.merging.coefficients import read_coefficients
from probsurgery.pipeline.merging.registry import METHODS, Coefficients, find_merge, is_merge, merge_label
from probsurgery.pipeline.models.architectures import MINI
from probsurgery.pipeline.models.checkpoints import digest
from probsurgery.pipeline.models.encoders import get_encoder
from probsurgery.pipeline.models.sources import Weights
from probsurgery.pipeline.store import maintenance
from probsurgery.pipeline.store.cache import Cache
from support import damage, refused

TASKS = ("digits8", "texture")
BRIEF = {"steps": "3", "images": "8", "batch_size": "4"}
CPU = torch.device("cpu")
MERGES = [f"ta+{name}" if row.follows else name for name, row in METHODS.items()]
NAMES = list(get_encoder("mini").shapes)


def config(root, merge="tw-adamerging", **other):
    settings = find_merge(merge).settings if is_merge(merge) else {}
    given = {"arch": "mini", "merges": (merge,), "tasks": TASKS, "limit": 40, "root": root, "device": "cpu"}
    given["merge_args"] = {key: value for key, value in BRIEF.items() if key in settings}
    return ExtractConfig(**(given | other))


class Steps:
    """A progress that notes what was learned."""

    def __init__(self):
        self.learned = []

    def __call__(self, done, total, what="", unit=None):
        if unit == "steps":
            self.learned.append((done, total, what))


def run(*arguments, **other):
    seen = Steps()
    result = extract.extract(config(*arguments, **other), seen)
    return result.caches[0], seen.learned


@pytest.fixture(scope="module")
def all_merges(tmp_path_factory):
    """Every method in one run, which encodes experts and pre-trained features once."""
    root = tmp_path_factory.mktemp("merges")
    methods = tuple(MERGES)
    result = extract.extract(config(root, merges=methods, merge_args={k: BRIEF[k] for k in BRIEF}))
    assert result.passes == 40 * len(TASKS) * (2 + len(methods))
    return dict(zip(methods, result.caches, strict=True))


@pytest.mark.parametrize("method", MERGES)
def test_every_merge_goes_through_both_stages_and_the_report(all_merges, method):
    path = all_merges[method]
    cache = Cache(path)
    assert cache.identity.merge.method == method
    assert damage(cache) == []
    rows = fit(FitConfig(path, SurgerySettings(rank=4, steps=20))).rows
    assert {row.task for row in rows} == set(TASKS)
    assert all(row.bias.after < row.bias.before for row in rows)
    (found,) = report(path)
    (name,) = found.merges
    assert name.startswith(method)
    assert f"merged ({name})" in [line.label for line in found.accuracy.lines]
    assert rows[0].merge == name


def test_merges_differ_from_each_other(all_merges):
    digests = [Cache(path).identity.merge.digest for path in all_merges.values()]
    assert len(set(digests)) == len(METHODS)


def test_multi_task_learning_is_the_checkpoint_of_the_suite(all_merges):
    own = load_file(MINI / "weights" / "traditional-mtl.safetensors")
    found = Cache(all_merges["traditional-mtl"])
    assert found.identity.merge.digest == digest({name: tensor.float() for name, tensor in own.items()})
    assert "traditional-mtl" in found.manifest.files


def test_multi_task_learning_of_another_architecture_needs_a_checkpoint(tmp_path):
    with pytest.raises(InputError, match="no traditional-mtl checkpoint of vitb32 is published; put .* --checkpoints"):
        Weights("vitb32").own("traditional-mtl")


# Settings


def test_settings_are_in_the_identity_and_in_the_name(tmp_path):
    path, learned = run(tmp_path, "ties", merge_args={"scale": "0.5", "keep": 0.2})
    assert path.name == "mini_ties-scale0.5_digits8+texture"
    assert Cache(path).identity.merge.settings == {"scale": 0.5, "keep": 0.2}
    assert merge_label("ties", Cache(path).identity.merge.settings) == "ties (scale=0.5)"
    assert learned == []
    usual, _ = run(tmp_path, "ties")
    assert usual.name == "mini_ties_digits8+texture"
    with pytest.raises(InputError, match="merge.settings.scale: 0.2 / 0.5"):
        run(tmp_path, "ties", merge_args={"scale": "0.5"}, out=run(tmp_path, "ties", merge_args={"scale": "0.2"})[0])


def test_a_setting_goes_to_the_merges_that_have_it(tmp_path):
    result = extract.extract(config(tmp_path, merges=("wa", "ta", "ties"), merge_args={"keep": "0.5"}))
    assert [path.name for path in result.caches] == [
        "mini_wa_digits8+texture",
        "mini_ta_digits8+texture",
        "mini_ties-keep0.5_digits8+texture",
    ]


def test_a_setting_may_name_the_part_that_it_is_for(tmp_path):
    arguments = {"merge_args": {"scale": "0.5", "svc.alpha": "0.5"}}
    result = extract.extract(config(tmp_path, merges=("ta+svc", "ties"), **arguments))
    assert [path.name for path in result.caches] == [
        "mini_ta+svc-scale0.5-svc.alpha0.5_digits8+texture",
        "mini_ties-scale0.5_digits8+texture",
    ]
    settings = {"scale": 0.5, "svc.alpha": 0.5, "svc.qkv": "stacked"}
    assert Cache(result.caches[0]).identity.merge.settings == settings
    with pytest.raises(InputError, match="unknown setting of ta.svc 'svc.scale'.*; choose from: scale, svc.alpha"):
        run(tmp_path, "ta+svc", merge_args={"svc.scale": "1"})
    with pytest.raises(InputError, match="--name ta.svc is the name of a method"):
        run(tmp_path, "ta", name="ta+svc")


# What is learned is kept


def test_what_was_chosen_on_images_is_recorded(tmp_path, run):
    arguments = ("extract", "--arch", "mini", "--tasks", "digits8,texture", "--limit", "20", "--root", str(tmp_path))
    code, out, _ = run(*arguments, "--merge", "ta+rescale", "--merge-arg", "images=8")
    assert code == 0
    path = out.partition(": written")[0]
    (chosen,) = Cache(path).manifest.merge.chosen.items()
    assert chosen[0] == "rescale.factor"
    assert f"chosen on images: rescale.factor={chosen[1]:g}" in run("cache", "info", path)[1]


@pytest.mark.parametrize("given", [None, "coefficients.json"])
def test_what_depends_on_the_machine_is_merged_once(tmp_path, monkeypatch, given):
    method, settings = ("tsv-m", {}) if given is None else ("tw-adamerging+svc", {"merge_args": {}})
    if given:
        settings["coefficients"] = run(tmp_path / "a", "tw-adamerging")[0] / given
    path, learned = run(tmp_path, method, only=("digits8",), **settings)
    assert learned == []
    assert digest(load_file(path / "merged.safetensors")) == Cache(path).identity.merge.digest
    monkeypatch.setattr(merges, "merge", None)  # so that nothing is merged from here on
    assert run(tmp_path, method, **settings)[0] == path
    assert damage(Cache(path)) == []
    if given:
        values = json.loads(settings["coefficients"].read_text())
        values["coefficients"]["digits8"] /= 2
        (tmp_path / "other.json").write_text(json.dumps(values))
        with pytest.raises(TypeError):  # other coefficients are merged
            run(tmp_path, method, **(settings | {"coefficients": tmp_path / "other.json"}))


@pytest.mark.parametrize("method", ["lw-adamerging", "fisher"])
def test_what_was_learned_is_not_learned_again(tmp_path, method):
    path, learned = run(tmp_path, method, only=("digits8",))
    assert learned[-1][0] == learned[-1][1] > 0
    identity = Cache(path).identity
    kept = load_file(path / "merged.safetensors")
    assert digest(kept) == identity.merge.digest
    again, learned = run(tmp_path, method)  # the other task, from the same merged model
    assert (again, learned) == (path, [])
    assert Cache(path).identity == identity
    assert Cache(path).is_whole("texture")
    tower = get_encoder("mini").build({name: tensor.float() for name, tensor in kept.items()})
    images = open_images(select_tasks("mini", ["texture"])[0], "test", limit=40)
    batch, _ = next(loading.read_batches(images, get_encoder("mini"), [list(range(40))], 0, CPU))
    expected = tower(batch).detach()
    assert torch.allclose(Cache(path).features("texture"), expected, atol=1e-4)
    _, learned = run(tmp_path, method, fresh=True)
    assert learned


def test_the_manifest_says_how_it_was_learned(tmp_path):
    path, learned = run(tmp_path)
    record = Cache(path).manifest.merge
    assert record.entropy["first"] > 0
    assert record.seconds > 0
    assert learned[-1][2].startswith("task-wise coefficients: entropy ")
    tasks = Cache(path).manifest.tasks
    assert record.images == {task: tasks[task].splits["test"].fingerprint for task in TASKS}
    assert record.coefficients.keys() == set(TASKS)


def test_labels_play_no_part_in_what_is_learned(tmp_path, monkeypatch):
    digests = []
    for shuffle in (False, True):

        def opened(*arguments, shuffle=shuffle, **other):
            images = open_images(*arguments, **other)
            labels = images.labels[::-1].copy() if shuffle else images.labels
            return Images(labels, images.fingerprint, images.decode)

        monkeypatch.setattr(run_plan, "open_images", opened)
        for method in ("lw-adamerging++", "fisher", "regmean", "concrete-am"):
            digests.append(Cache(run(tmp_path / str(shuffle), method)[0]).identity.merge.digest)
    assert digests[:4] == digests[4:]
    asked = {"labels": "true", "images": "8"}
    true, other = (Cache(run(tmp_path / p, "fisher", merge_args=asked)[0]) for p in ("True", "more"))
    assert true.identity.merge.digest == other.identity.merge.digest  # both see the shuffled ones
    assert true.identity.merge.digest not in digests


def test_train_images_are_those_of_the_train_split(tmp_path):
    path, _ = run(tmp_path, "regmean", merge_args={"images": "8", "split": "train"})
    train = open_images(select_tasks("mini", ["texture"])[0], "train", limit=40).fingerprint
    assert Cache(path).manifest.merge.images["texture"] == train
    assert "train" not in Cache(path).manifest.tasks["texture"].splits


def test_another_cache_is_refused_before_anything_is_learned(tmp_path):
    out = run(tmp_path, "wa")[0]
    seen = Steps()
    with pytest.raises(InputError, match="merge.method: wa / tw-adamerging"):
        extract.extract(config(tmp_path, out=out), seen)
    assert seen.learned == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, ProbsurgeryError("no")])
def test_nothing_is_left_of_learning_that_was_cut_short(tmp_path, error):
    def stop(done, total, what="", unit=None):
        if unit == "steps" and done == 2:
            raise error

    with pytest.raises(KeyboardInterrupt if error is KeyboardInterrupt else ProbsurgeryError):
        extract.extract(config(tmp_path), stop)
    assert list(tmp_path.iterdir()) == []


def test_a_cache_that_lost_what_it_learned_before_any_feature_is_begun_again(tmp_path, monkeypatch):
    """As a kill leaves it that comes after the manifest and before the merged weights."""

    def killed(writer, made):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(extract, "store_learned", killed)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path)
    manifest = json.loads(
        (tmp_path / "mini_tw-adamerging-steps3-batch-size4_digits8+texture/manifest.json").read_text()
    )
    make = extract.make_merge
    monkeypatch.setattr(extract, "make_merge", lambda *given: nudged(make(*given)))
    path, _ = run(tmp_path)
    assert Cache(path).identity.merge.digest != manifest["identity"]["merge"]["digest"]
    assert damage(Cache(path)) == []
    (path / "merged.safetensors").unlink()  # now features depend on it
    monkeypatch.setattr(extract, "make_merge", make)
    with pytest.raises(InputError, match="merge.digest: .*replace it with --fresh"):
        run(tmp_path)


def nudged(model):
    """A merged model as another machine would have learned it."""
    state = {name: tensor * 1.0001 for name, tensor in model.state.items()}
    return replace(model, state=state, identity=structs.replace(model.identity, digest=digest(state)))


@pytest.mark.parametrize("name", ["merged.safetensors", "coefficients.json"])
def test_damage_to_what_was_learned_is_found_and_repaired(tmp_path, name):
    path, _ = run(tmp_path)
    whole = (path / name).read_bytes()
    (path / name).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    (problem,) = damage(Cache(path))
    assert name in problem
    assert "was changed since it was written" in problem
    maintenance.repair(path)
    assert damage(Cache(path)) == []
    assert not (path / name).exists()
    again, learned = run(tmp_path)
    assert bool(learned) == (name == "merged.safetensors")
    assert (again / name).read_bytes() == whole
    assert damage(Cache(path)) == []


def test_what_was_learned_goes_where_the_cache_goes(tmp_path):
    path, _ = run(tmp_path)
    out = maintenance.convert(path, "hdf5")
    for name in ("merged.safetensors", "coefficients.json"):
        assert (out / name).read_bytes() == (path / name).read_bytes()
    assert damage(Cache(out)) == []
    assert run(tmp_path, store="hdf5", out=out)[1] == []
    (path / "merged.safetensors").write_bytes(b"x")
    with pytest.raises(DamagedCacheError, match="merged.safetensors has 1 bytes"):
        maintenance.convert(path, "hdf5", out=tmp_path / "other")
    maintenance.remove(path)
    assert not path.exists()


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["lw-adamerging++", "fisher", "regmean", "regmean++", "ta+featcal"])
def test_a_gpu_learns_what_a_cpu_does(tmp_path, method):
    states = [
        load_file(run(tmp_path / device, method, device=device)[0] / "merged.safetensors") for device in ("cpu", "cuda")
    ]
    assert all(torch.allclose(states[0][n], states[1][n], atol=1e-3) for n in NAMES)


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["concrete-ta", "concrete-am"])
def test_masks_are_learned_on_a_gpu(tmp_path, method):
    """Their noise is another on each kind of device."""
    path, learned = run(tmp_path, method, device="cuda")
    assert learned
    assert damage(Cache(path)) == []


# Coefficients


@pytest.mark.parametrize("method", ["tw-adamerging", "lw-adamerging++"])
def test_coefficients_from_a_cache_cost_no_learning_elsewhere(tmp_path, method):
    path, _ = run(tmp_path / "a", method)
    file = path / "coefficients.json"
    other, learned = run(tmp_path / "b", method, coefficients=file, merge_args={})
    assert learned == []
    assert other.name == path.name
    assert Cache(other).identity == Cache(path).identity
    assert Cache(other).content == Cache(path).content
    assert not (other / "merged.safetensors").exists()
    assert json.loads((other / "coefficients.json").read_text()) == json.loads(file.read_text())
    again, learned = run(tmp_path / "a", method, coefficients=file)  # and in the cache that they are from
    assert (again, learned) == (path, [])
    wrong = "tw-adamerging++" if method == "tw-adamerging" else "lw-adamerging"
    with pytest.raises(InputError, match=f"were learned for {method.replace('+', '.')}, not {wrong.replace('+', '.')}"):
        run(tmp_path / "c", wrong, coefficients=file, merge_args={})
    with pytest.raises(InputError, match="was learned with steps=3; leave --merge-arg steps out"):
        run(tmp_path / "c", method, coefficients=file, merge_args={"steps": "4"})
    assert not (tmp_path / "c").exists()


def test_coefficients_are_those_of_the_first_method_whatever_follows(tmp_path):
    alone, _ = run(tmp_path / "a", "tw-adamerging")
    path, learned = run(tmp_path / "a", "tw-adamerging+svc")
    assert learned
    file = path / "coefficients.json"
    assert json.loads(file.read_text()) == json.loads((alone / "coefficients.json").read_text())
    assert run(tmp_path / "a", "tw-adamerging+svc")[1] == []
    other, learned = run(tmp_path / "b", "tw-adamerging+svc", coefficients=alone / "coefficients.json", merge_args={})
    assert learned == []
    assert (other.name, Cache(other).identity) == (path.name, Cache(path).identity)


def test_other_coefficients_are_not_taken_for_those_that_a_cache_has_learned(tmp_path):
    path, _ = run(tmp_path)
    edited = json.loads((path / "coefficients.json").read_text())
    edited["coefficients"] = {"digits8": 0.9, "texture": 0.05}
    file = tmp_path / "edited.json"
    file.write_text(json.dumps(edited))
    with pytest.raises(InputError, match="merge.digest: .*replace it with --fresh"):
        run(tmp_path, coefficients=file, merge_args={})
    assert damage(Cache(path)) == []


def test_lost_coefficients_are_written_again(tmp_path):
    path, _ = run(tmp_path)
    whole = (path / "coefficients.json").read_bytes()
    for damaged in (lambda file: file.unlink(), lambda file: file.write_text("{}")):
        damaged(path / "coefficients.json")
        assert run(tmp_path)[1] == []
        assert (path / "coefficients.json").read_bytes() == whole
        assert damage(Cache(path)) == []


@pytest.mark.parametrize("dtype", [torch.int32, torch.complex64])
def test_merged_weights_are_real_numbers(tmp_path, dtype):
    file = tmp_path / "odd.safetensors"
    try:
        save_file({name: tensor.to(dtype) for name, tensor in Weights("mini").pretrained().items()}, file)
    except KeyError:
        pytest.skip(f"safetensors before 0.7 does not write {dtype}")
    with pytest.raises(InputError, match=f"in {str(dtype)[6:]}, and not in real numbers"):
        run(tmp_path / "caches", str(file))
    assert not list((tmp_path / "caches").glob("*"))


def test_published_task_wise_coefficients(tmp_path):
    """As the authors' table has them: a column of ones for the pre-trained model, then a task in each."""
    file = tmp_path / "published.txt"
    file.write_text("[[1.0000, 0.2202, 4.0e-1]]\n")
    path, learned = run(tmp_path, coefficients=file, merge_args={})
    assert learned == []
    assert path.name == "mini_tw-adamerging-published_digits8+texture"
    assert Cache(path).identity.merge.settings == {}
    weights = Weights("mini")
    experts = weights.experts(select_tasks("mini", TASKS))
    base = weights.pretrained()
    expected = {
        n: base[n] + 0.2202 * (experts["digits8"][n] - base[n]) + 0.4 * (experts["texture"][n] - base[n]) for n in base
    }
    tower = get_encoder("mini").build(expected)
    images = open_images(select_tasks("mini", ["texture"])[0], "test", limit=40)
    batch, _ = next(loading.read_batches(images, get_encoder("mini"), [list(range(40))], 0, CPU))
    assert torch.allclose(Cache(path).features("texture"), tower(batch).detach(), atol=1e-4)
    with pytest.raises(InputError, match="--merge-arg steps would have no effect"):
        run(tmp_path, coefficients=file, merge_args={"steps": 3})


def test_published_layer_wise_coefficients_have_rows_for_parameters_that_are_not_the_towers(tmp_path):
    rows = [[1.0, 0.3, 0.3]] * 3 + [[1.0, i / 100, 1 - i / 100] for i in range(len(NAMES))] + [[1.0, 0.3, 0.3]] * 3
    file = tmp_path / "published.txt"
    file.write_text(repr(rows).replace("1.0,", "1.,"))
    table = read_coefficients(file).table(TASKS, NAMES)
    assert table.shape == (2, len(NAMES))
    assert table[0].tolist() == pytest.approx([i / 100 for i in range(len(NAMES))])
    assert table[1].tolist() == pytest.approx([1 - i / 100 for i in range(len(NAMES))])
    path, _ = run(tmp_path, "lw-adamerging", coefficients=file, merge_args={})
    kept = json.loads((path / "coefficients.json").read_text())
    assert kept["tensors"] == NAMES
    assert kept["coefficients"]["digits8"][5] == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is neither JSON nor a list of numbers"),
        ("import os", "is neither JSON nor a list of numbers"),
        ("[" * 5000, "is neither JSON nor a list of numbers"),
        ("[[1.0, 0.3], [1.0]]", "holds no coefficients"),
        ("[[1.0, NaN, 0.3]]", "NaN is not a finite number"),
        ("[[1.0, 0.3, 1e30]]", "it takes numbers from -100 to 100"),
        ('{"coefficients": {"digits8": true, "texture": false}}', "it takes numbers"),
        ('{"coefficients": {"digits8": [[0.1]], "texture": [[0.1]]}}', "it takes numbers"),
        ('{"coefficients": {}}', "it is empty"),
        ("{'coefficients': {1: 0.3, 2: 0.3},}", "tasks are given by their names"),
        ('{"coefficients": {"digits8": 1, "texture": 0}, "settings": {"steps": 1' + 400 * "0" + "}}", "whole number"),
        ("[]", "holds no coefficients"),
        ("3", "holds no coefficients"),
        ('"a"', "holds no coefficients"),
        ("{}", "holds no coefficients"),
        ('{"coefficients": {"digits8": "x"}}', "holds no coefficients"),
        ('{"coefficients": {"digits8": [0.1, 0.2], "texture": [0.1, 0.2]}}', "needs a name in `tensors`"),
        ('{"coefficients": {"digits8": 0.1, "texture": 0.2}, "settings": 3}', "`settings` is a dictionary"),
        (
            '{"coefficients": {"digits8": 0.1, "mnist": 0.2}}',
            "are for digits8, mnist, but the merge is of digits8, texture",
        ),
        ("[[1.0, 0.3, 0.3, 0.3]]", "are for 3 tasks, but the merge is of digits8, texture"),
        (
            "[[1.0, 0.3, 0.3], [1.0, 0.3, 0.3]]",
            "has a coefficient for each tensor, which is not tw-adamerging; use .* lw-",
        ),
    ],
)
def test_other_files_are_no_coefficients(tmp_path, text, said):
    file = tmp_path / "c.json"
    file.write_text(text)
    with pytest.raises(InputError, match=said):
        run(tmp_path / "caches", coefficients=file, merge_args={})
    assert not list((tmp_path / "caches").glob("*"))


def test_coefficients_of_another_kind_or_another_model_are_refused(tmp_path):
    file = tmp_path / "c.txt"
    file.write_text("[[1.0, 0.3, 0.3], [1.0, 0.3, 0.3]]")
    with pytest.raises(InputError, match="for 2 tensors of each task, but the model has 56 tensors"):
        run(tmp_path / "caches", "lw-adamerging", coefficients=file, merge_args={})
    file.write_text("[[1.0, 0.3, 0.3]]")
    with pytest.raises(InputError, match="has one coefficient for each task, .* use --merge tw-adamerging.."):
        run(tmp_path / "caches", "lw-adamerging++", coefficients=file, merge_args={})
    assert not list((tmp_path / "caches").glob("*"))


def test_coefficients_in_another_order_are_put_in_ours():
    values = torch.tensor([[1.0, 2, 3], [4, 5, 6]])
    mixed = Coefficients(("b", "a"), ("z", "x", "y"), values)
    assert mixed.table(("a", "b"), ("x", "y", "z")).tolist() == [[5, 6, 4], [2, 3, 1]]
    wise = Coefficients(("b", "a"), None, torch.tensor([1.0, 2.0]))
    assert wise.table(("a", "b"), ("x", "y")).tolist() == [[2, 2], [1, 1]]


def test_numbers_survive_the_file_to_the_bit(tmp_path):
    values = torch.rand(2, 3, generator=torch.Generator().manual_seed(1))
    own = Coefficients(("a", "b"), ("x", "y", "z"), values, "lw-adamerging", {"steps": 5, "lr": 0.001})
    file = tmp_path / "c.json"
    file.write_text(json.dumps(own.to_json()))
    back = read_coefficients(file)
    assert torch.equal(back.values, values)
    assert (back.tasks, back.tensors, back.method, back.settings) == (own.tasks, own.tensors, own.method, own.settings)


# Merges that were made elsewhere


def test_a_merge_from_a_file_has_a_name_and_its_digest(tmp_path):
    file = tmp_path / "model.safetensors"
    state = Weights("mini").pretrained()
    save_file({name: 1.01 * tensor for name, tensor in state.items()}, file)
    path, _ = run(tmp_path, str(file), name="my-merge")
    assert path.name == "mini_my-merge_digits8+texture"
    cache = Cache(path)
    assert cache.identity.merge.name == "my-merge"
    file_record = cache.manifest.files["merged model"]
    assert file_record.source == "model.safetensors"
    assert file_record.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert file_record.bytes == file.stat().st_size
    rows = fit(FitConfig(path, SurgerySettings(rank=4, steps=20))).rows
    assert rows[0].merge == report(path)[0].merges[0] == "my-merge"
    unnamed, _ = run(tmp_path, str(file))
    assert unnamed.name == "mini_model_digits8+texture"
    with pytest.raises(InputError, match="exactly one path"):
        run(tmp_path, "ta", name="x")
    with pytest.raises(InputError, match="--name ta is the name of a method"):
        run(tmp_path, str(file), name="ta")


# Samples


def test_rows_come_in_permutations_one_after_the_other():
    stream = shuffled(10, 4, seed=3)
    rows = [row for _ in range(10) for row in next(stream)]
    assert all(sorted(rows[i : i + 10]) == list(range(10)) for i in range(0, 40, 10))
    assert rows[:10] != rows[10:20]
    assert rows[:4] == next(shuffled(10, 4, seed=3))
    assert rows[:4] != next(shuffled(10, 4, seed=4))
    assert len(next(shuffled(3, 8, seed=0))) == 8


@pytest.mark.parametrize("held", [True, False])
def test_samples_are_the_images_with_their_labels(monkeypatch, held):
    if not held:
        monkeypatch.setattr("probsurgery.pipeline.extraction.image_stream._HELD_BYTES", 0)
    (task,) = select_tasks("mini", ["texture"])
    images = open_images(task, "test", limit=30)
    good = images.decode

    def broken(row):
        if row == 7:
            raise OSError("truncated")
        return good(row)

    images = Images(torch.arange(30).numpy(), "", broken)
    transform = get_encoder("mini").preprocessing.transform
    classifiers = {"texture": Classifier(torch.zeros(7, 64))}

    def given(skip_bad):
        return image_stream(
            get_encoder("mini"), lambda t, s: images, classifiers, CPU, 0, skip_bad=skip_bad, progress=Steps()
        )

    found = list(given(True).take("texture", "test", 60, seed=0))
    assert sum(len(batch) for batch, _ in found) == 60
    seen = {}
    for batch, labels in found:
        seen |= dict(zip(labels.tolist(), batch, strict=True))
    assert seen.keys() == set(range(30)) - {7}
    assert all(torch.equal(image, transform(good(row))) for row, image in seen.items())
    with pytest.raises(ProbsurgeryError, match="image 7 of texture cannot be decoded: truncated"):
        list(given(False).take("texture", "test", 60, seed=0))


# Memory

SCRIPT = """
import sys, torch
from pathlib import Path
from probsurgery.pipeline.merging.registry import merge
from probsurgery.pipeline.models.checkpoints import VisualState, read_tensors
from probsurgery.pipeline.models.sources import LazyMapping

folder, method, count, keep = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]
torch.set_num_threads(1)

def resident(name):
    with open("/proc/self/status") as file:
        return 1024 * int(next(line for line in file if line.startswith(name)).split()[1])

def opened(name):
    state = VisualState(read_tensors(folder / f"{name}.safetensors"))
    return dict(state) if keep == "all at once" else state

merge(method, {"w": torch.ones(9)}, [{"w": torch.zeros(9)}])  # libraries load
pretrained = {name: tensor.clone() for name, tensor in opened("0").items()}
before = resident("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
experts = {str(i): (lambda i=i: opened(str(i))) for i in range(1, count + 1)}
experts = {n: make() for n, make in experts.items()} if keep == "all at once" else LazyMapping(experts)
experts = {n: {k: t.clone() for k, t in e.items()} for n, e in experts.items()} if keep == "all at once" else experts
state = merge(method, pretrained, experts).state
assert len(state) == len(pretrained)
size = 4 * sum(tensor.numel() for tensor in pretrained.values())
print(1 + (resident("VmHWM") - before) / size)
"""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Nine models of 64 MiB in 32 tensors."""
    folder = tmp_path_factory.mktemp("checkpoints")
    generator = torch.Generator().manual_seed(0)
    for index in range(9):
        state = {f"w{i}": torch.randn(512, 1024, generator=generator) for i in range(32)}
        save_file(state, folder / f"{index}.safetensors")
    return folder


def peak(folder, method, count, keep=""):
    """The peak of a merge, in models, the pre-trained one among them."""
    done = processes.python(SCRIPT, folder, method, count, keep)
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's record of peak memory")
@pytest.mark.parametrize(("method", "own"), [("wa", 0), ("ta", 0), ("ties", 1)])
def test_memory_does_not_grow_with_the_experts(checkpoints, method, own):
    """theta_0, the sum and one tensor of an expert; TIES has a second sum."""
    few, many = (peak(checkpoints, method, count) for count in (2, 8))
    assert many < 3 + own
    assert abs(many - few) < 0.5


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's record of peak memory")
def test_the_measure_of_memory_sees_experts_that_are_held(checkpoints):
    assert peak(checkpoints, "ta", 8, "all at once") > 9


# The command


def test_merges_lists_every_method_with_its_settings_and_paper(run):
    code, out, _ = run("merges")
    assert code == 0
    for name, row in METHODS.items():
        assert f"{name}: {row.title}" in out
        assert row.paper in out
        assert all(f"    {key}=" in out for key in row.settings)
    code, out, _ = run("merges", "--json")
    listed = json.loads(out)
    assert listed.keys() == METHODS.keys()
    assert (listed["svc"]["follows"], listed["ta"]["follows"]) == (True, False)
    assert listed["ties"]["settings"]["keep"]["default"] == 0.2


def test_the_command_takes_settings_and_says_what_was_learned(run, tmp_path):
    arguments = ("extract", "--arch", "mini", "--tasks", "digits8,texture", "--limit", "40", "--root", str(tmp_path))
    arguments += ("--merge", "lw-adamerging", "--merge-arg", "batch-size=4", "--merge-arg", "steps=3")
    code, out, err = run(*arguments)
    assert code == 0
    assert "mini_lw-adamerging-steps3-batch-size4_digits8+texture: written" in out
    assert "merge " in err
    (path,) = tmp_path.iterdir()
    code, out, _ = run("cache", "info", str(path))
    assert "merged by lw-adamerging initial=0.3 steps=3" in out
    code, out, _ = run("cache", "verify", str(path))
    assert code == 0
    assert "coefficients.json" in out
    refused(run(*arguments, "--merge-arg", "steps=0"), "steps=0", "was given before")
    refused(run(*arguments, "--merge-arg", "lr=-1"), "the setting lr is '-1.0'", "from 1e-09 to 10")


def test_a_merged_model_may_be_a_folder(tmp_path):
    """As mergekit and transformers save one."""
    tasks, folder = select_tasks("mini", ["mnist"]), tmp_path / "slerp"
    folder.mkdir()
    asked = ExtractConfig("mini", merges=(str(folder),), root=tmp_path)
    (request,) = merge_requests(asked, get_encoder("mini"), tasks, "mini", whole_suite=True)
    assert request.path == tmp_path / "mini_slerp"
    with pytest.raises(InputError, match="no checkpoint at .*slerp"):
        Weights("mini").merged(folder)
    for name in ("", str(tmp_path / "none")):
        with pytest.raises(InputError, match="unknown merge"):
            merge_requests(replace(asked, merges=(name,)), get_encoder("mini"), tasks, "mini", whole_suite=True)


def test_merges_that_learn_from_predictions_need_every_classifier(tmp_path, run, monkeypatch):
    load = run_plan.load_classifiers
    lacking = lambda *given: {name: own for name, own in load(*given).items() if name != "texture"}  # noqa: E731
    monkeypatch.setattr(run_plan, "load_classifiers", lacking)
    command = ("extract", "--arch", "mini", "--tasks", "texture,fruit", "--limit", 12, "--root", tmp_path, "--merge")
    for method in ("tw-adamerging", "concrete-ta", "fisher"):
        refused(run(*command, method), f"{method} learns from predictions, and texture has no classifier")
    assert not list(tmp_path.iterdir())
    status, _, err = run(*command, "regmean", "--merge-arg", "images=8")
    assert status == 0, err
    (path,) = tmp_path.iterdir()
    cache = Cache(path)
    assert cache.linear_classifier("texture") is None
    assert cache.manifest.schema == 2
    accuracies = {row.task: row.accuracy.head for row in fit(FitConfig(path, SurgerySettings(steps=5))).rows}
    assert [task for task, accuracy in accuracies.items() if accuracy is not None] == ["fruit"]
    assert run(*command, "regmean", "--merge-arg", "images=8")[1].endswith("nothing to do\n")
    monkeypatch.undo()
    refused(run(*command, "regmean", "--merge-arg", "images=8"), "another classifier of texture", "--fresh")
