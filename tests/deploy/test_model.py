"""The merged encoder with its heads: the same as the cached path, from a cache and from an exported folder."""

import json
import math
import os
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import probsurgery
import processes
from probsurgery.pipeline.config import (
    AffineSettings,
    ClassifierSettings,
    ExtractConfig,
    FitConfig,
    OrthogonalSettings,
    ProbSettings,
    RidgeSettings,
    SurgerySettings,
)
from probsurgery.pipeline.datasets.suites import select_tasks
from probsurgery.pipeline.datasets.tasks import open_images
from probsurgery.pipeline.deploy.assemble import assemble
from probsurgery.pipeline.deploy.model import FILES, load_model
from probsurgery.pipeline.errors import InputError
from probsurgery.pipeline.extraction.extract import extract
from probsurgery.pipeline.fingerprints import file_digest
from probsurgery.pipeline.fitting.fit import fit
from probsurgery.pipeline.heads.head import load_head
from probsurgery.pipeline.heads.kinds import prob_distribution
from probsurgery.pipeline.models.architectures import MINI
from probsurgery.pipeline.store.cache import Cache
from probsurgery.pipeline.store.lock import locked
from probsurgery.pipeline.store.manifest import read_manifest
from probsurgery.pipeline.store.writer import CacheWriter
from support import edit_manifest, refused

TASKS, ROWS = ("mnist", "fruit"), 40
HEADS = {
    "prob": {"head": ProbSettings(hidden=8, steps=60)},
    "surgery": {"head": SurgerySettings(rank=4, steps=60)},
    "ridge": {"head": RidgeSettings()},
    "affine": {"head": AffineSettings()},
    "orthogonal": {"head": OrthogonalSettings()},
    "shared": {"head": ProbSettings(hidden=8, steps=60), "shared": True},
    "classifier": {"head": ClassifierSettings(steps=60)},
    "scaled": {"head": ProbSettings(hidden=8, steps=60, feature_scale=4.0)},
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A small extraction of real images, with a head of each kind."""
    root = tmp_path_factory.mktemp("model")
    (path,) = extract(ExtractConfig("mini", tasks=TASKS, limit=ROWS, root=root)).caches
    for name, settings in HEADS.items():
        fit(FitConfig(path, name=name, **settings))
    return path


@pytest.fixture(scope="module")
def images():
    """The opened test images of each task."""
    return {task.name: open_images(task, "test", limit=ROWS) for task in select_tasks("mini", TASKS)}


@pytest.fixture(scope="module")
def pictures(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for row in range(5):
        images["fruit"].decode(row).save(folder / f"{row}.png")
    return sorted(folder.iterdir())


@pytest.fixture
def model(cache, tmp_path):
    """The folder of an exported model."""
    assemble(cache, "prob").save(tmp_path / "model")
    return tmp_path / "model"


def batch(model, images, task):
    return torch.stack([model.transform(images[task].decode(row)) for row in range(ROWS)])


@pytest.mark.parametrize("name", HEADS)
def test_from_images_it_gives_what_the_cache_gives(cache, images, tmp_path, name):
    opened, head = Cache(cache), load_head(cache / "heads" / name)
    assembled = assemble(cache, name)
    assembled.save(tmp_path / "model")
    for model in (assembled, load_model(tmp_path / "model")):
        for task in TASKS:
            with torch.inference_mode():
                features, logits = (f(batch(model, images, task), task) for f in (model.features, model))
            expected = head(opened.features(task), task)
            assert torch.allclose(features, expected, atol=1e-5, rtol=0)
            right = (logits.argmax(-1) == opened.labels(task)).double().mean().item()
            classifier = head.classifiers.get(task, opened.classifier(task))
            assert right == probsurgery.accuracy(expected, classifier, opened.labels(task))
            changes = not torch.allclose(features, opened.features(task), atol=1e-2, rtol=0)
            assert changes == head.settings.corrects_features


@pytest.fixture
def other_classifiers(cache, tmp_path):
    """The cache with a classifier of plain features and a bias for fruit, and none for mnist."""
    path = shutil.copytree(cache, tmp_path / "other")
    bias = torch.linspace(-20, 20, len(Cache(path).classifier("fruit")))
    with locked(path):
        writer = CacheWriter(path, read_manifest(path))
        writer.add_whole({"biases/fruit": bias.numpy()})

    def change(manifest):
        manifest["tasks"]["fruit"] |= {"normalise": False, "classifier": "another"}
        rows = manifest["arrays"].pop("classifiers/mnist")
        assert rows
        manifest["tasks"]["mnist"]["classifier"] = ""

    edit_manifest(path, change)
    return path, bias


def test_bias_and_plain_features_are_heeded(other_classifiers, images, pictures, run, tmp_path):
    path, bias = other_classifiers
    command = ("fit", "--cache", path, "--head", "ridge", "--name", "alone", "--tasks", "fruit")
    assert run(*command)[0] == 0
    opened = Cache(path)
    corrected = load_head(path / "heads" / "alone")(opened.features("fruit"), "fruit")
    expected = corrected @ opened.classifier("fruit").T + bias
    right = (expected.argmax(-1) == opened.labels("fruit")).double().mean()
    assert right == load_head(path / "heads" / "alone").record.results[0].accuracy.head
    found = json.loads(run("predict", "--cache", path, "--head", "alone", "--task", "fruit", *pictures, "--json")[1])
    for one, chances in zip(found, expected.softmax(-1), strict=False):
        assert [p for _, p in one["classes"]] == pytest.approx(chances.topk(3).values.tolist(), abs=1e-4)
    status, _, err = run("export", "--cache", path, "--head", "alone", "--out", tmp_path / "model", "--onnx")
    assert status == 0, err
    with torch.inference_mode():
        logits = load_model(tmp_path / "model")(batch(load_model(tmp_path / "model"), images, "fruit"), "fruit")
    assert torch.allclose(logits, expected, atol=1e-2)
    assert json.loads((tmp_path / "model" / "model.json").read_text())["schema"] == 2


def test_a_task_without_a_classifier_is_not_predicted(other_classifiers, pictures, run, tmp_path):
    path, _ = other_classifiers
    assert run("fit", "--cache", path, "--head", "ridge", "--name", "both")[0] == 0
    words = (f"{path} holds no classifier of mnist",)
    refused(run("predict", "--cache", path, "--head", "both", "--task", "mnist", *pictures), *words)
    refused(run("export", "--cache", path, "--head", "both", "--out", tmp_path / "model"), *words)
    assert not (tmp_path / "model").exists()
    assert run("predict", "--cache", path, "--head", "both", "--task", "fruit", *pictures)[0] == 0


@pytest.mark.parametrize("name", ["prob", "shared"])
def test_a_task_that_the_model_has_not_is_refused_by_every_way_in(cache, images, name):
    model = assemble(cache, name)
    inputs, merged = batch(model, images, "fruit")[:2], Cache(cache).features("fruit")[:2]
    for call, values in ((model, inputs), (model.features, inputs), (model.correct, merged), (model.sigma, merged)):
        with pytest.raises(InputError, match="unknown task 'cars'"):
            call(values, "cars")


def test_weights_that_are_no_numbers_are_refused(model):
    state = load_file(model / "heads.safetensors")
    state["mu"][0, 0, 0] = float("nan")
    save_file(state, model / "heads.safetensors")
    about = json.loads((model / "model.json").read_text())
    about["files"]["heads.safetensors"] = file_digest(model / "heads.safetensors")
    (model / "model.json").write_text(json.dumps(about))
    with pytest.raises(InputError, match="NaN or infinite weights"):
        load_model(model)


@pytest.mark.parametrize(("name", "scale"), [("prob", 1), ("scaled", 4)])
def test_sigma_is_the_heads(cache, tmp_path, name, scale):
    opened = Cache(cache)
    assemble(cache, name).save(tmp_path / "model")
    model, z = load_model(tmp_path / "model"), opened.features("fruit")
    params = load_head(cache / "heads" / name).params_of("fruit")
    log_var = prob_distribution(params, scale * z[None])[1][0] - 2 * math.log(scale)
    assert torch.allclose(model.sigma(z, "fruit"), (log_var / 2).exp().square().mean(1).sqrt())
    with pytest.raises(InputError, match="surgery heads have no sigma"):
        assemble(cache, "surgery").sigma(z, "fruit")


def test_the_documented_snippet_in_a_fresh_process(cache, model, pictures):
    readme = (MINI.parents[1] / "README.md").read_text()
    snippet = next(part for part in readme.split("```python\n")[1:] if "load_model" in part).partition("```")[0]
    snippet = snippet.replace("exported", str(model)).replace("apple.png", str(pictures[0]))
    done = processes.python(snippet)
    assert done.returncode == 0, done.stderr
    head, row = load_head(cache / "heads" / "prob"), 0
    opened = Cache(cache)
    corrected = torch.nn.functional.normalize(head(opened.features("fruit"), "fruit")[row : row + 1])
    expected = (corrected @ opened.classifier("fruit").T).softmax(-1).max().item()
    assert float(done.stdout.split()[-1]) == pytest.approx(expected, abs=1e-4)


def test_no_library_code_is_in_the_folder(model):
    assert sorted(path.name for path in model.iterdir()) == sorted((*FILES, "model.json"))
    about = json.loads((model / "model.json").read_text())
    assert about["tasks"] == list(TASKS)
    assert about["preprocessing"]["image_size"] == 48
    assert len(about["class_names"]["fruit"]) > 1


@pytest.mark.parametrize("name", ["prob", "surgery"])
def test_predict(cache, run, pictures, name):
    command = ("predict", "--cache", cache, "--head", name, "--task", "fruit", "--top", 2, *pictures)
    status, out, _ = run(*command, "--json")
    assert status == 0
    found = json.loads(out)
    assert [one["image"] for one in found] == list(map(str, pictures))
    opened, head = Cache(cache), load_head(cache / "heads" / name)
    names = opened.manifest.tasks["fruit"].class_names
    logits = torch.nn.functional.normalize(head(opened.features("fruit"), "fruit")) @ opened.classifier("fruit").T
    for one, chances in zip(found, logits.softmax(-1), strict=False):
        best = chances.topk(2)
        assert [name for name, _ in one["classes"]] == [names[i] for i in best.indices]
        assert [p for _, p in one["classes"]] == pytest.approx(best.values.tolist(), abs=1e-5)
        assert (one["sigma"] is not None) == (name == "prob")
    text = run(*command)[1]
    assert text.count("\n") == len(pictures)
    assert ("sigma" in text) == (name == "prob")


def test_predict_takes_what_a_file_says_of_its_pixels(cache, run, images, tmp_path):
    """The same picture plain, turned with a note of it, and with 16 bits."""
    plain = images["fruit"].decode(0).convert("L")
    exif = Image.Exif()
    exif[0x0112] = 6
    plain.save(tmp_path / "plain.png")
    plain.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    Image.fromarray(np.asarray(plain).astype(np.uint16) * 257).save(tmp_path / "deep.png")
    files = [tmp_path / f"{name}.png" for name in ("plain", "turned", "deep")]
    status, out, _ = run("predict", "--cache", cache, "--head", "prob", "--task", "fruit", *files, "--json")
    assert status == 0
    first, *others = ([p for _, p in one["classes"]] for one in json.loads(out))
    for other in others:
        assert other == pytest.approx(first, abs=1e-6)
    Image.fromarray(np.asarray(plain).astype(np.float32)).save(tmp_path / "float.tif")
    command = ("predict", "--cache", cache, "--head", "prob", "--task", "fruit", tmp_path / "float.tif")
    refused(run(*command), "float.tif", "floats (mode F)", "save it with 8 or 16 bits")


def test_a_learned_merge_comes_from_the_cache(tmp_path, images):
    (path,) = extract(
        ExtractConfig("mini", ("tw-adamerging",), {"steps": 3}, tasks=TASKS, limit=ROWS, root=tmp_path)
    ).caches
    fit(FitConfig(path, SurgerySettings(rank=4, steps=20), name="it"))
    model, opened = assemble(path, "it"), Cache(path)
    with torch.inference_mode():
        merged = model.encoder(batch(model, images, "fruit"))
    assert torch.allclose(merged, opened.features("fruit"), atol=1e-5, rtol=0)
    (path / "merged.safetensors").unlink()
    with pytest.raises(InputError, match="merged.safetensors is missing or damaged; run the same"):
        assemble(path, "it")


def test_a_merged_checkpoint_is_asked_for_and_checked(tmp_path, run):
    shutil.copy(MINI / "weights" / "traditional-mtl.safetensors", tmp_path / "mine.safetensors")
    (path,) = extract(
        ExtractConfig("mini", (str(tmp_path / "mine.safetensors"),), tasks=TASKS, limit=ROWS, root=tmp_path)
    ).caches
    fit(FitConfig(path, SurgerySettings(rank=4, steps=20), name="it"))
    common = ("export", "--cache", path, "--head", "it", "--out", tmp_path / "out")
    refused(run(*common), "say where it is with --merged FILE")
    refused(run(*common, "--merged", MINI / "weights" / "fruit.safetensors"), "do not merge to what")
    assert not (tmp_path / "out").exists()
    assert run(*common, "--merged", tmp_path / "mine.safetensors")[0] == 0
    assert load_model(tmp_path / "out").tasks == TASKS


def test_bad_requests_leave_nothing_behind(cache, run, tmp_path, pictures):
    (tmp_path / "text.png").write_text("no image")
    out = tmp_path / "out"
    predict = ("predict", "--cache", cache, "--task", "fruit")
    names = ", ".join(sorted(HEADS))
    refused(run(*predict, "--head", "mine", pictures[0]), "unknown head 'mine'", names)
    refused(run(*predict, "--head", "prob", tmp_path / "text.png"), "text.png is not an image")
    refused(run(*predict, "--head", "prob", tmp_path / "no.png"), "no.png is no file")
    refused(run(*predict[:-1], "cars", "--head", "prob", pictures[0]), "unknown task 'cars'", "mnist, fruit")
    export = ("export", "--cache", cache, "--head", "prob", "--out", out)
    refused(run(*export, "--checkpoints", tmp_path / "nowhere"), "no folder of checkpoints")
    refused(run(*export, "--merged", pictures[0]), "--merged is for caches of a merged checkpoint")
    refused(run("export", "--cache", tmp_path, "--head", "prob", "--out", out), "is not a cache")
    assert not out.exists()
    out.mkdir()
    refused(run(*export), f"{out} exists", "another --out")
    assert list(out.iterdir()) == []


def test_other_checkpoints_are_refused(cache, tmp_path):
    shutil.copytree(MINI / "weights", tmp_path / "weights")
    shutil.copy(tmp_path / "weights" / "fruit.safetensors", tmp_path / "weights" / "mnist.safetensors")
    with pytest.raises(InputError, match="do not merge to what"):
        assemble(cache, "prob", str(tmp_path / "weights"))


def test_a_head_of_other_features_is_refused(cache, tmp_path):
    (other,) = extract(ExtractConfig("mini", tasks=TASKS, limit=20, root=tmp_path)).caches
    with pytest.raises(InputError, match="was fitted on other features of mnist"):
        assemble(other, cache / "heads" / "prob")


@pytest.mark.parametrize("name", FILES)
def test_a_changed_file_is_found(model, name):
    path = model / name
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"{name} is not as it was written"):
        load_model(model)
    path.unlink()
    with pytest.raises(InputError, match="lacks a file"):
        load_model(model)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda plain: plain | {"schema": 3}, "has schema 3; this version reads up to 2"),
        (lambda plain: plain | {"schema": "1"}, "does not describe a model"),
        (lambda plain: [plain], "does not describe a model"),
        (lambda plain: plain | {"arch": "vitb64"}, "unknown arch 'vitb64'"),
        (lambda plain: plain | {"head": "linear"}, "unknown head 'linear'"),
        (lambda plain: plain | {"settings": plain["settings"] | {"hidden": 9}}, "does not hold the heads"),
        (lambda plain: plain | {"tasks": ["mnist"]}, "does not hold the heads"),
        (lambda plain: plain | {"dim": 10**12}, "does not describe a model .*dim"),
        (lambda plain: plain | {"preprocessing": {}}, "does not describe a model .*image_size"),
        (lambda plain: plain | {"class_names": {"mnist": [], "fruit": []}}, "does not hold the heads"),
        (lambda plain: {k: v for k, v in plain.items() if k != "files"}, "does not describe a model .*`files`"),
    ],
)
def test_a_malformed_description_is_one_line(model, change, words):
    file = model / "model.json"
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    with pytest.raises(InputError, match=words):
        load_model(model)


def described(**preprocessing):
    """A description whose preprocessing has other values."""
    return lambda plain: plain | {"preprocessing": plain["preprocessing"] | preprocessing}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (described(image_size=0), "image_size"),
        (described(image_size=-1), "image_size"),
        (described(image_size="32"), "image_size"),
        (described(image_size=10**6), "image_size"),
        (described(image_size=True), "image_size"),
        (described(image_size=32), "image_size 32, but mini takes 48"),
        (described(interpolation="sinc"), "interpolation"),
        (described(resize="crop"), "resize"),
        (described(mean=[0.5, 0.5]), "mean"),
        (described(mean=[0.5, 0.5, 10**400]), "mean"),
        (described(std=[0.5, 0.5, 0.5, 0.5]), "std"),
        (described(std=[0.5, 0.5, 0]), "std"),
        (described(std=[0.5, 0.5, float("nan")]), "not valid JSON"),
        (lambda plain: plain | {"tasks": []}, "tasks"),
        (lambda plain: plain | {"class_names": {"mnist": [1], "fruit": [2]}}, "class_names"),
        (lambda plain: plain | {"settings": plain["settings"] | {"kl_weight": 10**400}}, "settings"),
        (lambda plain: plain | {"settings": plain["settings"] | {"kl_weight": -1}}, "--kl-weight is -1"),
    ],
)
def test_a_description_out_of_range_is_one_line_that_names_the_file(model, change, words):
    file = model / "model.json"
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    with pytest.raises(InputError, match=words) as caught:
        load_model(model)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64])
def test_weights_of_another_type_are_refused(model, name, dtype):
    state = load_file(model / name)
    save_file({key: values.to(dtype) for key, values in state.items()}, model / name)
    about = json.loads((model / "model.json").read_text())
    about["files"][name] = file_digest(model / name)
    (model / "model.json").write_text(json.dumps(about))
    with pytest.raises(InputError, match="float32|does not fit its files .*parameter"):
        load_model(model)


def test_a_cache_without_preprocessing_makes_no_model(cache, tmp_path, run, pictures):
    path = shutil.copytree(cache, tmp_path / "cache")
    edit_manifest(path, lambda m: m["identity"]["preprocessing"].update(image_size="48"))
    predict = ("predict", "--cache", path, "--task", "fruit", "--head", "prob", pictures[0])
    refused(run(*predict), path, "image_size")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="a system without named pipes")
def test_a_pipe_is_no_picture(cache, run, tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    predict = ("predict", "--cache", cache, "--task", "fruit", "--head", "prob")
    refused(run(*predict, tmp_path / "pipe.png"), "pipe.png is no file")
    refused(run(*predict, "/dev/zero"), "/dev/zero is no file")


def test_weights_of_another_shape_are_refused(model):
    state = load_file(model / "merged.safetensors")
    state["proj"] = state["proj"][:-1].contiguous()
    save_file(state, model / "merged.safetensors")
    about = json.loads((model / "model.json").read_text())
    about["files"]["merged.safetensors"] = file_digest(model / "merged.safetensors")
    (model / "model.json").write_text(json.dumps(about))
    with pytest.raises(InputError, match="does not fit its files"):
        load_model(model)
    (model / "model.json").write_text("{")
    with pytest.raises(InputError, match="not valid JSON"):
        load_model(model)
    with pytest.raises(InputError, match="no model at"):
        load_model(model / "none")


@pytest.mark.parametrize("name", ["prob", "ridge", "classifier"])
def test_onnx_files_give_what_torch_gives(cache, images, run, tmp_path, name):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    import onnxruntime

    out = tmp_path / "out"
    status, text, _ = run("export", "--cache", cache, "--head", name, "--out", out, "--onnx", "--json")
    assert status == 0
    assert set(json.loads(text)["files"]) == {path.name for path in out.iterdir()}
    model = load_model(out)
    for task in TASKS:
        session = onnxruntime.InferenceSession(out / f"{task}.onnx", providers=["CPUExecutionProvider"])
        rows = batch(model, images, task)[:7]
        outputs = session.run(None, {"images": rows.numpy()})
        with torch.inference_mode():
            expected = [model(rows, task)]
            expected += [model.sigma(model.encoder(rows), task)] if name == "prob" else []
        for ours, theirs in zip(expected, outputs, strict=True):
            assert torch.allclose(torch.from_numpy(theirs), ours, atol=1e-4, rtol=1e-4)


def test_onnx_that_differs_is_an_error_and_no_folder(cache, run, tmp_path, monkeypatch):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    monkeypatch.setattr("probsurgery.pipeline.deploy.onnx_export.TOLERANCE", 0.0)
    status, _, err = run("export", "--cache", cache, "--head", "prob", "--out", tmp_path / "out", "--onnx")
    assert status == 1
    assert "differs from torch's" in err
    assert list(tmp_path.iterdir()) == []


def test_without_onnx_it_says_what_to_install(cache, run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    monkeypatch.setitem(sys.modules, "onnx", None)
    out = tmp_path / "out"
    refused(
        run("export", "--cache", cache, "--head", "prob", "--out", out, "--onnx"), "pip install 'probsurgery[onnx]'"
    )
    assert not out.exists()
