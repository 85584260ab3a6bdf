"""The package's suites, and what is particular to the further tasks of clip14 and clip20."""

import json
import tomllib

import datasets
import pytest
from PIL import Image

from probsurgery.pipeline.config import SUITES
from probsurgery.pipeline.datasets.layouts import ClassIndex
from probsurgery.pipeline.datasets.suites import suite_path, suite_tasks
from probsurgery.pipeline.datasets.tasks import open_images
from probsurgery.pipeline.errors import InputError
from probsurgery.pipeline.mini import MINI_TASKS
from support import hub_data_set, refused

TASKS = suite_tasks("clip20")


@pytest.mark.parametrize(("suite", "count"), zip(SUITES, (7, 8, 14, 20), strict=True))
def test_suites_have_their_tasks(suite, count):
    tasks = suite_tasks(suite)
    assert len(tasks) == count
    for name, task in tasks.items():
        assert name == task.name
        assert len(set(task.class_names)) == len(task.class_names) > 1
        assert (suite == "mini") == (task.hub is None) == (task.source("test") is not None)
        assert len(task.aliases) in (0, len(task.class_names))
    assert tomllib.loads(suite_path(suite).read_text(encoding="utf-8"))["name"] == suite


def test_each_suite_begins_with_the_smaller_one():
    eight, fourteen, twenty = (list(suite_tasks(name)) for name in ("clip8", "clip14", "clip20"))
    assert twenty[:14] == fourteen
    assert fourteen[:8] == eight
    counts = {name: (len(task.class_names), task.rows["test"]) for name, task in TASKS.items()}
    assert counts["cifar100"] == (100, (10_000,))
    assert counts["emnist"] == (26, (20_800,))
    assert counts["renderedsst2"] == (2, (1_821,))


def test_the_mini_suites_file_has_the_packages_tasks():
    assert {n: t.class_names for n, t in suite_tasks("mini").items()} == {
        n: t.class_names for n, t in MINI_TASKS.items()
    }


def test_class_names_in_any_script_have_an_order():
    kmnist = TASKS["kmnist"]
    classes = ClassIndex("kmnist", kmnist.class_names, kmnist.aliases)
    assert classes.check_order(kmnist.class_names, "here") == "checked"
    assert classes.check_order(kmnist.aliases, "here") == "checked"
    with pytest.raises(InputError, match="another order: 'き' is number 0 there and 1 here"):
        classes.check_order([kmnist.class_names[1], kmnist.class_names[0], *kmnist.class_names[2:]], "here")


def shades(count):
    return [Image.new("RGB", (8, 8), (10 * i, 0, 0)) for i in range(count)]


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "hf"))
    return tmp_path / "data"


def labels_of(name, data, split="test"):
    return open_images(TASKS[name], split, str(data), any_rows=True).labels.tolist()


def test_boolean_labels_are_numbers(data):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("bool")})
    table = datasets.Dataset.from_dict({"image": shades(3), "label": [True, False, True]}, features=features)
    (data / "pcam").mkdir(parents=True)
    table.to_parquet(data / "pcam" / "test-00000-of-00001.parquet")
    assert labels_of("pcam", data) == [1, 0, 1]


def test_columns_and_splits_are_called_as_the_data_set_calls_them(data):
    hub_data_set(data / "wds_fer2013", [3, 0, 6], classes=7, columns=("jpg", "cls"))
    assert labels_of("fer2013", data) == [3, 0, 6]
    hub_data_set(data / "food101", [100, 0], classes=101, split="validation")
    assert labels_of("food101", data) == [100, 0]


def test_class_folders_are_read_for_every_task(data):
    names = TASKS["oxfordpets"].class_names
    for name in names:
        (data / "oxford-iiit-pet" / "test" / name.replace("_", " ")).mkdir(parents=True)
        shades(1)[0].save(data / "oxford-iiit-pet" / "test" / name.replace("_", " ") / "0.png")
    assert sorted(labels_of("oxfordpets", data)) == list(range(37))


def test_the_commands(run):
    status, out, _ = run("suites")
    assert status == 0
    assert "clip20: 20 tasks" in out
    assert json.loads(run("suites", "--json")[1])["clip14"]["flowers102"] == 102
    shown = tomllib.loads(run("suites", "show", "clip14")[1])
    assert shown["extends"] == "clip8"
    refused(run("suites", "show", "clip15"), "unknown suite 'clip15'", "clip14")
    refused(run("extract", "--arch", "vitb32", "--suite", "imagenet"), "unknown suite 'imagenet'", "clip20")
    refused(
        run("extract", "--arch", "vitb32", "--suite", "clip14", "--tasks", "kmnist"), "unknown task 'kmnist'", "pcam"
    )
