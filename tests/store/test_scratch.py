"""Scratch folders: none outlives its process for long, and none of a living process, or of another user, is touched."""

import errno
import os
import signal
import tempfile

import filelock
import pytest

from probsurgery.pipeline.config import FitConfig, SurgerySettings
from probsurgery.pipeline.errors import ProbsurgeryError
from probsurgery.pipeline.fitting.fit import fit
from probsurgery.pipeline.store.scratch import remove_abandoned, scratch_folder


@pytest.fixture
def scratch(tmp_path, monkeypatch):
    """The system's folder for temporary files."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    return tmp_path / "scratch"


def killed(scratch, *others):
    """What a killed process leaves beside other folders."""
    child = os.fork()
    if not child:
        with scratch_folder() as folder:
            (folder / "features.npy").write_bytes(b"features")
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    (folder,) = (path for path in scratch.iterdir() if path.is_dir() and path not in others)
    assert [path.name for path in folder.iterdir()] == ["features.npy"]
    return folder


def test_a_scratch_folder_is_private_and_removed(scratch):
    with scratch_folder() as folder:
        assert folder.parent == scratch
        assert folder.stat().st_mode & 0o777 == 0o700
    assert list(scratch.iterdir()) == []


def test_the_next_fit_removes_what_a_killed_process_left(scratch, small_cache):
    killed(scratch)
    fit(FitConfig(small_cache.path, SurgerySettings(rank=2, steps=5)))
    assert list(scratch.iterdir()) == []


def test_folders_of_living_processes_stay(scratch):
    with scratch_folder() as living:
        left = killed(scratch, living)
        remove_abandoned()
        assert living.is_dir()
        assert not left.exists()


def test_what_others_put_there_stays(scratch, tmp_path):
    """Links into a user's own folders, folders of another user, and files of such names."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all")
    link = scratch / "probsurgery-scratch-link"
    link.symlink_to(tmp_path / "mine")
    (scratch / f"{link.name}.lock").touch()
    (scratch / "probsurgery-scratch-unlocked").mkdir()
    names = {link.name, f"{link.name}.lock", "probsurgery-scratch-unlocked"}
    if os.geteuid() == 0:
        folder = killed(scratch, *scratch.iterdir())
        os.chown(folder, 65534, 65534)
        names |= {folder.name, f"{folder.name}.lock"}
    remove_abandoned()
    assert {path.name for path in scratch.iterdir()} == names
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "all"


def test_without_locks_scratch_folders_are_made_all_the_same(scratch, monkeypatch):
    def no_locks(self):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(filelock.FileLock, "_acquire", no_locks)
    with scratch_folder() as folder:
        remove_abandoned()
        assert folder.is_dir()


def test_no_place_for_temporary_files_is_one_error(monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", "/proc/nothing")
    with pytest.raises(ProbsurgeryError, match="no scratch folder can be made: .*TMPDIR"), scratch_folder():
        pass
