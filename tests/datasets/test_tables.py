"""Data sets in tables as people make them: by pandas, by `save_to_disk`, as webdataset tars."""

import io
import re
import tarfile

import datasets
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from probsurgery.pipeline.datasets.suites import select_tasks
from probsurgery.pipeline.datasets.tasks import open_images
from probsurgery.pipeline.errors import InputError
from support import parquet

(EUROSAT,) = select_tasks("clip8", ["eurosat"])


def png(shade):
    file = io.BytesIO()
    Image.new("RGB", (6, 5), (shade, 0, 0)).save(file, "PNG")
    return file.getvalue()


PICTURES = [png(shade) for shade in range(3)]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "hf"))
    (tmp_path / "data" / "eurosat").mkdir(parents=True)
    return tmp_path / "data" / "eurosat"


def images_of(folder, split="test"):
    return open_images(EUROSAT, split, str(folder.parent), any_rows=True)


def opened(folder, split="test"):
    """Labels, and the shade of each image."""
    images = images_of(folder, split)
    return images.labels.tolist(), [np.asarray(images.decode(i))[0, 0, 0].item() for i in range(len(images))]


@pytest.mark.parametrize(
    "images",
    [
        PICTURES,
        [{"bytes": picture, "path": None} for picture in PICTURES],
        [{"bytes": picture, "path": "x.png"} for picture in PICTURES],
        [{"bytes": picture} for picture in PICTURES],
        ["0.png", "1.png", "2.png"],
    ],
    ids=["bytes", "no path", "path and bytes", "bytes alone", "paths beside the table"],
)
def test_images_without_the_hubs_metadata_are_decoded(folder, images):
    for name, picture in enumerate(PICTURES):
        (folder / f"{name}.png").write_bytes(picture)
    parquet(folder, images, [2, 0, 1])
    assert opened(folder) == ([2, 0, 1], [0, 1, 2])


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (["Forest", "annual crop land", "sea_lake"], [1, 0, 9]),
        (pd.Categorical(["Forest", "SeaLake", "Forest"]), [1, 9, 1]),
        (["3", "2", "1"], [3, 2, 1]),
        ([3.0, 2.0, 1.0], [3, 2, 1]),
    ],
)
def test_labels_are_names_or_numbers(folder, labels, expected):
    parquet(folder, PICTURES, labels)
    assert opened(folder)[0] == expected
    assert images_of(folder).class_order == ("by name" if isinstance(labels[0], str) else "names unknown")


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (["Forest", None, "SeaLake"], r"data set .* \(test\) has no label in row 1; give it one"),
        ([0, 1, None], "has no label in row 2"),
        (pd.array([None, 1, 2], dtype="Int64"), "has no label in row 0"),
        (["Forest", "Meadow", "SeaLake"], "has a class 'Meadow' that eurosat does not have"),
        ([0, 1.5, 2], "has a label '1.5'; labels are numbers from 0, or class names"),
        ([0, float("inf"), 2], "has a label 'inf'"),
        ([[0], [1], [2]], r"has a label '\[0\]'"),
        ([b"a", b"b", b"c"], "has a label \"b'a'\""),
    ],
)
def test_labels_that_are_neither_are_refused_in_one_line(folder, labels, words):
    parquet(folder, PICTURES, labels)
    with pytest.raises(InputError, match=words) as caught:
        images_of(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "images", [[PICTURES[0], None, b"x"], [{"bytes": PICTURES[0], "path": None}, None, {"bytes": b"", "path": "a.png"}]]
)
def test_a_row_without_an_image_is_a_bad_image(folder, images):
    parquet(folder, images, [0, 1, 2])
    opened = images_of(folder)
    assert np.asarray(opened.decode(0)).shape == (5, 6, 3)
    with pytest.raises(ValueError, match="the row has no image"):
        opened.decode(1)
    with pytest.raises(ValueError, match=r"^it is not a picture in a known format$|^a.png: it is empty$"):
        opened.decode(2)


@pytest.mark.parametrize("images", [[1, 2, 3], [[[[0, 0, 0]]]] * 3])
def test_a_column_that_holds_no_files_is_refused(folder, images):
    parquet(folder, images, [0, 1, 2])
    with pytest.raises(InputError, match=r"in column 'image', and not image files or their bytes"):
        images_of(folder)


@pytest.mark.parametrize(
    "name", ["$RECYCLE.BIN/test-0.parquet", "@eaDir/test-0.parquet/SYNO", "lost+found/test-0.parquet"]
)
def test_tables_of_other_programs_are_passed_over(folder, name):
    parquet(folder, PICTURES, [0, 1, 2])
    (folder / name).parent.mkdir(parents=True)
    (folder / name).write_bytes(b"x")
    assert opened(folder) == ([0, 1, 2], [0, 1, 2])


def test_a_folder_whose_name_is_a_pattern(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "hf"))
    parquet(tmp_path / "data[1]" / "eurosat", PICTURES, [0, 1, 2])
    assert opened(tmp_path / "data[1]" / "eurosat") == ([0, 1, 2], [0, 1, 2])


def test_the_cause_of_a_table_that_cannot_be_read_is_named(folder):
    parquet(folder, PICTURES, [0, 1, 2])
    (file,) = folder.iterdir()
    content = file.read_bytes()
    file.write_bytes(content[:4] + b"\xff" * 100 + content[104:])
    with pytest.raises(
        InputError, match=r"cannot load the data set .*, split test \((?!An error occurred).*\); check its"
    ):
        images_of(folder)


def table(rows, names=EUROSAT.aliases):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(names))})
    return datasets.Dataset.from_dict({"image": PICTURES[:rows], "label": list(range(rows))}, features=features)


def test_folders_of_save_to_disk(folder):
    datasets.DatasetDict({"test": table(3), "train": table(2)}).save_to_disk(folder)
    assert opened(folder) == ([0, 1, 2], [0, 1, 2])
    assert opened(folder, "train") == ([0, 1], [0, 1])
    assert images_of(folder).class_order == "checked"
    (folder / "train" / "state.json").unlink()
    with pytest.raises(InputError, match="has no split train; it has: test"):
        images_of(folder, "train")


def test_one_split_of_save_to_disk(folder):
    table(3).select([2, 0]).save_to_disk(folder)
    assert opened(folder) == ([2, 0], [2, 0])
    with pytest.raises(
        InputError, match=r"holds one split \(without a name\); save the split train to .*eurosat/train"
    ):
        images_of(folder, "train")
    table(3, names=EUROSAT.aliases[::-1]).save_to_disk(folder / "train")
    with pytest.raises(InputError, match="another order"):
        images_of(folder, "train")


def tar(path, files):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


SAMPLES = {f"s{i}.{end}": value for i in range(3) for end, value in (("png", PICTURES[i]), ("cls", b"%d" % (2 - i)))}


@pytest.mark.parametrize("name", ["test/0.tar", "eurosat-test-000000.tar"])
def test_webdataset_tars(folder, name):
    tar(folder / name, SAMPLES)
    (folder / f"._{name.replace('/', '-')}").write_bytes(b"\0\5\26\7")
    assert opened(folder) == ([2, 1, 0], [0, 1, 2])
    with pytest.raises(
        InputError, match=re.escape(f"no file of the split train, by its name or its folder's; it has: {name}")
    ):
        images_of(folder, "train")
    (folder / "classnames.txt").write_text("\n".join(EUROSAT.aliases))
    assert images_of(folder).class_order == "checked"
    (folder / "classnames.txt").write_text("\n".join(EUROSAT.aliases[::-1]))
    with pytest.raises(InputError, match="another order"):
        images_of(folder)


def test_tars_that_are_no_webdataset_are_refused(folder):
    tar(folder / "test.tar", {"Forest/a.png": PICTURES[0]})
    with pytest.raises(InputError, match="has no column 'cls'; it has: .*png"):
        images_of(folder)
    (folder / "test.tar").write_bytes(b"x" * 2000)
    with pytest.raises(InputError, match=r"cannot load the data set .*; check its files"):
        images_of(folder)
