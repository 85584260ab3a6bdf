"""The task tables against the protocol's figures, and data sets read from folders in the published format."""

import string

import numpy as np
import pytest
from PIL import Image

from probsurgery.pipeline.datasets.suites import select_tasks
from probsurgery.pipeline.datasets.tasks import open_images
from probsurgery.pipeline.errors import InputError
from support import hub_data_set

PROTOCOL = {  # classes, templates
    "sun397": (397, 2),
    "cars": (196, 8),
    "resisc45": (45, 18),
    "eurosat": (10, 3),
    "svhn": (10, 1),
    "gtsrb": (43, 3),
    "mnist": (10, 1),
    "dtd": (47, 8),
}


def test_the_eight_tasks_have_the_protocols_classes_and_templates():
    tasks = select_tasks("clip8", None)
    assert {t.name: (len(t.class_names), len(t.templates)) for t in tasks} == PROTOCOL
    for task in tasks:
        assert len(set(task.class_names)) == len(task.class_names)
        for template in task.templates:
            assert [field for _, field, _, _ in string.Formatter().parse(template) if field is not None] == [""]


def test_selection_keeps_the_suites_order_and_refuses_what_is_unknown():
    assert [t.name for t in select_tasks("clip8", ["dtd", "cars"])] == ["cars", "dtd"]
    with pytest.raises(InputError, match="unknown task 'imagenet'; choose from: sun397, cars"):
        select_tasks("clip8", ["imagenet"])
    with pytest.raises(InputError, match="named twice"):
        select_tasks("clip8", ["cars", "cars"])
    with pytest.raises(InputError, match="no task was named"):
        select_tasks("clip8", [])


@pytest.fixture
def eurosat(tmp_path, monkeypatch):
    """A function that writes a data set named like EuroSAT, and returns the folder around it."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "hf"))

    def write(labels, **other):
        hub_data_set(tmp_path / "data" / "eurosat", labels, **other)
        return tmp_path / "data"

    return write


def test_a_folder_of_parquet_files_is_read_like_the_hubs(eurosat):
    folder = eurosat([3, 1, 4, 1, 5])
    (task,) = select_tasks("clip8", ["eurosat"])
    images = open_images(task, "test", str(folder), any_rows=True)
    assert images.labels.tolist() == [3, 1, 4, 1, 5]
    assert np.asarray(images.decode(2))[0, 0].tolist() == [20, 0, 14]
    first = open_images(task, "test", str(folder), limit=2, any_rows=True)
    assert len(first) == 2
    assert first.fingerprint != images.fingerprint


def test_missing_data_and_other_classes_are_refused(eurosat, tmp_path):
    (task,) = select_tasks("clip8", ["eurosat"])
    with pytest.raises(InputError, match="no folder .*--data takes a folder"):
        open_images(task, "test", str(tmp_path / "nothing"))
    with pytest.raises(InputError, match="has 12 classes, but eurosat has 10"):
        open_images(task, "test", str(eurosat([0], classes=12)))


def test_other_columns_are_refused(eurosat):
    (task,) = select_tasks("clip8", ["eurosat"])
    with pytest.raises(InputError, match="no column 'image'; it has: img, label"):
        open_images(task, "test", str(eurosat([0], columns=("img", "label"))))


def test_a_missing_split_is_refused_in_one_line(eurosat):
    (task,) = select_tasks("clip8", ["eurosat"])
    with pytest.raises(InputError, match="split train") as caught:
        open_images(task, "train", str(eurosat([0])))
    assert "\n" not in str(caught.value)


def test_a_task_with_no_rows_is_refused(monkeypatch):
    import probsurgery.pipeline.mini as mini

    (task,) = select_tasks("mini", ["mnist"])
    monkeypatch.setattr(mini, "load", lambda name, split: ([], np.empty(0, np.int64)))
    with pytest.raises(InputError, match=r"task mnist \(test\) has no rows"):
        open_images(task, "test")
    monkeypatch.setattr(mini, "load", lambda name, split: ([Image.new("L", (8, 8))], np.array([10])))
    with pytest.raises(InputError, match="labels from 10 to 10, but 10 classes"):
        open_images(task, "test")
    with pytest.raises(InputError, match="--data is not for mnist"):
        open_images(task, "test", "somewhere")
