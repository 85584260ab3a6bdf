"""Small data sets in the layouts of torchvision, of the task-vectors code and of the archives."""

import gzip

import numpy as np
import pytest
import scipy.io
from PIL import Image

from probsurgery.pipeline.datasets.layouts import ClassIndex
from probsurgery.pipeline.datasets.suites import select_tasks
from probsurgery.pipeline.datasets.tasks import open_images
from probsurgery.pipeline.errors import InputError, ProbsurgeryError
from probsurgery.pipeline.extraction.loading import _Decoded, refuse_undecoded
from probsurgery.pipeline.models.encoders import get_encoder
from support import hub_data_set, idx

TASKS = {task.name: task for task in select_tasks("clip8", None)}


def picture(path, shade):
    """An image that its first pixel identifies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 5), (shade, 0, 0)).save(path)


def opened(task, folder, split="test"):
    """Labels, and the shade of each image."""
    images = open_images(TASKS[task], split, str(folder), any_rows=True)
    return images.labels.tolist(), [
        np.asarray(images.decode(i).convert("RGB"))[0, 0, 0].item() for i in range(len(images))
    ]


def folder_names(task):
    """Class names in the spelling of the data set's own folders."""
    spelling = {
        "sun397": lambda name: f"{name[0]}_{name.replace(' ', '_')}",
        "resisc45": lambda name: name.replace(" ", "_"),
        "cars": lambda name: name.replace("/", "-"),
    }.get(task, lambda name: name)
    if task == "gtsrb":
        return [f"{label:05d}" for label in range(43)]
    return [spelling(name) for name in (TASKS[task].aliases or TASKS[task].class_names)]


@pytest.mark.parametrize(
    ("task", "folder"),
    [
        ("sun397", "sun397"),
        ("cars", "stanford_cars_folder_based"),
        ("resisc45", "resisc45"),
        ("eurosat", "EuroSAT_splits"),
        ("gtsrb", "GTSRB"),
        ("dtd", "dtd"),
        ("svhn", "SVHN"),
        ("mnist", "mnist"),
    ],
)
def test_class_folders_give_labels_by_name(tmp_path, task, folder):
    names = folder_names(task)
    for split, shift in (("train", 0), ("val" if task == "dtd" else "test", 7)):
        for label, name in enumerate(names):
            picture(tmp_path / folder / split / name / "x.png", (label + shift) % 256)
    for split, shift in (("train", 0), ("test", 7)):
        labels, shades = opened(task, tmp_path, split)
        assert sorted(labels) == list(range(len(names)))
        assert shades == [(label + shift) % 256 for label in labels]


def test_unknown_or_missing_class_folders_are_named(tmp_path):
    base = tmp_path / "eurosat" / "test"
    for name in folder_names("eurosat")[1:]:
        picture(base / name / "x.png", 1)
    with pytest.raises(InputError, match=r"no folder for 1 classes, such as 'annual crop land'"):
        opened("eurosat", tmp_path)
    picture(base / "Meadow" / "x.png", 1)
    with pytest.raises(
        InputError, match=r"a class 'Meadow' that eurosat does not have; its classes are: annual crop land"
    ):
        opened("eurosat", tmp_path)


def test_sun397s_archive_with_its_partition(tmp_path):
    root = tmp_path / "SUN397"
    lines = ["/a/abbey/sun_a.png", "/b/bazaar/indoor/sun_b.png", "/b/bazaar/outdoor/sun_c.png"]
    for shade, line in enumerate(lines):
        picture(root / line[1:], shade)
    (root / "Testing_01.txt").write_text("\n".join(lines[1:]) + "\n")
    (root / "Training_01.txt").write_text(lines[0])
    names = TASKS["sun397"].class_names
    expected = [names.index("bazaar indoor"), names.index("bazaar outdoor")]
    assert opened("sun397", tmp_path) == (expected, [1, 2])
    assert opened("sun397", tmp_path, "train") == ([names.index("abbey")], [0])
    (root / lines[2][1:]).unlink()
    with pytest.raises(InputError, match=r"lists b/bazaar/outdoor/sun_c.png, which does not exist"):
        opened("sun397", tmp_path)


def test_resisc45s_lists_of_file_names(tmp_path):
    base = tmp_path / "resisc45"
    for shade, name in enumerate(("airplane", "storage_tank", "sea_ice")):
        for number in ("001", "002"):
            picture(base / "NWPU-RESISC45" / name / f"{name}_{number}.png", shade)
    (base / "resisc45-test.txt").write_text("airplane_002.png\nstorage_tank_001.png\n")
    (base / "resisc45-train.txt").write_text("sea_ice_001.png\n")
    names = TASKS["resisc45"].class_names
    assert opened("resisc45", tmp_path) == ([0, names.index("storage tank")], [0, 1])
    assert opened("resisc45", tmp_path, "train") == ([names.index("sea ice")], [2])


def test_dtds_archive(tmp_path):
    base = tmp_path / "dtd" / "dtd"
    for shade, line in enumerate(("banded/banded_1.png", "zigzagged/zigzagged_1.png", "dotted/dotted_1.png")):
        picture(base / "images" / line, shade)
    for name, line in (
        ("test", "zigzagged/zigzagged_1.png"),
        ("train", "banded/banded_1.png"),
        ("val", "dotted/dotted_1.png"),
    ):
        (base / "labels").mkdir(exist_ok=True)
        (base / "labels" / f"{name}1.txt").write_text(line + "\n")
    assert opened("dtd", tmp_path) == ([46], [1])
    assert opened("dtd", tmp_path, "train") == ([0, TASKS["dtd"].class_names.index("dotted")], [0, 2])


def test_gtsrb_in_torchvisions_layout(tmp_path):
    base = tmp_path / "gtsrb"
    for name, shade in (("00000.ppm", 9), ("00001.ppm", 8)):
        picture(base / "GTSRB" / "Final_Test" / "Images" / name, shade)
    (base / "GT-final_test.csv").write_text("Filename;Width;ClassId\n00000.ppm;6;16\n00001.ppm;6;1\n")
    picture(base / "GTSRB" / "Training" / "00042" / "00000_00000.ppm", 3)
    assert opened("gtsrb", tmp_path) == ([16, 1], [9, 8])
    assert opened("gtsrb", tmp_path, "train") == ([42], [3])


def test_cars_in_torchvisions_layout(tmp_path):
    base, names = tmp_path / "stanford_cars", list(TASKS["cars"].class_names)
    (base / "devkit").mkdir(parents=True)
    scipy.io.savemat(base / "devkit" / "cars_meta.mat", {"class_names": np.array([names], dtype=object)})
    kind = [("fname", object), ("class", "u1")]
    for split, path in (("test", "cars_test_annos_withlabels.mat"), ("train", "devkit/cars_train_annos.mat")):
        rows = np.array([[("00001.jpg", 196), ("00002.jpg", 1)]], dtype=kind)
        scipy.io.savemat(base / path, {"annotations": rows})
        for shade, name in enumerate(("00001.jpg", "00002.jpg")):
            picture(base / f"cars_{split}" / name, 100 * shade)
        labels, shades = opened("cars", tmp_path, split)
        assert labels == [195, 0]
        assert abs(shades[1] - 100) < 5  # JPEG
    reversed_names = names[::-1]
    scipy.io.savemat(base / "devkit" / "cars_meta.mat", {"class_names": np.array([reversed_names], dtype=object)})
    assert opened("cars", tmp_path)[0] == [0, 195]


@pytest.mark.parametrize("count", [1, 4])
def test_svhn_in_torchvisions_layout(tmp_path, count):
    pixels = np.zeros((32, 32, 3, count), np.uint8)
    pixels[0, 0, 0] = np.arange(count)
    for folder in (tmp_path / "svhn", tmp_path / "flat"):
        folder.mkdir()
        scipy.io.savemat(folder / "test_32x32.mat", {"X": pixels, "y": np.array([10, 1, 9, 5])[:count, None]})
    expected = ([0, 1, 9, 5][:count], list(range(count)))
    assert opened("svhn", tmp_path) == expected
    assert opened("svhn", tmp_path / "flat") == expected


@pytest.mark.parametrize(("inner", "suffix"), [("MNIST/raw", ""), ("mnist", ".gz"), ("mnist/MNIST/raw", "")])
def test_mnist_in_torchvisions_layout(tmp_path, inner, suffix):
    folder = tmp_path / inner
    folder.mkdir(parents=True)
    pack = gzip.compress if suffix else bytes
    pixels, labels = np.zeros((3, 28, 28), np.uint8), np.array([7, 2, 1], np.uint8)
    pixels[:, 0, 0] = [5, 6, 7]
    (folder / f"t10k-images-idx3-ubyte{suffix}").write_bytes(pack(idx(pixels)))
    (folder / f"t10k-labels-idx1-ubyte{suffix}").write_bytes(pack(idx(labels)))
    assert opened("mnist", tmp_path) == ([7, 2, 1], [5, 6, 7])
    (folder / f"t10k-images-idx3-ubyte{suffix}").write_bytes(pack(idx(pixels)[:-1]))
    with pytest.raises(InputError, match="not a whole IDX file"):
        opened("mnist", tmp_path)


@pytest.mark.parametrize("task", TASKS)
def test_an_unknown_layout_is_refused_with_the_known_ones_and_what_was_found(tmp_path, task):
    with pytest.raises(InputError, match=rf"no folder of {task}; it may be called: .*; the folder holds: nothing"):
        opened(task, tmp_path)
    (tmp_path / task / "photographs").mkdir(parents=True)
    with pytest.raises(
        InputError,
        match=r"known are: test/<class>/ and train/<class>/; .*Parquet files .*; found: photographs",
    ):
        opened(task, tmp_path)


def test_damaged_lists_give_one_line(tmp_path):
    (tmp_path / "svhn").mkdir()
    (tmp_path / "svhn" / "test_32x32.mat").write_bytes(b"MATLAB 5.0 MAT-file" + b"x" * 300)
    (tmp_path / "gtsrb").mkdir()
    (tmp_path / "gtsrb" / "GT-final_test.csv").write_text("Name;Class\na;1\n")
    for task, words in (("svhn", "cannot be read as svhn: "), ("gtsrb", r"lacks Filename or ClassId .*'Name;Class'")):
        with pytest.raises(InputError, match=words):
            opened(task, tmp_path)


@pytest.mark.parametrize(("rows", "fits"), [(19_850, True), (19_887, True), (19_851, False)])
def test_both_sizes_of_sun397_are_known(monkeypatch, rows, fits):
    from probsurgery.pipeline.datasets import tasks

    images = tasks.Images(np.zeros(rows, np.int64), "0", lambda row: None)
    monkeypatch.setattr(tasks, "_open", lambda *_: images)
    if fits:
        assert len(open_images(TASKS["sun397"], "test")) == rows
    else:
        with pytest.raises(
            InputError, match="19,851 images, and not 19,850 or 19,887 as its suite states; .*--any-rows"
        ):
            open_images(TASKS["sun397"], "test")
    assert len(open_images(TASKS["sun397"], "test", any_rows=True)) == rows


def test_the_papers_rows_are_87433_in_all():
    assert sum(task.rows["test"][0] for task in TASKS.values()) == 87_433


def test_a_permuted_list_of_class_names_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "hf"))
    names = [name.title() for name in TASKS["eurosat"].class_names]
    for listed, order in (
        (names, "checked"),
        (list(TASKS["eurosat"].aliases), "checked"),
        ([*names[:9], "something else"], "1 of 10 names unknown"),
        ([names[1], names[0], *names[2:]], None),
    ):
        hub_data_set(tmp_path / "eurosat", [0, 1, 2], names=listed)
        if order:
            images = open_images(TASKS["eurosat"], "test", str(tmp_path), any_rows=True)
            assert images.class_order == order
        else:
            with pytest.raises(InputError, match=r"another order: 'Forest' is number 0 there and 1 here"):
                open_images(TASKS["eurosat"], "test", str(tmp_path), any_rows=True)


def test_class_names_are_distinct_in_every_task():
    for task in TASKS.values():
        classes = ClassIndex(task.name, task.class_names, task.aliases)
        assert [classes.find(name) for name in task.class_names] == list(range(len(task.class_names)))
        assert classes.find("no such class") is None
        assert classes.find(str(len(task.class_names))) is None


def class_folders(folder, split="test"):
    """A picture for each class of EuroSAT, its shade the class's place in the folder."""
    for shade, name in enumerate(sorted(folder_names("eurosat"))):
        picture(folder / "eurosat" / split / name / "x.png", shade)
    return folder / "eurosat"


FOLDERS_OF_OTHERS = "__MACOSX .git .ipynb_checkpoints .thumbnails .Trash-1000 @eaDir #recycle $RECYCLE.BIN lost+found"
FILES_OF_OTHERS = "._x.png .DS_Store Thumbs.db ehthumbs.db desktop.ini .directory .nfs0000 x.png~ ~$list.txt Icon\r"


def test_what_other_programs_leave_is_passed_over(tmp_path):
    base = class_folders(tmp_path)
    expected = opened("eurosat", tmp_path)
    for place in (tmp_path, base, base / "test", base / "test" / "Forest", base / "test" / "Forest" / "deeper"):
        for name in (*FOLDERS_OF_OTHERS.split(), "System Volume Information"):
            picture(place / name / "y.png", 200)
            (place / name / "z.parquet").write_bytes(b"x")
        for name in FILES_OF_OTHERS.split(" "):
            (place / name).write_bytes(b"\0\5\26\7")
    assert opened("eurosat", tmp_path) == expected
    (base / "test").rename(base / "elsewhere")
    with pytest.raises(InputError, match=r"; found: elsewhere$"):
        opened("eurosat", tmp_path)
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "._test_32x32.mat").write_bytes(b"\0\5\26\7")
    with pytest.raises(InputError, match=r"has no folder of svhn; .*the folder holds: nothing"):
        opened("svhn", tmp_path / "flat")


@pytest.mark.parametrize("name", ["metadata_0.parquet", "metadata.parquet", "data/extra.parquet", "more.tar"])
def test_a_stray_table_does_not_hide_class_folders(tmp_path, name):
    base = class_folders(tmp_path)
    for folder, own in zip(TASKS["eurosat"].aliases, TASKS["eurosat"].class_names, strict=True):
        (base / "test" / folder).rename(base / "test" / own)  # by these names, another order than ours
    expected = opened("eurosat", tmp_path)
    (base / name).parent.mkdir(exist_ok=True)
    (base / name).write_bytes(b"stray")
    assert opened("eurosat", tmp_path) == expected


def test_a_class_without_images_is_named_with_what_is_there(tmp_path):
    forest = class_folders(tmp_path) / "test" / "Forest"
    (forest / "x.png").rename(forest / "x.mp4")
    with pytest.raises(InputError, match=rf"{forest} holds no image \(.*\.png, .*\); found there: x.mp4"):
        opened("eurosat", tmp_path)
    training = tmp_path / "gtsrb" / "GTSRB" / "Training" / "00000"
    training.mkdir(parents=True)
    with pytest.raises(InputError, match=rf"{training} holds no image .*; found there: nothing"):
        opened("gtsrb", tmp_path, "train")


def test_a_list_without_images_is_refused_with_its_folder(tmp_path):
    (tmp_path / "resisc45").mkdir()
    (tmp_path / "resisc45" / "resisc45-test.txt").write_text("\n")
    with pytest.raises(InputError, match=rf"{tmp_path}/resisc45 has no images of resisc45 \(test\); expected: .*NWPU-"):
        opened("resisc45", tmp_path)


def test_a_listed_file_that_is_absent_is_named(tmp_path):
    base = tmp_path / "resisc45"
    picture(base / "NWPU-RESISC45" / "airplane" / "airplane_001.png", 1)
    (base / "resisc45-test.txt").write_text("airplane_001.png\nairplane_002.png\n")
    with pytest.raises(InputError, match=r"resisc45-test.txt lists airplane_002.png, which does not exist in .*NWPU-"):
        opened("resisc45", tmp_path)
    link = class_folders(tmp_path) / "test" / "Forest" / "y.png"
    link.symlink_to("nothing.png")
    with pytest.raises(InputError, match=r"eurosat lists test/Forest/y.png, which does not exist"):
        opened("eurosat", tmp_path)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("change", [str, lambda text: text.replace("/", "\\").replace("\n", "\r\n")])
def test_lists_as_windows_writes_them(tmp_path, encoding, change):
    def write(path, text):
        path.write_bytes(change(text).encode(encoding))

    picture(tmp_path / "SUN397" / "a" / "abbey" / "x.png", 7)
    write(tmp_path / "SUN397" / "Testing_01.txt", "/a/abbey/x.png\n")
    assert opened("sun397", tmp_path) == ([0], [7])
    picture(tmp_path / "resisc45" / "NWPU-RESISC45" / "airplane" / "airplane_1.png", 8)
    write(tmp_path / "resisc45" / "resisc45-test.txt", "airplane/airplane_1.png\n")
    assert opened("resisc45", tmp_path) == ([0], [8])
    picture(tmp_path / "dtd" / "images" / "banded" / "x.png", 9)
    (tmp_path / "dtd" / "labels").mkdir()
    write(tmp_path / "dtd" / "labels" / "test1.txt", "banded/x.png\n")
    assert opened("dtd", tmp_path) == ([0], [9])
    picture(tmp_path / "gtsrb" / "GTSRB" / "Final_Test" / "Images" / "0.ppm", 5)
    for delimiter in ";,\t":
        write(tmp_path / "gtsrb" / "GT-final_test.csv", "Filename;ClassId\n0.ppm;3\n".replace(";", delimiter))
        assert opened("gtsrb", tmp_path) == ([3], [5])


def test_a_list_in_another_encoding_is_named(tmp_path):
    (tmp_path / "SUN397").mkdir()
    (tmp_path / "SUN397" / "Testing_01.txt").write_bytes(b"/a/abbey/\xe9.png\n")
    with pytest.raises(InputError, match=r"Testing_01.txt is not UTF-8 text .*; save it as UTF-8"):
        opened("sun397", tmp_path)


def test_arrays_and_labels_of_other_numbers_are_refused(tmp_path):
    folder = tmp_path / "mnist"
    folder.mkdir()
    (folder / "t10k-images-idx3-ubyte").write_bytes(idx(np.zeros((3, 28, 28), np.uint8)))
    (folder / "t10k-labels-idx1-ubyte").write_bytes(idx(np.zeros(2, np.uint8)))
    with pytest.raises(InputError, match=r"has 3 images and 2 labels of mnist \(test\)"):
        opened("mnist", tmp_path)


@pytest.mark.parametrize(("cut", "words"), [(-30, "truncated"), (0, "it is empty")])
def test_an_image_that_cannot_be_decoded_is_named_by_its_file(tmp_path, cut, words):
    path = class_folders(tmp_path) / "test" / "Forest" / "y.jpg"
    Image.effect_noise((40, 40), 50).save(path)
    path.write_bytes(path.read_bytes()[:cut])
    images = open_images(TASKS["eurosat"], "test", str(tmp_path), any_rows=True)
    decoded = _Decoded(images, get_encoder("mini").preprocessing)
    ((row, problem),) = [bad for _, bad in map(decoded.__getitem__, range(11)) if bad]
    with pytest.raises(
        ProbsurgeryError, match=rf"image {row} of test/eurosat cannot be decoded: eurosat/test/Forest/y.jpg: .*{words}"
    ):
        refuse_undecoded({row: problem}, "test/eurosat")
