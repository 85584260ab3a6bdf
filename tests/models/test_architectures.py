"""The table of architectures, and the towers that it builds."""

import pytest
import torch

from probsurgery.pipeline.errors import InputError
from probsurgery.pipeline.models import architectures
from probsurgery.pipeline.models.architectures import ARCHS, expected_shapes, image_transform, model_config


@pytest.mark.parametrize("arch", ARCHS)
def test_every_tower_has_quickgelu_in_every_block(arch):
    blocks = architectures._empty_tower(arch).transformer.resblocks
    assert len(blocks) > 0
    assert {type(block.mlp.gelu).__name__ for block in blocks} == {"QuickGELU"}


@pytest.mark.parametrize(
    ("arch", "dim", "size"), [("vitb32", 512, 224), ("vitb16", 512, 224), ("vitl14", 768, 224), ("mini", 64, None)]
)
def test_widths_are_the_papers(arch, dim, size):
    assert model_config(arch)["embed_dim"] == dim
    assert expected_shapes(arch)["proj"][1] == dim
    assert size in (None, model_config(arch)["vision_cfg"]["image_size"])


def test_features_are_what_encode_image_returns():
    import open_clip

    model = open_clip.CLIP(**model_config("mini")).eval()
    tower = architectures.build_visual("mini", model.visual.state_dict())
    size = model_config("mini")["vision_cfg"]["image_size"]
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        assert torch.equal(tower(images), model.encode_image(images, normalize=False))
    assert not any(p.requires_grad for p in tower.parameters())


def test_the_transform_turns_any_image_into_a_normalised_square():
    from PIL import Image

    size = model_config("mini")["vision_cfg"]["image_size"]
    for mode, shape in (("L", (100, 60)), ("RGB", (7, 9)), ("RGBA", (64, 64))):
        tensor = image_transform("mini")(Image.new(mode, shape))
        assert tensor.shape == (3, size, size)
    black = image_transform("mini")(Image.new("RGB", (50, 50)))[:, 0, 0]
    assert torch.allclose(
        black, -torch.tensor([0.48145466, 0.4578275, 0.40821073]) / torch.tensor([0.26862954, 0.26130258, 0.27577711])
    )


def test_preprocessing_is_open_clips_own_for_the_model():
    import open_clip

    for arch, tag in (("vitb32", "openai"), ("vitl14", "openai"), ("ViT-B-16-SigLIP", "webli")):
        name = architectures.get_arch(arch).open_clip
        own = open_clip.get_pretrained_cfg(name, tag)
        preprocessing = architectures.preprocessing(arch)
        assert preprocessing["mean"] == list(own["mean"])
        assert preprocessing["std"] == list(own["std"])
        assert preprocessing["image_size"] == 224
    assert architectures.preprocessing("ViT-B-16-SigLIP")["resize"] == "squash"
    assert architectures.preprocessing("vitb32")["resize"] == "shortest"


@pytest.mark.parametrize(
    ("name", "dim", "quick"), [("ViT-B-32-quickgelu", 512, True), ("ViT-H-14", 1024, False), ("RN50", 1024, False)]
)
def test_any_model_of_open_clip_is_an_architecture(name, dim, quick):
    import open_clip

    assert architectures.get_arch(name).suite == "clip8"
    assert model_config(name)["embed_dim"] == dim
    assert model_config(name).get("quick_gelu", False) is quick
    with torch.device("meta"):
        whole = open_clip.CLIP(**model_config(name)).visual
    assert expected_shapes(name) == {n: t.shape for n, t in whole.state_dict().items()}


def test_an_unknown_architecture_is_refused_with_the_known_ones():
    with pytest.raises(InputError, match=r"unknown arch 'vitb64'; choose from: mini, vitb32, .*ViT-B-32-quickgelu"):
        architectures.get_arch("vitb64")
