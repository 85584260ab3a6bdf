"""Published formats, made by the libraries that make the real ones, give the same features as those libraries."""

import pickle

import pytest
import torch
import transformers
from safetensors.torch import save_file

from probsurgery.pipeline.checkpoints import check_state, digest, read_tensors, to_visual
from probsurgery.pipeline.encoders import Weights, build_visual, expected_shapes, model_config
from probsurgery.pipeline.errors import InputError
from probsurgery.pipeline.tasks import select_tasks
from support import hugging_face_config


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
    assert torch.allclose(ours, theirs, atol=1e-4)


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
    assert torch.allclose(features_of(weights.expert(mnist), images), theirs, atol=1e-4)
    assert torch.allclose(features_of(weights.pretrained(), images), theirs, atol=1e-4)


@pytest.mark.parametrize("prefixed", [True, False])
def test_keys_with_and_without_their_prefix_are_read_alike(model, prefixed):
    state = {n.removeprefix("vision_model."): t for n, t in model.state_dict().items()}
    if prefixed:
        state = {n if n.startswith("visual_projection") else f"vision_model.{n}": t for n, t in state.items()}
    expected = to_visual(model.state_dict())
    assert digest(to_visual(state)) == digest(expected)


@pytest.mark.parametrize("prefix", ["", "visual.", "model.visual."])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_plain_state_dicts_are_read_with_any_prefix_and_text_leftovers(tmp_path, model, prefix, suffix):
    state = to_visual(model.state_dict())
    kept = {prefix + n: t for n, t in state.items()} | ({"transformer.text": torch.ones(2)} if prefix else {})
    path = tmp_path / f"merged{suffix}"
    save_file(kept, path) if suffix == ".safetensors" else torch.save({"state_dict": kept}, path)
    assert digest(to_visual(read_tensors(path))) == digest(state)


def test_half_precision_is_read_as_float32(model):
    state = to_visual({n: t.half() for n, t in model.state_dict().items()})
    assert {t.dtype for t in state.values()} == {torch.float32}


class Trap:
    def __reduce__(self):
        return (pytest.fail, ("the file was executed",))


@pytest.mark.parametrize("writer", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_pickled_objects_are_refused_and_not_executed(tmp_path, writer):
    writer({"a": Trap()}, tmp_path / "trap.pt")
    with pytest.raises(InputError, match="unpickling runs code|not a readable checkpoint"):
        read_tensors(tmp_path / "trap.pt")


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_torn_and_missing_files_are_refused(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    with pytest.raises(InputError, match="no checkpoint at"):
        read_tensors(path)
    for content in (b"", b"torn", b"\x00" * 300):
        path.write_bytes(content)
        with pytest.raises(InputError, match=str(path)):
            read_tensors(path)


def test_files_of_something_else_are_refused(tmp_path):
    for value in ([1, 2], {"a": 1}, {}):
        torch.save(value, tmp_path / "x.pt")
        with pytest.raises(InputError, match="state dict"):
            read_tensors(tmp_path / "x.pt")


def test_the_first_differing_key_is_named(model):
    shapes, state = expected_shapes("mini"), to_visual(model.state_dict())
    check_state(state, shapes, "x.pt")
    first = next(iter(shapes))
    with pytest.raises(InputError, match=f"x.pt lacks the key '{first}'"):
        check_state({n: t for n, t in state.items() if n != first}, shapes, "x.pt")
    with pytest.raises(InputError, match=r"'proj' has shape \(3, 4\), this architecture takes \("):
        check_state(state | {"proj": torch.zeros(3, 4)}, shapes, "x.pt")
    with pytest.raises(InputError, match="has a key 'extra'"):
        check_state(state | {"extra": torch.zeros(1)}, shapes, "x.pt")
    with pytest.raises(InputError, match="'proj' holds NaN"):
        check_state(state | {"proj": state["proj"] * float("nan")}, shapes, "x.pt")
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
