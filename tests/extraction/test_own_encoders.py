"""Encoders of one's own from images to predictions, by the commands."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

from probsurgery.pipeline.datasets.suites import select_tasks
from probsurgery.pipeline.datasets.tasks import open_images
from probsurgery.pipeline.deploy.model import load_model
from probsurgery.pipeline.deploy.predict import predict
from probsurgery.pipeline.models.encoders import get_encoder
from probsurgery.pipeline.store.cache import Cache
from support import TINY, refused

transformers.utils.logging.disable_progress_bar()
TASKS = select_tasks("mini", ["mnist", "fruit"])


def vit(folder, seed, **fields):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(seed)
    model = transformers.ViTModel(transformers.ViTConfig(**sizes, image_size=32, patch_size=8, **fields)).eval()
    model.save_pretrained(folder)
    return model


@pytest.fixture
def transformers_folder(tmp_path):
    """A ViT, and two experts of it as transformers saves them."""
    vit(tmp_path / "own", 0)
    processor = {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}}
    (tmp_path / "own" / "preprocessor_config.json").write_text(json.dumps(processor))
    for seed, task in enumerate(TASKS, 1):
        vit(tmp_path / "experts" / task.name, seed)
    return tmp_path / "own"


@pytest.fixture
def open_clip_file(tmp_path):
    """An open_clip configuration, and state dicts of its tower."""
    path = tmp_path / "own.json"
    shutil.copy(TINY.config, path)
    (tmp_path / "experts").mkdir()
    for name in ("pretrained", *(task.name for task in TASKS)):
        state = {key: 0.1 * torch.randn(shape) for key, shape in get_encoder(str(path)).shapes.items()}
        save_file(state, tmp_path / "experts" / f"{name}.safetensors")
    return path


@pytest.mark.parametrize("form", ["transformers_folder", "open_clip_file"])
def test_from_images_to_predictions(run, tmp_path, request, form):
    path = request.getfixturevalue(form)
    encoder = get_encoder(str(path))
    classifiers = {task.name: torch.randn(len(task.class_names), encoder.dim) for task in TASKS}
    save_file(classifiers, tmp_path / "experts" / "classifiers.safetensors")
    asked = ("--arch", path, "--checkpoints", tmp_path / "experts", "--suite", "mini", "--tasks", "mnist,fruit")
    brief = (
        "--limit",
        24,
        "--device",
        "cpu",
        "--root",
        tmp_path,
        "--merge-arg",
        "steps=2",
        "--merge-arg",
        "batch-size=4",
    )
    code, out, err = run("extract", *asked, *brief, "--merge", "ta", "--merge", "tw-adamerging", "--json")
    assert code == 0, err
    caches = [Path(folder) for folder in json.loads(out)["caches"]]
    cache = Cache(caches[0])
    assert cache.identity.encoder == json.loads(json.dumps(encoder.description))
    weights = tmp_path / "experts"
    images = open_images(TASKS[0], "test", limit=24)
    batch = torch.stack([encoder.preprocessing.transform(images.decode(row)) for row in range(24)])
    with torch.no_grad():
        if form == "transformers_folder":
            expected = transformers.ViTModel.from_pretrained(weights / "mnist").eval()(batch).last_hidden_state[:, 0]
        else:
            expected = get_encoder("mini").build(load_file(weights / "mnist.safetensors"))(batch)
    assert torch.allclose(cache.features("mnist", "expert"), expected, atol=1e-5)

    for file in [path] if path.is_file() else path.glob("*.json"):  # the caches know the encoder; weights stay
        file.unlink()
    Image.fromarray(np.zeros((40, 30, 3), np.uint8)).save(tmp_path / "black.png")
    for folder in caches:
        assert run("fit", "--cache", folder, "--steps", 3, "--name", "one")[0] == 0
        code, out, err = run("report", "--cache", folder)
        assert code == 0, err
        assert "own" in out
        which = ("--cache", folder, "--head", "one", "--checkpoints", weights)
        code, predicted, err = run("predict", *which, "--task", "mnist", "--json", tmp_path / "black.png")
        assert code == 0, err
        code, _, err = run("export", *which, "--out", tmp_path / "models" / folder.name)
        assert code == 0, err
        model = load_model(tmp_path / "models" / folder.name)
        (prediction,) = predict(model, "mnist", [tmp_path / "black.png"])
        assert json.loads(predicted)[0]["classes"] == [[name, share] for name, share in prediction.classes]
        with torch.no_grad():
            assert torch.allclose(model.encoder(batch), Cache(folder).features("mnist"), atol=1e-5)


def test_what_a_user_gets_wrong_is_one_line(run, tmp_path, transformers_folder):
    asked = ("extract", "--arch", transformers_folder, "--suite", "mini", "--device", "cpu", "--out", tmp_path / "c")
    refused(run(*asked), "no experts of own are published; give --checkpoints FOLDER")
    given = ("--checkpoints", tmp_path / "experts", "--tasks", "mnist")
    refused(run(*asked, *given), "holds no classifier of 'mnist'")
    vit(tmp_path / "experts" / "mnist", 1, hidden_act="relu")
    save_file({"mnist": torch.randn(10, 32)}, tmp_path / "experts" / "classifiers.safetensors")
    refused(run(*asked, *given), "hidden_act relu, and own has gelu")
    (transformers_folder / "config.json").unlink()
    refused(run(*asked, *given), "own has no config.json")
    refused(run("extract", "--arch", "nowhere/model"), "no encoder at 'nowhere/model'")
    assert not (tmp_path / "c").exists()
