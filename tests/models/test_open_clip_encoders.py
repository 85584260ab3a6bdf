"""open_clip configurations of one's own, from a file and from a cache's description."""

import json

import pytest
import torch

from probsurgery.pipeline.errors import InputError
from probsurgery.pipeline.files import decode
from probsurgery.pipeline.models.encoders import encoder_of, get_encoder
from probsurgery.pipeline.store.manifest import Identity
from support import TINY, identity

PLAIN = {"embed_dim": 16, "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 8, "patch_size": 8}}


def described(encoder, **config):
    """The encoder of a cache's identity, as it is read from a file."""
    made = identity(
        ["a"], arch=encoder.name, encoder=encoder.description, preprocessing=encoder.preprocessing.to_json()
    )
    plain = json.loads(json.dumps(made.to_json()))
    plain["encoder"]["config"] |= config
    return encoder_of(decode(Identity, plain))


def written(folder, config):
    path = folder / "animals.json"
    path.write_text(json.dumps(config))
    return path


def test_a_configuration_in_a_file_is_an_encoder_and_a_cache_describes_it(tmp_path):
    path = written(tmp_path, json.loads(TINY.config.read_text()))
    encoder, named = get_encoder(str(path)), get_encoder("mini")
    path.unlink()
    again = described(encoder)
    assert (encoder.name, encoder.dim) == ("animals", named.dim)
    assert "text_cfg" not in encoder.description["config"]
    state = {name: torch.randn(shape) for name, shape in named.shapes.items()}
    images = torch.randn(2, 3, 48, 48)
    for one in (encoder, again):
        assert one.preprocessing == named.preprocessing
        assert torch.equal(one.build(state)(images), named.build(state)(images))
        assert torch.equal(one.functional()(state, images), named.build(state)(images))
    assert again.description == encoder.description
    assert named.description == {}


def test_the_hubs_form_brings_its_preprocessing(tmp_path):
    given = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.5, 1.0], "resize_mode": "squash", "interpolation": "bilinear"}
    encoder = get_encoder(str(written(tmp_path, {"model_cfg": PLAIN, "preprocess_cfg": given})))
    assert encoder.preprocessing.to_json() == {
        "image_size": 32,
        "resize": "squash",
        "interpolation": "bilinear",
        "mean": [0.5, 0.5, 0.5],
        "std": [0.25, 0.5, 1.0],
    }


def vision(**fields):
    return PLAIN | {"vision_cfg": PLAIN["vision_cfg"] | fields}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ([], "is no configuration of open_clip: it has no embed_dim and vision_cfg"),
        ({"embed_dim": 4}, "is no configuration of open_clip"),
        (vision(layer=3), "vision_cfg has no 'layer'; did you mean 'layers'?"),
        (vision(layers=10**9), "layers is 1000000000; at most 512 can be built"),
        (vision(layers=[1, 1, 1, 10**9]), "layers is 1000000000"),
        (vision(image_size=10**6), "image_size is 1000000; at most 4,096"),
        (vision(width=-1), "width is -1"),
        (vision(width="wide"), "whole numbers from 1"),
        (vision(layers="many"), "animals cannot be built by open_clip"),
        (vision(image_size=4096, patch_size=1, pos_embed_type="sin_cos_2d"), "too many patches .4096 // 1 in a row."),
        (vision(patch_size=0), "whole numbers from 1"),
        (PLAIN | {"embed_dim": 0.5}, "whole numbers from 1"),
        (vision(image_size=[32, 64]), "whole numbers from 1"),
        (vision(output_tokens=True), "output_tokens"),
        (
            vision(timm_model_name="hf-hub:someone/model"),
            "timm has no model 'hf-hub:someone/model', and none is fetched",
        ),
        (vision(timm_model_name="local-dir:/etc"), "timm has no model 'local-dir:/etc'"),
        (vision(head_width=0), "animals cannot be built by open_clip"),
    ],
)
def test_a_configuration_that_is_not_built_is_refused_in_one_line(tmp_path, config, words):
    with pytest.raises(InputError, match=words) as caught:
        get_encoder(str(written(tmp_path, config)))
    assert "\n" not in str(caught.value)
    if isinstance(config, dict) and "vision_cfg" in config:  # and from a cache
        encoder = get_encoder(str(written(tmp_path, PLAIN)))
        with pytest.raises(InputError, match=words):
            assert described(encoder, **config).shapes


def test_weights_of_timm_are_never_fetched(tmp_path, monkeypatch):
    import timm

    asked = []
    monkeypatch.setattr("timm.models._builder.load_pretrained", lambda *a, **k: asked.append(a))
    config = vision(timm_model_name="vit_tiny_patch16_224", timm_model_pretrained=True, image_size=224)
    assert get_encoder(str(written(tmp_path, config))).shapes
    timm.create_model("vit_tiny_patch16_224", pretrained=True)
    assert len(asked) == 1


def test_an_unknown_name_gives_the_nearest():
    for given, near in (("vit-b-32-quickgelu", "ViT-B-32-quickgelu"), ("ViT-L14", "ViT-L-14")):
        with pytest.raises(InputError, match=f"unknown arch '{given}'; choose from: mini, vitb32, .*{near}"):
            get_encoder(given)
    with pytest.raises(InputError, match="no encoder at 'none.json'; give the path of an open_clip configuration"):
        get_encoder("none.json")
