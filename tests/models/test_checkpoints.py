"""Checkpoints written by the libraries that write the published ones give the same features as those libraries."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import save_file

from probsurgery.pipeline.datasets.suites import select_tasks
from probsurgery.pipeline.errors import InputError
from probsurgery.pipeline.models.checkpoints import check_state, digest, read_tensors, to_text
from probsurgery.pipeline.models.encoders import get_encoder
from probsurgery.pipeline.models.sources import Weights
from support import hugging_face_config, tiny_clip, to_visual


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = transformers.CLIPVisionModelWithProjection(hugging_face_config()).eval()
    for parameter in model.parameters():  # far enough from zero for the activation to matter
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


@pytest.fixture(scope="module")
def images():
    size = get_encoder("mini").config["vision_cfg"]["image_size"]
    return torch.randn(3, 3, size, size)


@torch.no_grad()
def features_of(state, images):
    return get_encoder("mini").build(state)(images)


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
        check_state(state, get_encoder(arch).shapes, arch, arch)
        difference = (get_encoder(arch).build(state)(images) - expected).abs().max()
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
        check_state(state, get_encoder("vitb32").shapes, name, "vitb32")
        with torch.no_grad():
            features = get_encoder("vitb32").build(state)(expected["images"])
        assert (features - expected["features"]).abs().max() < 1e-5


@pytest.mark.parametrize("prefix", ["", "visual.", "model.visual."])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_plain_state_dicts_are_read_with_any_prefix_and_text_leftovers(tmp_path, model, prefix, suffix):
    state = to_visual(model.state_dict())
    state_dict = {prefix + n: t for n, t in state.items()} | ({"transformer.text": torch.ones(2)} if prefix else {})
    path = tmp_path / f"merged{suffix}"
    save_file(state_dict, path) if suffix == ".safetensors" else torch.save({"state_dict": state_dict}, path)
    assert digest(to_visual(read_tensors(path))) == digest(state)


def wrapped(module):
    """What training leaves around the names of a module that is otherwise saved as it is."""

    def blocks(wrapper):
        return {re.sub(r"((?:resblocks|layers)\.\d+\.)", rf"\1{wrapper}.", name): t for name, t in module.items()}

    return {
        "DataParallel": {f"module.{n}": t for n, t in module.items()},
        "torch.compile": {f"_orig_mod.{n}": t for n, t in module.items()},
        "a module around it": {f"model.{n}": t for n, t in module.items()},
        "all of them": {f"_orig_mod.module.model.net.{n}": t for n, t in module.items()},
        "compiled blocks": blocks("_orig_mod"),
        "FSDP": {f"_fsdp_wrapped_module.{n}": t for n, t in blocks("_fsdp_wrapped_module").items()},
        "averaged": {"n_averaged": torch.tensor(3)} | {f"module.{n}": t for n, t in module.items()},
        "scale beside it": module | {"logit_scale": torch.tensor(4.6)},
        "scale with it": {f"module.{n}": t for n, t in (module | {"logit_scale": torch.tensor(4.6)}).items()},
        "scale before it": {"logit_scale": torch.tensor(4.6)} | {f"visual.{n}": t for n, t in module.items()},
    }


WRAPPERS = tuple(wrapped({}))


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("layout", ["open_clip", "open_clip whole", "Hugging Face", "Hugging Face without projection"])
def test_what_wrappers_add_to_names_is_left_out(model, wrapper, layout):
    tower = to_visual(model.state_dict())
    own = {"open_clip": tower, "open_clip whole": {f"visual.{n}": t for n, t in tower.items()}}
    own |= {"Hugging Face": model.state_dict(), "Hugging Face without projection": dict(model.state_dict())}
    own["open_clip whole"]["token_embedding.weight"] = torch.zeros(2, 2)
    del own["Hugging Face without projection"]["visual_projection.weight"]
    assert digest(to_visual(wrapped(own[layout])[wrapper], tower["proj"])) == digest(tower)


def test_a_wrapped_whole_model_has_its_text_tower():
    for whole in (
        tiny_clip().state_dict(),
        {"token_embedding.weight": torch.ones(2, 2), "transformer.x": torch.ones(1)},
    ):
        expected = to_text(whole)
        assert expected
        for name in ("DataParallel", "torch.compile", "all of them"):
            assert digest(to_text(wrapped(dict(whole))[name])) == digest(expected)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("index", ["pretrained/model.safetensors.index.json", "pretrained.safetensors.index.json"])
def test_a_checkpoint_in_several_files_is_read_by_its_index(tmp_path, model, shards, index):
    folder = (tmp_path / index).parent
    folder.mkdir(exist_ok=True)
    state, weight_map = to_visual(model.state_dict()), {}
    for number in range(shards):
        part = dict(list(state.items())[number::shards])
        weight_map |= dict.fromkeys(part, f"model-{number + 1:05d}-of-{shards:05d}.safetensors")
        save_file(part, folder / weight_map[next(iter(part))])
    (tmp_path / index).write_text(json.dumps({"metadata": {"mergekit_version": "0.1"}, "weight_map": weight_map}))
    weights = Weights("mini", tmp_path)
    assert digest(weights.pretrained()) == digest(state)
    assert {name for name in weights.files if name.startswith("pretrained ")} == {
        f"pretrained {name}" for name in weight_map.values()
    }
    if folder != tmp_path:
        assert digest(weights.merged(folder)) == digest(state)


def test_a_damaged_index_is_refused_in_one_line(tmp_path, model):
    path = tmp_path / "model.safetensors.index.json"
    save_file({"proj": torch.ones(2)}, tmp_path / "one.safetensors")
    for content, words in (
        ("{", "not valid JSON"),
        ("[]", "it has no weight_map"),
        ('{"weight_map": []}', "it has no weight_map|does not name files beside it"),
        ('{"weight_map": {"a": 3}}', "it has no weight_map"),
        ('{"weight_map": {"a": "../one.safetensors"}}', "it does not name files beside it"),
        ('{"weight_map": {"a": "model.safetensors.index.json"}}', "it does not name files beside it"),
        ('{"weight_map": {"a": "two.safetensors"}}', r"names two.safetensors, which is not beside it"),
        ('{"weight_map": {"a": "one.safetensors"}}', "says that one.safetensors holds 'a', which it does not"),
    ):
        path.write_text(content)
        with pytest.raises(InputError, match=words) as caught:
            Weights("mini", tmp_path).merged(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        "base_model.model.vision_model.encoder.layers.0.self_attn.q_proj.lora_A.weight",
        "base_model.model.visual.transformer.resblocks.0.mlp.c_fc.base_layer.weight",
        "visual.transformer.resblocks.0.attn.lora_magnitude_vector",
        "lora_te_text_model_encoder_layers_0.lora_down.weight",
    ],
)
def test_an_adapter_is_called_one(tmp_path, name):
    (tmp_path / "pretrained").mkdir()
    save_file({name: torch.ones(2, 2)}, tmp_path / "pretrained" / "adapter_model.safetensors")
    with pytest.raises(InputError, match=r"adapter_model.safetensors holds a LoRA adapter .*merge_and_unload\(\)"):
        Weights("mini", tmp_path).pretrained()


def test_the_first_differing_key_is_named(model):
    shapes, state = get_encoder("mini").shapes, to_visual(model.state_dict())
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
