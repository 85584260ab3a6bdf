"""Features of image files that two versions decoded, perhaps to other pixels, do not come together."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from probsurgery.pipeline.config import ExtractConfig
from probsurgery.pipeline.datasets.suites import select_tasks
from probsurgery.pipeline.datasets.tasks import open_images
from probsurgery.pipeline.extraction.run_plan import decoding_workers
from probsurgery.pipeline.models.encoders import get_encoder
from probsurgery.pipeline.store.cache import Cache
from support import drop_seal, edit_manifest, idx, refused

CLASSES = select_tasks("clip8", ["eurosat"])[0].aliases


@pytest.fixture
def extract(run, tiny, tmp_path):
    """Extract EuroSAT, which is files, and MNIST, which is arrays, to the cache `c`."""
    weights, data = tmp_path / "weights", tmp_path / "data"
    weights.mkdir()
    for name in ("pretrained", "eurosat", "mnist"):
        state = {key: 0.1 * torch.randn(shape) for key, shape in get_encoder("tiny").shapes.items()}
        save_file(state, weights / f"{name}.safetensors")
    dim = get_encoder("tiny").dim
    save_file({task: torch.randn(10, dim) for task in ("eurosat", "mnist")}, weights / "classifiers.safetensors")
    for split, name in (("test", "t10k"), ("train", "train")):
        for shade, label in enumerate(CLASSES):
            folder = data / "eurosat" / split / label
            folder.mkdir(parents=True)
            Image.new("RGB", (6, 5), (20 * shade, 0, 0)).save(folder / "a.png")
        (data / "mnist").mkdir(exist_ok=True)
        for kind, values in (("images-idx3", np.zeros((10, 28, 28), np.uint8)), ("labels-idx1", np.arange(10))):
            (data / "mnist" / f"{name}-{kind}-ubyte").write_bytes(idx(values.astype(np.uint8)))

    def call(*options, out="c"):
        asked = ("--arch", "tiny", "--tasks", "eurosat,mnist", "--any-rows", "--workers", 0, "--device", "cpu")
        folders = ("--checkpoints", weights, "--data", data, "--out", tmp_path / "caches" / out)
        return run("extract", *asked, *folders, *options)

    return call


def as_before(path):
    """A cache as versions wrote it that did not record how they decode."""

    def forget(manifest):
        for task in manifest["tasks"].values():
            for split in task["splits"].values():
                assert split.pop("decoding") == 1

    edit_manifest(path, forget)


def test_images_in_memory_need_no_processes_whatever_encodes_them():
    images = open_images(select_tasks("mini", ["mnist"])[0], "test", limit=2)
    config = ExtractConfig("vitb32")
    assert decoding_workers(config, [images]) == 0
    assert decoding_workers(config, [images, replace(images, decoding=1)]) >= 1
    assert decoding_workers(replace(config, workers=3), [images]) == 3


def test_an_older_cache_is_read_and_not_extended(extract, run, tmp_path):
    path = tmp_path / "caches" / "c"
    assert extract()[0] == 0
    as_before(path)
    assert "nothing to do" in extract()[1]  # it lacks nothing
    assert run("fit", "--cache", path, "--steps", 5)[0] == 0
    assert run("report", "--cache", path)[0] == 0
    content = Cache(path).content
    drop_seal(path, "test/mnist/merged", 0)
    assert extract()[0] == 0  # arrays have the same pixels for ever
    assert Cache(path).content == content
    words = ("eurosat (test)", "another version", "lacks", "--fresh or another --out")
    refused(extract("--split", "both"), *words)  # a head fitted on one split would meet the other
    refused(extract("--split", "train", "--only", "eurosat"), *words)
    drop_seal(path, "test/eurosat/expert", 0)
    refused(extract(), *words)
    assert extract("--fresh")[0] == 0
    assert extract("--split", "both")[0] == 0


def test_features_of_an_older_cache_are_not_taken(extract, tmp_path):
    assert extract()[0] == 0
    _, out, err = extract("--merge", "ties", out="now")
    assert "forward passes saved" in out + err
    for path in (tmp_path / "caches").iterdir():
        as_before(path)
    _, out, err = extract("--merge", "wa", out="later")
    assert "forward passes saved" not in out + err
    assert "c has features of images that another version decoded, perhaps to other pixels: they were encoded" in err
