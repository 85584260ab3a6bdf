"""Checkpoints written by the libraries that write the published ones give the same features as those libraries."""

import os
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import save_file

from probsurgery.pipeline.datasets.tasks import select_tasks
from probsurgery.pipeline.errors import InputError
from probsurgery.pipeline.models.architectures import build_visual, expected_shapes, model_config
from probsurgery.pipeline.models.checkpoints import check_state, digest, read_tensors
from probsurgery.pipeline.models.sources import Weights
from support import hugging_face_config, to_visual


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
    expected = model(pixel_values=images).image_embeds
    features = features_of(to_visual(model.state_dict()), images)
    assert torch.allclose(features, expected, atol=1e-5)


@torch.no_grad()
def test_plain_gelu_gives_other_features(model, images):
    plain = transformers.CLIPVisionModelWithProjection(hugging_face_config("gelu")).eval()
    plain.load_state_dict(model.state_dict())
    features = features_of(to_visual(model.state_dict()), images)
    assert (features - plain(pixel_values=images).image_embeds).abs().max() > 1e-3


def test_vision_models_without_a_projection_take_the_pretrained_one(tmp_path, model, images):
    """The experts' layout: `CLIPVisionModel.save_pretrained`, next to a pre-trained model with the projection."""
    tower = transformers.CLIPVisionModel(hugging_face_config())
    full = model.state_dict()  # the prefix differs between releases of transformers
    tower.load_state_dict({n: full[n] if n in full else full[f"vision_model.{n}"] for n in tower.state_dict()})
    tower.save_pretrained(tmp_path / "mnist")
    model.save_pretrained(tmp_path / "pretrained")
    weights = Weights("mini", tmp_path)
    (mnist,) = select_tasks("mini", ["mnist"])
    assert "visual_projection.weight" not in read_tensors(tmp_path / "mnist" / "model.safetensors")
    with torch.no_grad():
        expected = model(pixel_values=images).image_embeds
    assert torch.allclose(features_of(weights.expert(mnist), images), expected, atol=1e-5)
    assert torch.allclose(features_of(weights.pretrained(), images), expected, atol=1e-5)


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
    reference = transformers.CLIPVisionModelWithProjection(hugging_face_config(arch=arch)).eval()
    full = reference.state_dict()
    images = torch.randn(2, 3, 224, 224)
    expected = reference(pixel_values=images).image_embeds
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
        loaded = open_clip.create_model_and_transforms("ViT-B-32-quickgelu", pretrained="")
        self.model, self.train_preprocess, self.val_preprocess = loaded
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
    state_dict = {prefix + n: t for n, t in state.items()} | ({"transformer.text": torch.ones(2)} if prefix else {})
    path = tmp_path / f"merged{suffix}"
    save_file(state_dict, path) if suffix == ".safetensors" else torch.save({"state_dict": state_dict}, path)
    assert digest(to_visual(read_tensors(path))) == digest(state)


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
