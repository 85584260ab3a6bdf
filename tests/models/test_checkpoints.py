"""Published formats, made by the libraries that make the real ones, give the same features as those libraries."""

import os
import pickle
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file

from probsurgery.pipeline.datasets.tasks import select_tasks
from probsurgery.pipeline.errors import InputError
from probsurgery.pipeline.models import unpickler
from probsurgery.pipeline.models.architectures import build_visual, expected_shapes, model_config
from probsurgery.pipeline.models.checkpoints import check_state, digest, read_tensors, to_visual
from probsurgery.pipeline.models.sources import Weights
from support import hugging_face_config, pickled_like_task_vectors

WRITERS = [
    torch.save,
    lambda value, path: torch.save(value, path, _use_new_zipfile_serialization=False),
    lambda value, path: path.write_bytes(pickle.dumps(value)),
]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = transformers.CLIPVisionModelWithProjection(hugging_face_config()).eval()
    for parameter in model.parameters():  # far enough from zero for the activation to matter
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


@pytest.fixture(scope="module")
def images():
    size = model_config("mini")["vision_cfg"]["image_size"]
    return torch.randn(3, 3, size, size)


@torch.no_grad()
def features_of(state, images):
    return build_visual("mini", state)(images)


@torch.no_grad()
def test_hugging_face_weights_give_hugging_faces_features(model, images):
    theirs = model(pixel_values=images).image_embeds
    ours = features_of(to_visual(model.state_dict()), images)
    assert torch.allclose(ours, theirs, atol=1e-5)


@torch.no_grad()
def test_plain_gelu_would_be_noticed(model, images):
    plain = transformers.CLIPVisionModelWithProjection(hugging_face_config("gelu")).eval()
    plain.load_state_dict(model.state_dict())
    ours = features_of(to_visual(model.state_dict()), images)
    assert (ours - plain(pixel_values=images).image_embeds).abs().max() > 1e-3


def test_vision_models_without_a_projection_take_the_pretrained_one(tmp_path, model, images):
    """The experts' layout: `CLIPVisionModel.save_pretrained`, beside a pre-trained model that has the projection."""
    tower = transformers.CLIPVisionModel(hugging_face_config())
    full = model.state_dict()  # the prefix differs between releases of transformers
    tower.load_state_dict({n: full[n] if n in full else full[f"vision_model.{n}"] for n in tower.state_dict()})
    tower.save_pretrained(tmp_path / "mnist")
    model.save_pretrained(tmp_path / "pretrained")
    weights = Weights("mini", tmp_path)
    (mnist,) = select_tasks("mini", ["mnist"])
    assert "visual_projection.weight" not in read_tensors(tmp_path / "mnist" / "model.safetensors")
    with torch.no_grad():
        theirs = model(pixel_values=images).image_embeds
    assert torch.allclose(features_of(weights.expert(mnist), images), theirs, atol=1e-5)
    assert torch.allclose(features_of(weights.pretrained(), images), theirs, atol=1e-5)


@pytest.mark.parametrize("prefixed", [True, False])
def test_keys_with_and_without_their_prefix_are_read_alike(model, prefixed):
    state = {n.removeprefix("vision_model."): t for n, t in model.state_dict().items()}
    if prefixed:
        state = {n if n.startswith("visual_projection") else f"vision_model.{n}": t for n, t in state.items()}
    expected = to_visual(model.state_dict())
    assert digest(to_visual(state)) == digest(expected)


@torch.no_grad()
@pytest.mark.parametrize(
    "arch", ["vitb32", *(pytest.param(name, marks=pytest.mark.slow) for name in ("vitb16", "vitl14"))]
)
def test_the_published_sizes_give_hugging_faces_features(tmp_path, arch):
    """Random weights of the real sizes, saved by transformers as the experts are, with both kinds of keys."""
    theirs = transformers.CLIPVisionModelWithProjection(hugging_face_config(arch=arch)).eval()
    full = theirs.state_dict()
    images = torch.randn(2, 3, 224, 224)
    expected = theirs(pixel_values=images).image_embeds
    projection = full["visual_projection.weight"]
    for prefix in ("", "vision_model."):
        tower = {n.removeprefix("vision_model."): t for n, t in full.items() if not n.startswith("visual_proj")}
        save_file({prefix + n: t.contiguous() for n, t in tower.items()}, tmp_path / f"{arch}.safetensors")
        state = to_visual(read_tensors(tmp_path / f"{arch}.safetensors"), projection.T)
        check_state(state, expected_shapes(arch), arch, arch)
        difference = (build_visual(arch, state)(images) - expected).abs().max()
        assert difference < 1e-5, difference


OLD_OPEN_CLIP = """
import pickle, sys, types
import torch
import open_clip

assert open_clip.__file__.startswith(sys.argv[1])
torch.manual_seed(0)
module = types.ModuleType("src.modeling")
sys.modules["src"], sys.modules["src.modeling"] = types.ModuleType("src"), module

class ImageEncoder(torch.nn.Module):
    def __init__(self):
        super().__init__()
        made = open_clip.create_model_and_transforms("ViT-B-32-quickgelu", pretrained="")
        self.model, self.train_preprocess, self.val_preprocess = made
        self.cache_dir = None
        delattr(self.model, "transformer")

ImageEncoder.__module__, module.ImageEncoder = "src.modeling", ImageEncoder
encoder = ImageEncoder().eval()
images = torch.randn(2, 3, 224, 224)
with torch.no_grad():
    torch.save({"images": images, "features": encoder.model.encode_image(images)}, sys.argv[2] + "/expected.pt")
torch.save(encoder, sys.argv[2] + "/zip.pt")
torch.save(encoder, sys.argv[2] + "/legacy.pt", _use_new_zipfile_serialization=False)
with open(sys.argv[2] + "/pickle.pt", "wb") as file:
    pickle.dump(encoder, file)
"""


@pytest.mark.slow
def test_files_of_open_clip_2_0_2_give_its_features(tmp_path):
    """The release that the published task-vectors files were made with, in a folder of its own."""
    old = tmp_path / "old"
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--target",
        str(old),
        "open_clip_torch==2.0.2",
    ]
    if subprocess.run(install, capture_output=True).returncode:
        pytest.skip("open_clip_torch 2.0.2 cannot be installed here")
    environment = os.environ | {"PYTHONPATH": str(old)}
    subprocess.run([sys.executable, "-c", OLD_OPEN_CLIP, str(old), str(tmp_path)], check=True, env=environment)
    expected = read_tensors(tmp_path / "expected.pt")
    for name in ("zip", "legacy", "pickle"):
        state = to_visual(read_tensors(tmp_path / f"{name}.pt"))
        check_state(state, expected_shapes("vitb32"), name, "vitb32")
        with torch.no_grad():
            features = build_visual("vitb32", state)(expected["images"])
        assert (features - expected["features"]).abs().max() < 1e-5


@pytest.mark.parametrize("prefix", ["", "visual.", "model.visual."])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_plain_state_dicts_are_read_with_any_prefix_and_text_leftovers(tmp_path, model, prefix, suffix):
    state = to_visual(model.state_dict())
    kept = {prefix + n: t for n, t in state.items()} | ({"transformer.text": torch.ones(2)} if prefix else {})
    path = tmp_path / f"merged{suffix}"
    save_file(kept, path) if suffix == ".safetensors" else torch.save({"state_dict": kept}, path)
    assert digest(to_visual(read_tensors(path))) == digest(state)


class Writes:
    """Unpickled, it would write a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (exec, (f"open({str(self.path)!r}, 'w').write('executed')",))


@pytest.mark.parametrize("writer", WRITERS)
def test_a_file_that_would_run_code_is_refused_and_runs_nothing(tmp_path, model, writer):
    proof = tmp_path / "proof"
    for value in ({"a": Writes(proof)}, {**to_visual(model.state_dict()), "extra": Writes(proof)}, Writes(proof)):
        writer(value, tmp_path / "trap.pt")
        with pytest.raises(InputError, match=r"trap.pt cannot be read: it would call builtins.exec when unpickled"):
            read_tensors(tmp_path / "trap.pt")
        assert not proof.exists()
    pickle.loads(pickle.dumps(Writes(proof)))
    assert proof.exists()  # so it is the reader that did not


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
def test_whole_objects_of_classes_that_are_gone_give_their_weights(tmp_path, model, plain, legacy):
    state = to_visual(model.state_dict())
    pickled_like_task_vectors(tmp_path / "finetuned.pt", state, plain=plain, legacy=legacy)
    with pytest.raises((AttributeError, ModuleNotFoundError)):
        torch.load(tmp_path / "finetuned.pt", weights_only=False)
    held = read_tensors(tmp_path / "finetuned.pt")
    assert "model.logit_scale" in held
    assert digest(to_visual(held)) == digest(state)
    assert not {"src", "src.modeling", "old_clip"} & sys.modules.keys()


def test_tensors_that_share_or_reorder_a_storage_are_read_as_they_are(tmp_path):
    base = torch.arange(24.0).view(4, 6)
    state = {"whole": base, "rows": base[1:3], "turned": base.T, "half": base.half(), "none": torch.empty(0, 3)}
    state |= {"bf16": base.bfloat16(), "count": torch.tensor(7), "parameter": torch.nn.Parameter(base * 2)}
    for writer in WRITERS:
        writer({"state_dict": state, "epoch": 3, "optimizer": {"state": {0: base}}}, tmp_path / "x.pt")
        held = read_tensors(tmp_path / "x.pt")
        assert held.keys() == state.keys()
        assert all(
            torch.equal(held[name], tensor) and held[name].dtype == tensor.dtype for name, tensor in state.items()
        )


def test_openais_own_torchscript_archive_is_read(tmp_path, model):
    state = to_visual(model.state_dict())
    tower = torch.nn.Module()
    tower.visual = build_visual("mini", state)
    tower.forward = lambda: None
    size = model_config("mini")["vision_cfg"]["image_size"]
    torch.jit.trace_module(tower.visual, {"forward": torch.zeros(1, 3, size, size)}).save(tmp_path / "jit.pt")
    held = read_tensors(tmp_path / "jit.pt")
    assert digest({n: held[n] for n in state}) == digest(state)


def test_a_file_cannot_claim_more_memory_than_it_is_long(tmp_path):
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
    (tmp_path / "x.pt").write_bytes(b"\x80\x02]r\xff\xff\xff\x7f.")  # the C unpickler would make room for 2^31 objects
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


def test_a_file_cut_off_anywhere_is_said_to_be(whole_file, tmp_path):
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
    """Never a crash, a hang, or memory without end: bytes are changed, swapped, dropped and put in."""
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
            held = read_tensors(tmp_path / "damaged")
            assert all(isinstance(tensor, torch.Tensor) for tensor in held.values())
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
def test_files_of_other_formats_are_called_what_they_are(tmp_path, content, words):
    for name in ("model.safetensors", "finetuned.pt"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=words):
            read_tensors(tmp_path / name)


def test_the_format_is_known_by_content_and_not_by_name(tmp_path):
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


def test_files_of_something_else_are_refused(tmp_path):
    for value in ([1, 2], {"a": 1}, {}):
        torch.save(value, tmp_path / "x.pt")
        with pytest.raises(InputError, match="no named tensors: it is not a state dict"):
            read_tensors(tmp_path / "x.pt")


def test_the_first_differing_key_is_named(model):
    shapes, state = expected_shapes("mini"), to_visual(model.state_dict())
    check_state(state, shapes, "x.pt", "mini")
    first = next(iter(shapes))
    with pytest.raises(InputError, match=f"x.pt lacks the key '{first}'"):
        check_state({n: t for n, t in state.items() if n != first}, shapes, "x.pt", "mini")
    with pytest.raises(
        InputError, match=r"has 'proj' of shape \(3, 4\) instead of \(.*: it is not a checkpoint of mini; it looks"
    ):
        check_state(state | {"proj": torch.zeros(3, 4)}, shapes, "x.pt", "mini")
    with pytest.raises(InputError, match="has a key 'extra'"):
        check_state(state | {"extra": torch.zeros(1)}, shapes, "x.pt", "mini")
    with pytest.raises(InputError, match="'proj' holds NaN"):
        check_state(state | {"proj": state["proj"] * float("nan")}, shapes, "x.pt", "mini")
    attention = "vision_model.encoder.layers.0.self_attn.q_proj.weight"
    unprefixed = attention.removeprefix("vision_model.")
    with pytest.raises(InputError, match="q, k, v"):
        to_visual({n: t for n, t in model.state_dict().items() if n not in (attention, unprefixed)})


def test_a_digest_sees_values_names_and_shapes():
    one = {"a": torch.arange(6.0).view(2, 3)}
    assert digest(one) == digest({"a": torch.arange(6.0).view(2, 3).clone()})
    others = [
        {"a": torch.arange(6.0).view(3, 2)},
        {"b": one["a"]},
        {"a": one["a"] + 1},
        {"a": one["a"].T.contiguous().T * 2},
    ]
    assert len({digest(one), *map(digest, others)}) == 5
