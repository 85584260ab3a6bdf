"""The table of architectures, and the towers that it builds."""

import pytest
import torch

from probsurgery.pipeline.datasets.suites import own_suite
from probsurgery.pipeline.errors import InputError
from probsurgery.pipeline.models.architectures import ARCHS
from probsurgery.pipeline.models.encoders import get_encoder


@pytest.mark.parametrize("arch", ARCHS)
def test_every_tower_has_quickgelu_in_every_block(arch):
    blocks = get_encoder(arch).empty().transformer.resblocks
    assert len(blocks) > 0
    assert {type(block.mlp.gelu).__name__ for block in blocks} == {"QuickGELU"}


@pytest.mark.parametrize(
    ("arch", "dim", "size"), [("vitb32", 512, 224), ("vitb16", 512, 224), ("vitl14", 768, 224), ("mini", 64, None)]
)
def test_widths_are_the_papers(arch, dim, size):
    assert get_encoder(arch).dim == dim
    assert get_encoder(arch).shapes["proj"][1] == dim
    assert size in (None, get_encoder(arch).config["vision_cfg"]["image_size"])


def test_features_are_what_encode_image_returns():
    import open_clip

    model = open_clip.CLIP(**get_encoder("mini").config).eval()
    tower = get_encoder("mini").build(model.visual.state_dict())
    size = get_encoder("mini").config["vision_cfg"]["image_size"]
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        assert torch.equal(tower(images), model.encode_image(images, normalize=False))
    assert not any(p.requires_grad for p in tower.parameters())


def test_the_transform_turns_any_image_into_a_normalised_square():
    from PIL import Image

    size = get_encoder("mini").config["vision_cfg"]["image_size"]
    for mode, shape in (("L", (100, 60)), ("RGB", (7, 9)), ("RGBA", (64, 64))):
        tensor = get_encoder("mini").preprocessing.transform(Image.new(mode, shape))
        assert tensor.shape == (3, size, size)
    black = get_encoder("mini").preprocessing.transform(Image.new("RGB", (50, 50)))[:, 0, 0]
    assert torch.allclose(
        black, -torch.tensor([0.48145466, 0.4578275, 0.40821073]) / torch.tensor([0.26862954, 0.26130258, 0.27577711])
    )


def test_preprocessing_is_open_clips_own_for_the_model():
    import open_clip

    for arch, tag in (("vitb32", "openai"), ("vitl14", "openai"), ("ViT-B-16-SigLIP", "webli")):
        name = get_encoder(arch).arch.open_clip
        own = open_clip.get_pretrained_cfg(name, tag)
        preprocessing = get_encoder(arch).preprocessing.to_json()
        assert preprocessing["mean"] == list(own["mean"])
        assert preprocessing["std"] == list(own["std"])
        assert preprocessing["image_size"] == 224
    assert get_encoder("ViT-B-16-SigLIP").preprocessing.resize == "squash"
    assert get_encoder("vitb32").preprocessing.resize == "shortest"


@pytest.mark.parametrize(
    ("name", "dim", "quick"), [("ViT-B-32-quickgelu", 512, True), ("ViT-H-14", 1024, False), ("RN50", 1024, False)]
)
def test_any_model_of_open_clip_is_an_architecture(name, dim, quick):
    import open_clip

    assert own_suite(name) == "clip8"
    assert get_encoder(name).dim == dim
    assert get_encoder(name).config.get("quick_gelu", False) is quick
    with torch.device("meta"):
        whole = open_clip.CLIP(**get_encoder(name).config).visual
    assert get_encoder(name).shapes == {n: t.shape for n, t in whole.state_dict().items()}


def test_an_unknown_architecture_is_refused_with_the_known_ones():
    with pytest.raises(InputError, match=r"unknown arch 'vitb64'; choose from: mini, vitb32, .*ViT-B-32-quickgelu"):
        get_encoder("vitb64")
