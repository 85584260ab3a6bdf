"""Encoders of transformers: features, pixels and names against transformers itself, and what is refused."""

import json

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from probsurgery.pipeline.models.checkpoints import read_tensors
from probsurgery.pipeline.models.encoders import get_encoder

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL = SIZES | {"image_size": 32, "patch_size": 8}
TEXT = SIZES | {"vocab_size": 64, "max_position_embeddings": 16}
WHOLE = {"vision_config": SMALL, "text_config": TEXT}
KINDS = {
    "clip": (transformers.CLIPConfig(**WHOLE, projection_dim=24), "CLIPModel"),
    "clip projected": (transformers.CLIPVisionConfig(**SMALL, projection_dim=24), "CLIPVisionModelWithProjection"),
    "siglip": (transformers.SiglipConfig(**WHOLE), "SiglipModel"),
    "siglip vision": (transformers.SiglipVisionConfig(**SMALL), "SiglipVisionModel"),
    "vit": (transformers.ViTConfig(**SMALL), "ViTModel"),
    "vit classifier": (transformers.ViTConfig(**SMALL), "ViTForImageClassification"),
    "deit": (transformers.DeiTConfig(**SMALL), "DeiTModel"),
    "dinov2": (transformers.Dinov2Config(**SMALL), "Dinov2Model"),
    "dinov2 classifier": (transformers.Dinov2Config(**SMALL), "Dinov2ForImageClassification"),
    "registers": (transformers.Dinov2WithRegistersConfig(**SMALL, num_register_tokens=3), "Dinov2WithRegistersModel"),
}
PROCESSORS = {
    "clip": {"image_processor_type": "CLIPImageProcessor", "size": 32, "crop_size": 32},
    "siglip": {"image_processor_type": "SiglipImageProcessor", "size": {"height": 32, "width": 32}},
    "vit": {"feature_extractor_type": "ViTFeatureExtractor", "size": 32, "resample": 2, "do_normalize": False},
    "deit": {"image_processor_type": "DeiTImageProcessorFast", "size": {"height": 40, "width": 40}, "crop_size": 32},
    "dinov2": {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 37}, "crop_size": 32},
    "scaled": {"image_processor_type": "ViTImageProcessor", "size": 32, "resample": 1, "rescale_factor": 1 / 127.5},
    "plain": {"image_processor_type": "ViTImageProcessor", "size": 32, "resample": 0, "do_rescale": False},
}


def model_of(name):
    config, model = KINDS[name]
    torch.manual_seed(0)
    made = getattr(transformers, model)(config).eval()
    for parameter in made.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return made


def write_folder(folder, model, processor=None):
    model.save_pretrained(folder)
    settings = processor or PROCESSORS.get(model.config.model_type.split("_")[0], PROCESSORS["dinov2"])
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


def tower(folder, **options):
    encoder = get_encoder(str(folder), **options)
    return encoder, encoder.build(dict(encoder.state(read_tensors(folder / "model.safetensors"))))


@torch.no_grad()
def features_of(model, images, pooling):
    """As transformers' own documentation takes them."""
    if hasattr(model, "get_image_features"):
        output = model.get_image_features(pixel_values=images)
        return getattr(output, "pooler_output", output)
    output = model(pixel_values=images, **({"output_hidden_states": True} if hasattr(model, "classifier") else {}))
    if hasattr(output, "image_embeds"):
        return output.image_embeds
    if hasattr(model, "classifier"):
        base = getattr(model, model.base_model_prefix)
        output = base(pixel_values=images)
    first = 1 + getattr(model.config, "num_register_tokens", 0) + (model.config.model_type == "deit")
    first = 0 if model.config.model_type.startswith("siglip") else first
    hidden = output.last_hidden_state
    return {"cls": hidden[:, 0], "mean": hidden[:, first:].mean(1), "pooler": output.pooler_output}[pooling]


@pytest.mark.parametrize(
    ("name", "pooling"),
    [
        *((name, None) for name in KINDS),
        *(("vit", "pooler"), ("vit", "mean"), ("deit", "pooler"), ("deit", "mean"), ("dinov2", "mean")),
        *(("registers", "mean"), ("siglip vision", "mean")),
    ],
)
def test_features_are_transformers_own(tmp_path, name, pooling):
    model = model_of(name)
    encoder, built = tower(write_folder(tmp_path / "own", model), pooling=pooling)
    images = torch.randn(3, 3, 32, 32)
    expected = features_of(model, images, pooling or ("pooler" if "siglip" in name else "cls"))
    features = built(images)
    assert features.shape == (3, encoder.dim)
    assert torch.allclose(features, expected, atol=1e-5), (features - expected).abs().max()
    weights = dict(encoder.state(read_tensors(tmp_path / "own" / "model.safetensors")))
    assert list(encoder.shapes) == [n for n in encoder.shapes if n in weights]
    assert torch.equal(encoder.functional()(weights, images), features)
    assert torch.equal(encoder.build(encoder.state(built.state_dict()))(images), features)


@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("size", [(32, 32), (45, 61), (100, 33), (31, 17), (1, 3)])
def test_pixels_are_those_of_transformers_processor(tmp_path, name, size):
    folder = write_folder(tmp_path / "own", model_of("dinov2"), PROCESSORS[name])
    own = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
    pixels = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    given = get_encoder(str(folder)).preprocessing.transform(image)
    expected = own(image, return_tensors="pt")["pixel_values"][0]
    assert given.shape == (3, 32, 32)
    assert (given - expected).abs().max() <= 1e-5 * expected.abs().max().clamp(min=1)
