"""Suites of one's own: what their files say and get wrong, and images from everywhere that they may name."""

import json
import re
from pathlib import Path

import datasets
import pytest
from PIL import Image

from probsurgery.pipeline.datasets.layouts import ClassIndex
from probsurgery.pipeline.datasets.suites import load_suite, read_suite
from probsurgery.pipeline.datasets.tasks import open_images
from probsurgery.pipeline.errors import InputError

CLASSES = ("C", "C++", "cat")  # two of them differ in separators only


def shade(level):
    return Image.new("RGB", (6, 5), (level, 0, 255 - level))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Six images, shades 0 to 5, two of each class, in every form."""
    root = tmp_path_factory.mktemp("own")
    datasets.config.HF_DATASETS_CACHE = root / "hf"
    for number in range(6):
        for split in ("train", "test"):
            folder = root / "pets" / split / CLASSES[number // 2]
            folder.mkdir(parents=True, exist_ok=True)
            shade(number).save(folder / f"{number}.png")
        (root / "images").mkdir(exist_ok=True)
        shade(number).save(root / "images" / f"{number}.png")
    rows = [(f"images/{number}.png", ("01", "NA", "none")[number // 2]) for number in range(6)]
    (root / "commas.csv").write_text("\ufefffile, class\n" + "".join(f"{file}, {name}\n" for file, name in rows))
    (root / "tabs.tsv").write_text("class\tpath\n" + "".join(f"{name}\t{file}\n" for file, name in rows))
    lines = [{"img": file, "target": number // 2} for number, (file, _) in enumerate(rows)]
    (root / "lines.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (root / "list.json").write_text(json.dumps(lines))
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))})
    columns = {"image": [shade(number) for number in range(6)], "label": [number // 2 for number in range(6)]}
    table = datasets.Dataset.from_dict(columns, features=features)
    (root / "parquet").mkdir()
    table.to_parquet(root / "parquet" / "data.parquet")
    table.save_to_disk(root / "saved")
    datasets.DatasetDict({"test": table}).save_to_disk(root / "splits")
    (root / "empty.csv").write_text("file,class\nimages/0.png,x\nimages/1.png,\n")
    (root / "lists.json").write_text('{"image": ["images/0.png"], "label": [[0]]}')
    for place in ("twice/test/A b", "twice/test/a_b", "twice/test/c", "other/a b", "above/pets/x"):
        (root / place).mkdir(parents=True)
        shade(0).save(root / place / "0.png")
    (root / "numbers.csv").write_text("file,class\n" + "".join(f"images/{n % 6}.png,{n}\n" for n in range(11)))
    return root


def suite(data, body, name="own.toml"):
    (data / name).write_text(f'name = "own"\n{body}')
    return data / name


@pytest.mark.parametrize(
    ("place", "classes"),
    [
        ("pets/test", CLASSES),
        ("pets", CLASSES),
        ("commas.csv", ("01", "NA", "none")),
        ("tabs.tsv", ("01", "NA", "none")),
        ("lines.jsonl", ("0", "1", "2")),
        ("list.json", ("0", "1", "2")),
        ("parquet/data.parquet", CLASSES),
        ("parquet", CLASSES),
        ("saved", CLASSES),
        ("splits", CLASSES),
    ],
)
def test_images_labels_and_class_names_come_from_every_form(data, place, classes):
    (task,) = load_suite(str(suite(data, f'[tasks.a]\ntest = "{place}"'))).select(None)
    images = open_images(task, "test")
    assert task.class_names == classes
    assert images.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert [images.decode(row).getpixel((0, 0))[0] for row in range(6)] == list(range(6))


def test_the_pixels_of_a_table_of_paths_are_in_its_fingerprint(data):
    path = suite(data, '[tasks.a]\ntest = "commas.csv"')
    (task,) = load_suite(str(path)).select(None)
    before = open_images(task, "test").fingerprint
    assert open_images(task, "test").fingerprint == before
    shade(77).save(data / "images" / "3.png")
    assert open_images(task, "test").fingerprint != before
    shade(3).save(data / "images" / "3.png")


def test_images_of_packages_may_be_in_any_suite(data):
    body = '[tasks.bones]\ntest = "mini:xray"\ntitle = "X-rays"\n[tasks.pets]\ntest = "pets"'
    bones, pets = load_suite(str(suite(data, body))).select(None)
    assert len(open_images(bones, "test")) == 1004
    assert (bones.class_names[0], bones.title, pets.class_names) == ("normal", "X-rays", CLASSES)


@pytest.mark.parametrize("place", ["images", "commas.csv"])
def test_images_without_labels(data, place):
    (task,) = load_suite(str(suite(data, f'[tasks.a]\ntest = "{place}"\nlabels = false'))).select(None)
    images = open_images(task, "test")
    assert len(images) == 6
    assert set(images.labels) == {-1}


def test_class_names_of_both_splits_are_known(data):
    (data / "rare" / "train" / "ant").mkdir(parents=True, exist_ok=True)
    (data / "rare" / "test" / "bee").mkdir(parents=True, exist_ok=True)
    shade(1).save(data / "rare" / "train" / "ant" / "1.png")
    shade(2).save(data / "rare" / "test" / "bee" / "2.png")
    (task,) = load_suite(str(suite(data, '[tasks.a]\ntest = "rare"\ntrain = "rare/train"'))).select(None)
    assert sorted(task.class_names) == ["ant", "bee"]
    assert task.class_names[open_images(task, "test").labels[0]] == "bee"


def test_names_that_differ_in_separators_are_told_apart():
    classes = ClassIndex("languages", ["C", "C++", "c#", "Objective C"])
    assert [classes.find(name) for name in ("C", "C++", "c#", "objective-c")] == [0, 1, 2, 3]
    assert classes.find("c") is None
    assert classes.find("!") is None


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ('[tasks.a]\ntest = "above"', "are all two folders down"),
        ('[tasks.a]\ntest = { data = "pets", split = "val" }', "holds folders of splits .* none is 'val'"),
        ('[tasks.a]\ntest = { data = "pets/test", split = "val" }', "has no folder of the split 'val'"),
        ('[tasks.a]\ntest = { data = "commas.csv", split = "test" }', "is one file, which has no splits"),
        ('[tasks.a]\ntest = { data = "pets", label = "x" }', "class folders, which have no columns"),
        ('[tasks.a]\ntest = "empty.csv"', "no label in row 1"),
        ('[tasks.a]\ntest = "lists.json"', r"has a label '\[\[0\]\]'"),
        ('[tasks.a]\ntest = "twice"\nclasses = ["a b", "c"]', "two folders of the class 'a b'"),
        ('[tasks.a]\ntest = "twice/test"\ntrain = "other"', "classes 'A b' and 'a b', in different splits"),
        ('[tasks.a]\ntest = "images"', "neither class folders with images nor a table.*`labels = false`"),
        ('[tasks.a]\ntest = "pets/test"\nclasses = ["dog"]', "has a class 'C' that a does not have"),
        ('[tasks.a]\ntest = { data = "commas.csv", label = "kind" }', "no column 'kind'; it has: file, class"),
        ('[tasks.a]\ntest = "commas.csv"\ntrain = "pets/train"\nclasses = ["x"]', "has a class '01'"),
        ('[tasks.a]\ntest = "own.toml"', "no table of images; known are: .parquet"),
        ('[tasks.a]\ntrain = "pets/train"', "names no test images; add `test = "),
        ('[tasks.a]\ntest = "pets/train/cat"', "neither class folders"),
        ('[tasks.a]\ntest = "mini:mnst"', r"unknown task 'mnst' \(did you mean 'mnist'\?\)"),
        ('[tasks.a]\ntest = "mini:xray"\nclasses = ["viral pneumonia", "normal", "c"]', "in another order"),
    ],
)
def test_images_that_are_not_there_are_refused(data, body, message):
    with pytest.raises(InputError, match=message):
        [open_images(task, "test") for task in load_suite(str(suite(data, body))).select(None)]


FAULTS = {
    'encoderr = "ViT-B-32"': r"unknown key encoderr \(did you mean 'encoder'\?\)",
    'pretrained = "base.safetensor"': r"pretrained is 'base.safetensor', but there is no /",
    '[tasks.a]\ntest = "pest"': r"tasks.a: test is 'pest', but there is no .*/pest \(did you mean 'pets'\?\)",
    '[tasks.b]\ntest = "pets"\nexpertt = "x"': r"unknown key tasks.b.expertt \(did you mean 'expert'\?\)",
    '[tasks.c]\ntest = { data = "pets", colum = "x" }': "unknown key tasks.c.test.colum",
    '[tasks.d]\ntest = "pets"\nclasses = ["x", "y", "x"]': "tasks.d: classes lists 'x' 2 times",
    '[tasks.e]\ntest = "pets"\ntemplates = ["a photo"]': "tasks.e: templates: 'a photo' needs {} once",
    "[tasks.f]\nclasses = 'cat'": "tasks.f.classes is not valid: Expected `array`",
    '[tasks.C]\ntest = "pets"': "tasks.c is there 2 times",
    '[tasks."g h"]\ntest = "pets"': "tasks.g h: a name has at most 100 letters",
    '[tasks.i]\ntest = "pets"\ntitle = "b"': "2 tasks have the title 'b'",
    '[tasks.j]\ntest = "pets"\nnormalise = false': "tasks.j: normalise is for a classifier from a file",
    '[tasks.k]\nclasses = ["x"]': r"tasks.k: test \(or train\) is missing",
    '[tasks.AVG]\ntest = "pets"': "tasks.AVG: a task cannot be called 'AVG'",
    '[tasks.pretrained]\ntest = "pets"': "a task cannot be called 'pretrained'",
    '[tasks.l]\ntest = "~nobody-of-this-name/x"': "tasks.l: test is '~nobody-of-this-name/x', but there is no",
    '[tasks.m]\ntest = "pets"\nexpert = ""': "tasks.m: expert is empty",
    '[tasks.n]\ntest = "images"\nlabels = false\ntemplates = ["{}"]': "tasks.n: templates need `classes`",
}


def test_every_fault_of_a_file_is_said_at_once(data):
    loaded, problems = read_suite(suite(data, "\n".join(FAULTS)))
    assert loaded is None
    for message in FAULTS.values():
        assert any(re.search(message, problem) for problem in problems), message
    with pytest.raises(InputError, match=rf"own.toml: .*\({len(problems)} problems; `probsurgery suites check"):
        load_suite(str(data / "own.toml"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the key name is missing"),
        ("name = x", r"not valid TOML: Invalid value \(at line 1"),
        ('name = "x"\n[tasks.a]\n[tasks.a]', r"not valid TOML: Cannot declare .* twice \(at line 3"),
        (
            'name = "clip8"\n[tasks.a]\ntest = "pets"',
            "name 'clip8' is that of a suite or an architecture",
        ),
        ('name = "vitb32"\n[tasks.a]\ntest = "pets"', "name 'vitb32' is that of a suite or an architecture"),
        ('name = "../x"\n[tasks.a]\ntest = "pets"', "a name has at most 100"),
        ('name = "x"', "it has no tasks"),
        ('name = "x"\nextends = "mini"\n[tasks.mnist]\ntest = "pets"', "tasks.mnist is a task of mini already"),
        ('name = "x"\nextends = "other.toml"', "no suite .*other.toml: No such file"),
        ('name = "x"\nextends = "bad.toml"', "extend each other without end"),
        ("[" * 10_000, "not valid TOML"),
        ('name = "x"\ntasks = 3', "tasks is not valid: Expected `object`"),
    ],
)
def test_files_that_are_no_suites_are_refused(data, text, message):
    (data / "bad.toml").write_text(text)
    with pytest.raises(InputError, match=message):
        load_suite(str(data / "bad.toml"))


def test_a_suite_may_extend_another(data):
    suite(data, 'encoder = "ViT-B-32"\n[tasks.a]\ntest = "pets"')
    (data / "inner").mkdir(exist_ok=True)
    (data / "inner" / "more.toml").write_text('name = "more"\nextends = "../own.toml"\n[tasks.b]\ntest = "../images"')
    more = load_suite(str(data / "inner" / "more.toml"))
    assert list(more.tasks) == ["a", "b"]
    assert more.encoder.model == "ViT-B-32"
    assert Path(more.tasks["b"].test.place).samefile(data / "images")


def test_class_names_are_in_the_order_of_folders_and_of_numbers(data):
    for place in ("ordered/test/ant", "ordered/test/cow", "ordered/train/bee", "ordered/train/recycled"):
        (data / place).mkdir(parents=True)
        shade(1).save(data / place / "1.png")
    body = '[tasks.a]\ntest = "ordered"\ntrain = "ordered"\n[tasks.b]\ntest = "numbers.csv"'
    folders, numbers = load_suite(str(suite(data, body))).select(None)
    assert folders.class_names == ("ant", "bee", "cow", "recycled")
    assert open_images(folders, "test").labels.tolist() == [0, 2]
    assert open_images(numbers, "test").labels.tolist() == list(range(11))
    one_based = ClassIndex("a", ["1", "2", "3"])
    assert [one_based.find(name) for name in ("1", "3", "0", "t_1")] == [0, 2, None, None]


def test_images_of_a_table_are_beside_it_and_nowhere_else(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shade(9).save(tmp_path / "9.png")
    (data / "far.csv").write_text("file,class\n9.png,x\nhttp://localhost/1.png,x\nimages\\1.png,x\n")
    (task,) = load_suite(str(suite(data, '[tasks.a]\ntest = "far.csv"'))).select(None)
    images = open_images(task, "test")
    for row in (0, 1):
        with pytest.raises(ValueError, match="there is no such file in .*/own"):
            images.decode(row)
    assert images.decode(2).size == (6, 5)


def test_images_without_labels_are_those_of_their_split(data):
    (task,) = load_suite(str(suite(data, '[tasks.a]\ntest = "pets"\nlabels = false'))).select(None)
    assert len(open_images(task, "test")) == 6


def test_an_image_that_cannot_be_opened_is_named_when_it_is_decoded(data):
    place = data / "dead" / "x"
    place.mkdir(parents=True)
    shade(0).save(place / "0.png")
    (place / "1.png").symlink_to(data / "nothing.png")
    (task,) = load_suite(str(suite(data, '[tasks.a]\ntest = "dead"'))).select(None)
    with pytest.raises(ValueError, match="dead/x/1.png: "):
        open_images(task, "test").decode(1)


def test_lists_in_utf_16_are_read(data):
    (data / "wide.csv").write_text("file,class\nimages/0.png,\u00e9\n", encoding="utf-16")
    (task,) = load_suite(str(suite(data, '[tasks.a]\ntest = "wide.csv"'))).select(None)
    assert task.class_names == ("\u00e9",)
    assert len(open_images(task, "test")) == 1


def test_numbers_are_positions_where_the_table_lists_its_classes(data):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["1", "2", "3"])})
    columns = {"image": [shade(n) for n in range(2)], "label": [1, 2]}
    datasets.Dataset.from_dict(columns, features=features).to_parquet(data / "listed.parquet")
    (task,) = load_suite(str(suite(data, '[tasks.a]\ntest = "listed.parquet"'))).select(None)
    assert open_images(task, "test").labels.tolist() == [1, 2]
