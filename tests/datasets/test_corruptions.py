"""Corruptions grow with the severity, are reproducible, and lead to separate caches."""

import json

import msgspec.structs
import numpy as np
import pytest
from PIL import Image

from probsurgery.pipeline.datasets.corruptions import CORRUPTIONS, checked, corrupted
from probsurgery.pipeline.datasets.suites import select_tasks
from probsurgery.pipeline.datasets.tasks import open_images
from probsurgery.pipeline.errors import InputError
from probsurgery.pipeline.store.cache import Cache
from support import refused

FEW = ("--arch", "mini", "--tasks", "mnist,fruit", "--limit", 20)


@pytest.fixture(scope="module")
def image():
    (task,) = select_tasks("mini", ["fruit"])
    return open_images(task, "test").decode(0).convert("RGB").resize((64, 64))


def difference(a, b):
    return np.abs(np.asarray(a, dtype=float) - np.asarray(b, dtype=float)).mean()


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_a_higher_severity_changes_more_and_is_reproducible(image, kind):
    changes = [difference(corrupted(image, f"{kind}:{severity}", 0), image) for severity in range(1, 6)]
    assert changes[0] > 0
    assert changes == sorted(set(changes))
    again = corrupted(image, f"{kind}:3", 0)
    assert difference(again, corrupted(image, f"{kind}:3", 0)) == 0
    assert (difference(again, corrupted(image, f"{kind}:3", 1)) > 0) == (kind == "noise")


def test_noise_has_its_standard_deviation():
    grey = Image.new("RGB", (100, 100), (128, 128, 128))
    values = np.asarray(corrupted(grey, "noise:1", 0), dtype=float) / 255
    assert values.std() == pytest.approx(0.08, rel=0.05)
    assert values.mean() == pytest.approx(128 / 255, abs=0.01)


def test_contrast_keeps_the_mean(image):
    values, less = (np.asarray(i, dtype=float) for i in (image, corrupted(image, "contrast:3", 0)))
    assert less.mean() == pytest.approx(values.mean(), abs=1)
    assert less.std(axis=(0, 1)) == pytest.approx(0.2 * values.std(axis=(0, 1)), rel=0.05)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK"])
@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_every_kind_of_image(kind, mode):
    image = corrupted(Image.new(mode, (8, 9)), f"{kind}:5", 0)
    assert (image.mode, image.size) == ("RGB", (8, 9))


def test_a_kind_without_severity_has_the_middle_one():
    assert checked("noise") == checked("noise:3") == "noise:3"
    for text in ("noise:0", "noise:6", "noise:", "noise:33", "noise:x", "noise:1:2"):
        with pytest.raises(InputError, match="it must be from 1 to 5"):
            checked(text)


def test_a_corrupted_cache_is_separate(run, tmp_path):
    paths = {}
    for corrupt in ((), ("--corrupt", "noise:5")):
        status, out, _ = run("extract", *FEW, *corrupt, "--root", tmp_path, "--json")
        assert status == 0
        (paths[corrupt[1:]],) = json.loads(out)["caches"]
    clean, noisy = (Cache(path) for path in paths.values())
    assert noisy.path.name == f"{clean.path.name}-noise5"
    assert "corruption" not in clean.identity.to_json()
    assert noisy.identity == msgspec.structs.replace(clean.identity, corruption="noise:5")
    for task in ("mnist", "fruit"):
        assert (clean.labels(task) == noisy.labels(task)).all()
        assert (clean.classifier(task) == noisy.classifier(task)).all()
        for kind in ("merged", "expert", "pretrained"):
            assert difference(clean.features(task, kind), noisy.features(task, kind)) > 0.05
    assert "nothing to do" in run("extract", *FEW, "--corrupt", "noise:5", "--root", tmp_path)[1]
    refused(run("extract", *FEW, "--out", noisy.path), "corruption: noise:5 / None")
    assert "corrupted by noise:5" in run("cache", "info", noisy.path)[1]
    assert run("fit", "--cache", noisy.path, "--steps", 5)[0] == 0
    assert "images corrupted by noise:5, transductive" in run("report", "--cache", noisy.path)[1]


def test_workers_and_batches_do_not_matter(run, tmp_path):
    contents = set()
    for options in (("--workers", 0), ("--workers", 2, "--batch-size", 7)):
        out = tmp_path / str(len(contents))
        assert run("extract", *FEW, "--corrupt", "noise", *options, "--out", out)[0] == 0
        contents.add(round(Cache(out).features("fruit").double().sum().item(), 2))
    assert len(contents) == 1


@pytest.mark.parametrize(
    ("text", "words"), [("fog", ["'fog'", "noise, blur, contrast, jpeg"]), ("blur:9", ["'9'", "from 1 to 5", "blur:3"])]
)
def test_bad_requests(run, tmp_path, text, words):
    refused(run("extract", *FEW, "--corrupt", text, "--root", tmp_path / "caches"), *words)
    assert not (tmp_path / "caches").exists()
