"""docs/own-tasks.md, walked through as it stands, on drawn images and a small encoder."""

import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest

import own_models
import probsurgery

TEXT = (Path(__file__).parents[1] / "docs" / "own-tasks.md").read_text()
SUITE = re.search(r"`animals.toml`:\n\n```toml\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL).group(1)
COMMANDS = re.findall(r"^\$ probsurgery (.*)$", TEXT, re.MULTILINE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the page says that you have, and `animals.toml`, which names the small encoder instead of ViT-B/32."""
    folder = tmp_path_factory.mktemp("own")
    own_models.make(folder)
    small = SUITE.replace('"ViT-B-32-quickgelu"', '"encoder.json"')
    assert small != SUITE
    small = small.replace("[tasks.birds]", '[tasks.birds]\ntitle = "Birds of Europe"')
    (folder / "animals.toml").write_text(small)
    return folder


@pytest.fixture
def walk(folder, run, monkeypatch):
    """Runs the page's commands that begin with a word, in the folder, and returns the last one's output."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "home"))

    def walk(*beginnings):
        for beginning in beginnings:
            (command,) = [command for command in COMMANDS if command.startswith(beginning)]
            status, out, err = run(*shlex.split(command))
            assert status == 0, err
        return out

    return walk


@pytest.fixture
def extracted(folder, walk):
    """The cache of the page's suite, with its head."""
    if not (folder / "cache" / "animals_ta").exists():
        walk("extract", "fit --cache cache/animals_ta")
    return probsurgery.open_cache("cache/animals_ta")


def test_the_suite_has_as_many_lines_as_the_page_says():
    assert len(SUITE.splitlines()) <= 12


def test_from_folders_and_checkpoints_to_a_table(walk, extracted):
    checked = walk("suites check")
    assert "pets: 20 test images, 2 classes (cat, dog), classifier from" in checked
    assert "birds: 20 test images, 2 classes (crow, gull), classifier from text tower" in checked
    table = walk("report --cache cache/animals_ta")
    assert re.search(r"individual experts +100.0 +100.0 +100.0", table)
    assert re.search(r"method +pets +Birds of Europe +Avg", table)
    rows = [json.loads(line) for line in Path("cache/animals_ta/results.jsonl").read_text().splitlines()]
    assert all(row["bias"]["after"] < row["bias"]["before"] / 2 for row in rows)
    assert all(row["accuracy"]["head"] >= 0.9 for row in rows)


def test_the_cache_alone_has_what_the_other_commands_need(folder, run, extracted, walk):
    assert extracted.manifest.tasks["pets"].class_names == ("cat", "dog")
    assert not extracted.linear_classifier("pets").normalise
    assert extracted.linear_classifier("pets").bias is not None
    assert extracted.linear_classifier("birds").bias is None
    (folder / "animals.toml").rename(folder / "elsewhere.toml")
    try:
        image = "data/pets/test/dog/1.png"
        flags = ("--cache", "cache/animals_ta", "--head", "prob-h128")
        status, out, err = run("predict", *flags, "--task", "pets", image)
        assert (status, out.split(": ")[1][:4]) == (0, "dog "), err
        assert run("export", *flags, "--out", "exported")[0] == 0
        assert probsurgery.load_model("exported").class_names["birds"] == ("crow", "gull")
        walk("report --cache cache/animals_ta")
    finally:
        (folder / "elsewhere.toml").rename(folder / "animals.toml")


def test_from_features_to_a_table(walk, extracted, folder):
    for task in ("pets", "birds"):
        place = folder / "features" / task
        place.mkdir(parents=True)
        for name in ("merged", "expert"):
            np.save(place / f"{name}.npy", extracted.features(task, name).numpy())
        np.save(place / "labels.npy", extracted.labels(task).numpy())
    shutil.copy(folder / "pets_head.safetensors", folder / "features" / "pets" / "classifier.safetensors")
    walk("import", "fit --cache cache/mine")
    table = walk("report --cache cache/mine")
    (accuracy,) = re.findall(r"steps\) +- +([\d.]+) +- *\n", table)  # birds have no classifier here
    row = json.loads(Path("cache/animals_ta/results.jsonl").read_text().splitlines()[0])
    assert float(accuracy) == 100 * row["accuracy"]["head"]

    (code,) = re.findall(r"^```python\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    names: dict[str, object] = {}
    exec(code, names)
    assert names["corrected"].shape == (20, 16)
