"""What machines and users are like: files without permission, file systems without locks, users without a home."""

import errno
import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image

from probsurgery.pipeline.config import ExtractConfig, FitConfig, ProbSettings
from probsurgery.pipeline.deploy.assemble import assemble
from probsurgery.pipeline.deploy.model import load_model
from probsurgery.pipeline.errors import AccessError, InputError
from probsurgery.pipeline.extraction.extract import extract
from probsurgery.pipeline.fitting.fit import fit
from probsurgery.pipeline.heads import head as head_module
from probsurgery.pipeline.heads.head import load_head
from probsurgery.pipeline.hub import storage_problem
from probsurgery.pipeline.store.lock import locked
from support import refused

NOBODY = 65534


@contextmanager
def plain_user():
    """The superuser may read everything, so it becomes another user meanwhile."""
    if os.geteuid():
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture(scope="module")
def shared():
    """A folder that others can enter: a cache with a head, and the model exported from both."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o777)
    extract(ExtractConfig("mini", tasks=("mnist",), limit=20, out=folder / "cache"))
    fit(FitConfig(folder / "cache", ProbSettings(hidden=4, steps=5), name="one"))
    assemble(folder / "cache", "one").save(folder / "model")
    Image.new("RGB", (28, 28)).save(folder / "picture.png")
    yield folder
    shutil.rmtree(folder)


@contextmanager
def closed(path):
    mode = path.stat().st_mode
    path.chmod(0)
    try:
        with plain_user():
            yield
    finally:
        path.chmod(mode)


PREDICT = ("predict", "--cache", "cache", "--head", "one", "--task", "mnist", "picture.png")
EXPORT = ("export", "--cache", "cache", "--head", "one", "--out", "new")


@pytest.mark.parametrize(
    ("name", "commands"),
    [
        ("cache/heads/one/head.json", [("transfer", "--cache", "cache"), PREDICT]),
        ("cache/heads/one/head.safetensors", [("transfer", "--cache", "cache"), EXPORT]),
        (
            "cache/features.zarr/test/mnist/merged/c/0/0",
            [("cache", "verify", "cache"), ("transfer", "--cache", "cache")],
        ),
    ],
)
def test_what_may_not_be_read_is_called_that(shared, run, monkeypatch, name, commands):
    monkeypatch.chdir(shared)
    for command in commands:
        assert run(*command)[0] == 0
        shutil.rmtree("new", ignore_errors=True)
        with closed(shared / name):
            status, _, err = run(*command)
        assert status == 2, err
        assert "permission" in err.lower(), err
        assert name.rpartition("/")[2] in err, err
        assert not any(word in err for word in ("damaged", "no head", "unknown head", "No such file")), err


def test_ls_lists_a_cache_that_may_not_be_read(shared, run):
    assert run("cache", "ls", shared)[0] == 0
    with closed(shared / "cache" / "manifest.json"):
        status, out, _ = run("cache", "ls", shared)
    assert status == 0
    assert "cannot be read: Permission denied" in out


@pytest.mark.parametrize("name", ["model.json", "heads.safetensors", "merged.safetensors"])
def test_a_model_that_may_not_be_read_need_not_be_exported_again(shared, name):
    with closed(shared / "model" / name), pytest.raises(AccessError, match=f"{name} cannot be read: Permission denied"):
        load_model(shared / "model")


@pytest.mark.parametrize("number", [errno.EIO, errno.EMFILE, errno.ESTALE])
def test_other_errors_of_the_system_have_their_names_too(shared, monkeypatch, number):
    def fail(*arguments):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(head_module, "read_json", fail)
    with pytest.raises(AccessError, match=f"one cannot be read: {os.strerror(number)}"):
        load_head(shared / "cache" / "heads" / "one")


def test_a_folder_where_a_file_should_be_is_called_that(shared, run, tmp_path):
    cache = shutil.copytree(shared / "cache", tmp_path / "cache")
    for name in ("results.jsonl", "heads/one/head.json"):
        (cache / name).unlink()
        (cache / name).mkdir()
    refused(run("report", "--cache", cache), "results.jsonl: Is a directory")
    with pytest.raises(AccessError, match=r"head\.json cannot be read: Is a directory"):
        load_head(cache / "heads" / "one")


@pytest.mark.parametrize("umask", [0o002, 0o027])
def test_every_file_has_the_permissions_that_the_umask_gives(tmp_path, run, umask):
    before = os.umask(umask)
    try:
        learned = {"merges": ("tw-adamerging",), "merge_args": {"steps": 1}}
        extract(ExtractConfig("mini", tasks=("mnist",), limit=20, out=tmp_path / "cache", **learned))
        fit(FitConfig(tmp_path / "cache", ProbSettings(hidden=4, steps=5), name="one"))
        assemble(tmp_path / "cache", "one").save(tmp_path / "model")
    finally:
        os.umask(before)
    files = [path for name in ("cache", "model") for path in (tmp_path / name).rglob("*")]
    assert {"merged.safetensors", "head.safetensors", "heads.safetensors"} <= {path.name for path in files}
    modes = {path: path.stat().st_mode & 0o777 for path in files}
    assert {path for path, mode in modes.items() if mode != (0o777 if path.is_dir() else 0o666) & ~umask} == set()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, 524])
def test_a_file_system_without_locks_is_named_with_what_to_do(tmp_path, run, monkeypatch, number):
    import fcntl

    def flock(descriptor, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    command = ("extract", "--arch", "mini", "--tasks", "mnist", "--limit", 5, "--out", tmp_path / "cache")
    refused(run(*command), f"{tmp_path / 'cache'} is on a file system without locks", "mount it", "--root or --out")
    assert list(tmp_path.iterdir()) == []


def test_a_lock_of_another_user_is_no_other_process(shared):
    (folder := shared / "locked").mkdir()
    folder.chmod(0o777)
    (folder / ".lock").touch()
    (folder / ".lock").chmod(0o444)
    if not os.geteuid():  # so that what is written as another user is removed again
        os.chown(folder, NOBODY, NOBODY)
    advice = "cannot lock .*/locked: Permission denied .*ask its owner.*or choose another place with --root or --out"
    with plain_user(), pytest.raises(InputError, match=advice), locked(folder):
        pass


@pytest.mark.parametrize("place", ["/proc/nope", "/sys/nope"])
def test_folders_of_the_system_are_refused_before_the_work(shared, run, tmp_path, place):
    command = ("extract", "--arch", "mini", "--tasks", "mnist", "--limit", 5, "--out", place)
    refused(run(*command), place, "--out")


def test_a_home_that_cannot_be_written_is_no_fault_of_the_data(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HOME", "/home/me/.cache/huggingface")
    for name in ("/home/me/.cache", "/home/me/.cache/huggingface/datasets/x", None):
        problem = storage_problem(PermissionError(errno.EACCES, "Permission denied", name), "the data set d")
        assert "point HF_HOME to a folder that you can write" in problem
    problem = storage_problem(PermissionError(errno.EACCES, "Permission denied", "/data/a.parquet"), "the data set d")
    assert problem == "/data/a.parquet cannot be read for the data set d: Permission denied"
    assert storage_problem(ValueError("no"), "the data set d") is None
