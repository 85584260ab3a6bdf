"""Checkpoint files: nothing in them is executed, and damaged or foreign ones are refused with one line."""

import pickle
import sys
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from probsurgery.pipeline.errors import InputError
from probsurgery.pipeline.models import unpickler
from probsurgery.pipeline.models.checkpoints import digest, read_tensors
from probsurgery.pipeline.models.encoders import get_encoder
from probsurgery.pipeline.models.sources import Weights
from support import pickled_like_task_vectors, to_visual

WRITERS = [
    torch.save,
    lambda value, path: torch.save(value, path, _use_new_zipfile_serialization=False),
    lambda value, path: path.write_bytes(pickle.dumps(value)),
]


@pytest.fixture(scope="module")
def state():
    return Weights("mini").pretrained()


class Writes:
    """An object whose unpickling writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (exec, (f"open({str(self.path)!r}, 'w').write('executed')",))


@pytest.mark.parametrize("writer", WRITERS)
def test_a_file_that_would_run_code_is_refused_and_runs_nothing(tmp_path, state, writer):
    proof = tmp_path / "proof"
    for value in ({"a": Writes(proof)}, {**state, "extra": Writes(proof)}, Writes(proof)):
        writer(value, tmp_path / "trap.pt")
        with pytest.raises(InputError, match=r"trap.pt cannot be read: it would call builtins.exec when unpickled"):
            read_tensors(tmp_path / "trap.pt")
        assert not proof.exists()
    pickle.loads(pickle.dumps(Writes(proof)))
    assert proof.exists()  # the reader made the difference


@pytest.mark.parametrize(
    "code",
    [
        b"cos\nsystem\n(S'touch proof'\ntR.",
        b"(S'touch proof'\nios\nsystem\n.",
        b"(cos\nsystem\nS'touch proof'\no.",
        b"\x80\x02cbuiltins\ngetattr\ncos\nsystem\nX\x01\x00\x00\x00a\x86R\x85R.",
        b"\x80\x02\x82\x01.",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x05touch\x85\x81.",
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}X\x0c\x00\x00\x00__defaults__cos\nsystem\nsb.",
        b"\x80\x02ctorch.storage\n_load_from_bytes\nC\x20cos\nsystem\n(S'touch proof'\ntR..\x85R.",
    ],
)
def test_no_opcode_calls_or_changes_anything(tmp_path, monkeypatch, code):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.pt").write_bytes(code if code[:1] == b"\x80" else b"\x80\x02" + code)
    with pytest.raises(InputError, match=r"x\.pt (cannot be read|is cut off)"):
        read_tensors(tmp_path / "x.pt")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.pt"]
    assert unpickler._rebuild_tensor.__defaults__ is None


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("plain", [False, True])
def test_objects_of_classes_that_no_longer_exist_give_their_weights(tmp_path, state, plain, legacy):
    pickled_like_task_vectors(tmp_path / "finetuned.pt", state, plain=plain, legacy=legacy)
    with pytest.raises((AttributeError, ModuleNotFoundError)):
        torch.load(tmp_path / "finetuned.pt", weights_only=False)
    tensors = read_tensors(tmp_path / "finetuned.pt")
    assert "model.logit_scale" in tensors
    assert digest(to_visual(tensors)) == digest(state)
    assert not {"src", "src.modeling", "old_clip"} & sys.modules.keys()


def test_tensors_that_share_or_reorder_a_storage_are_read_unchanged(tmp_path):
    base = torch.arange(24.0).view(4, 6)
    state = {"whole": base, "rows": base[1:3], "turned": base.T, "half": base.half(), "none": torch.empty(0, 3)}
    state |= {"bf16": base.bfloat16(), "count": torch.tensor(7), "parameter": torch.nn.Parameter(base * 2)}
    for writer in WRITERS:
        writer({"state_dict": state, "epoch": 3, "optimizer": {"state": {0: base}}}, tmp_path / "x.pt")
        tensors = read_tensors(tmp_path / "x.pt")
        assert tensors.keys() == state.keys()
        assert all(
            torch.equal(tensors[name], tensor) and tensors[name].dtype == tensor.dtype for name, tensor in state.items()
        )


def test_openais_torchscript_archive_is_read(tmp_path, state):
    tower = torch.nn.Module()
    tower.visual = get_encoder("mini").build(state)
    tower.forward = lambda: None
    size = get_encoder("mini").config["vision_cfg"]["image_size"]
    torch.jit.trace_module(tower.visual, {"forward": torch.zeros(1, 3, size, size)}).save(tmp_path / "jit.pt")
    tensors = read_tensors(tmp_path / "jit.pt")
    assert digest({n: tensors[n] for n in state}) == digest(state)


def test_a_file_cannot_claim_more_memory_than_its_size(tmp_path):
    for value in (torch.zeros(1).expand(1 << 40), {str(i): torch.zeros(99_999).expand(9, -1) for i in range(3)}):
        for writer in WRITERS:
            writer({"a": value} if isinstance(value, torch.Tensor) else value, tmp_path / "x.pt")
            with pytest.raises(InputError, match=r"claims [\d,]+ bytes of tensors, more than a file of its size"):
                read_tensors(tmp_path / "x.pt")
    loop = {}
    loop["a"] = loop["b"] = loop
    torch.save(loop, tmp_path / "x.pt")
    with pytest.raises(InputError, match="no named tensors|more entries"):
        read_tensors(tmp_path / "x.pt")
    (tmp_path / "x.pt").write_bytes(b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f" + b"\x8e" + b"\xff" * 7 + b"\x7f")
    with pytest.raises(InputError, match="x.pt is cut off"):
        read_tensors(tmp_path / "x.pt")
    (tmp_path / "x.pt").write_bytes(b"\x80\x02]r\xff\xff\xff\x7f.")  # the C unpickler would allocate 2^31 objects
    with pytest.raises(InputError, match="holds no named tensors"):
        read_tensors(tmp_path / "x.pt")


@pytest.fixture(params=["safetensors", *WRITERS], ids=["safetensors", "zip", "legacy", "pickle"])
def whole_file(request, tmp_path):
    torch.manual_seed(0)
    state = {"conv1.weight": torch.randn(4, 3, 2, 2), "proj": torch.randn(4, 5), "empty": torch.empty(0)}
    path = tmp_path / "whole"
    save_file(state, path) if request.param == "safetensors" else request.param(state, path)
    assert digest(read_tensors(path)) == digest(state)
    return path


def test_a_file_cut_off_anywhere_is_reported_as_cut_off(whole_file, tmp_path):
    content = whole_file.read_bytes()
    for length in sorted({*range(0, len(content), 37), *range(len(content) - 9, len(content))}):
        path = tmp_path / "cut"
        path.write_bytes(content[:length])
        with pytest.raises(InputError, match=r"cut (is cut off|is empty|cannot be read|is not a checkpoint)") as caught:
            read_tensors(path)
        if length > 16:
            assert "is cut off" in str(caught.value), (length, str(caught.value))


@pytest.mark.parametrize("seed", range(4))
def test_damaged_files_give_an_error_or_tensors_and_nothing_else(whole_file, tmp_path, seed):
    """No crash, hang or unlimited memory: bytes are changed, swapped, dropped and inserted."""
    content, random, outcomes = whole_file.read_bytes(), np.random.default_rng(seed), []
    for _ in range(250):
        changed = bytearray(content)
        for _ in range(random.integers(1, 4)):
            at, other = random.integers(0, len(changed), 2)
            match random.integers(4):
                case 0:
                    changed[at] = random.integers(256)
                case 1:
                    changed[at], changed[other] = changed[other], changed[at]
                case 2:
                    del changed[at : at + random.integers(1, 9)]
                case 3:
                    changed[at:at] = random.bytes(random.integers(1, 9))
        (tmp_path / "damaged").write_bytes(changed)
        try:
            tensors = read_tensors(tmp_path / "damaged")
            assert all(isinstance(tensor, torch.Tensor) for tensor in tensors.values())
            outcomes.append("read")
        except InputError:
            outcomes.append("refused")
    assert outcomes.count("refused") > 100


def test_a_flipped_weight_is_found_where_the_format_has_checksums(tmp_path):
    torch.save({"a": torch.zeros(1000)}, tmp_path / "x.pt")
    content = bytearray((tmp_path / "x.pt").read_bytes())
    content[content.index(bytes(4000)) + 2000] = 1
    (tmp_path / "x.pt").write_bytes(content)
    assert torch.load(tmp_path / "x.pt")["a"].any()
    with pytest.raises(InputError, match="damaged .*CRC"):
        read_tensors(tmp_path / "x.pt")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty: its download did not begin"),
        (b"<!DOCTYPE html><title>Google Drive - Virus scan warning</title>", "an HTML or XML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n", "a Git LFS pointer"),
        (b"\x1f\x8b\x08" + b"x" * 99, "a gzip archive"),
        (b"\x89HDF\r\n\x1a\n" + b"x" * 99, "an HDF5 file"),
        (b'{"a": 1}', "a JSON file"),
        (bytes(999), "begins with zeros"),
        (b"what is this?" * 9, "safetensors, torch.save and pickle files are read"),
    ],
)
def test_files_of_other_formats_are_named(tmp_path, content, words):
    for name in ("model.safetensors", "finetuned.pt"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=words):
            read_tensors(tmp_path / name)


def test_the_format_is_recognised_by_content_and_not_by_name(tmp_path):
    state = {"a": torch.ones(3)}
    save_file(state, tmp_path / "really_safetensors.pt")
    torch.save(state, tmp_path / "really_zip.safetensors")
    assert torch.equal(read_tensors(tmp_path / "really_safetensors.pt")["a"], state["a"])
    assert torch.equal(read_tensors(tmp_path / "really_zip.safetensors")["a"], state["a"])
    with zipfile.ZipFile(tmp_path / "other.pt", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(InputError, match=r"a zip archive, but not one of torch.save \(it holds readme.txt\)"):
        read_tensors(tmp_path / "other.pt")


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_torn_and_missing_files_are_refused(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    with pytest.raises(InputError, match="no checkpoint at"):
        read_tensors(path)
    for content in (b"", b"torn", b"\x00" * 300, b"\x80\x02"):
        path.write_bytes(content)
        with pytest.raises(InputError, match=str(path)):
            read_tensors(path)


def test_files_without_tensors_are_refused(tmp_path):
    for value in ([1, 2], {"a": 1}, {}):
        torch.save(value, tmp_path / "x.pt")
        with pytest.raises(InputError, match="no named tensors: it is not a state dict"):
            read_tensors(tmp_path / "x.pt")
