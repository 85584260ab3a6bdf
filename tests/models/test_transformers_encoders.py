"""Encoders of transformers: features, pixels and names against transformers itself, and what is refused."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

from probsurgery.pipeline.datasets.tasks import Task
from probsurgery.pipeline.errors import InputError
from probsurgery.pipeline.files import decode
from probsurgery.pipeline.models.checkpoints import digest, read_tensors
from probsurgery.pipeline.models.encoders import described_encoder, encoder_of, get_encoder
from probsurgery.pipeline.models.sources import Weights
from probsurgery.pipeline.models.text_classifiers import load_classifiers
from probsurgery.pipeline.store.manifest import Identity
from support import identity, tiny_clip, to_visual, write_tokenizer

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL = SIZES | {"image_size": 32, "patch_size": 8}
TEXT = SIZES | {"vocab_size": 64, "max_position_embeddings": 16, "eos_token_id": 63}
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
CROP = {"crop_size": {"height": 48, "width": 48}}
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


def test_a_clip_folder_gives_what_open_clip_gives_with_its_weights(tmp_path):
    model = tiny_clip()
    folder = write_folder(tmp_path / "tower", model, {"image_processor_type": "CLIPImageProcessor", "size": 48} | CROP)
    encoder, built = tower(folder)
    named = get_encoder("mini")
    images = torch.randn(4, 3, 48, 48)
    difference = (built(images) - named.build(to_visual(model.state_dict()))(images)).abs().max()
    assert difference < 1e-5
    assert encoder.dim == named.dim
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 60, 3), dtype=np.uint8))
    assert torch.allclose(encoder.preprocessing.transform(image), named.preprocessing.transform(image), atol=1e-5)


@torch.no_grad()
def test_projection_and_pooling_are_settings(tmp_path):
    folder = write_folder(tmp_path / "own", model_of("clip"))
    images = torch.randn(2, 3, 32, 32)
    encoder, built = tower(folder, projection=False)
    assert encoder.dim == 32
    assert torch.allclose(built(images), model_of("clip").vision_model(pixel_values=images).pooler_output, atol=1e-5)
    for options, words in [
        ({"pooling": "cls"}, "unknown pooling of own, a clip_vision_model, 'cls'; choose from: pooler"),
        ({"pooling": "max"}, "'max'; choose from: pooler"),
    ]:
        with pytest.raises(InputError, match=words):
            get_encoder(str(folder), **options)
    write_folder(tmp_path / "vit", model_of("vit"))
    with pytest.raises(InputError, match="vit, a vit, has no projection; leave it out"):
        get_encoder(str(tmp_path / "vit"), projection=True)
    with pytest.raises(InputError, match="pooling and projection are for models of transformers, and mini is none"):
        get_encoder("mini", pooling="cls")


def test_checkpoints_of_every_form_give_one_state(tmp_path):
    """Published names, those of transformers' modules, prefixes of wrappers, several files; heads are left out."""
    model = model_of("vit classifier")
    folder = write_folder(tmp_path / "own", model)
    weights = Weights(get_encoder(str(folder)), tmp_path)
    published = load_file(folder / "model.safetensors")
    assert any(name.startswith("vit.encoder.layer.0.attention.attention.query") for name in published)
    bare = {n.removeprefix("vit."): t for n, t in published.items() if n.startswith("vit.")}
    forms = {
        "published": published,
        "bare": bare,
        "modules": model.state_dict(),
        "wrapped": {f"module.model.{n}": t for n, t in published.items()},
        "with a head": bare | {"classifier.weight": torch.zeros(5, 32), "classifier.bias": torch.zeros(5)},
        "half": {n: t.half().float() for n, t in published.items()},
    }
    digests = {}
    for name, tensors in forms.items():
        save_file({n: t.contiguous() for n, t in tensors.items()}, tmp_path / "expert.safetensors")
        digests[name] = digest(Weights(weights.encoder, tmp_path).load(tmp_path / "expert.safetensors"))
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    digests["shards"] = digest(weights.load(tmp_path / "shards"))
    assert digests.pop("half") not in digests.values()
    assert len(set(digests.values())) == 1


def test_an_experts_projection_is_that_of_the_encoders_own_weights(tmp_path):
    whole, folder = model_of("clip"), tmp_path / "experts"
    write_folder(tmp_path / "own", whole)
    torch.manual_seed(1)
    transformers.CLIPVisionModel(whole.config.vision_config).save_pretrained(folder / "digits")
    weights = Weights(get_encoder(str(tmp_path / "own")), folder)
    assert torch.equal(weights.pretrained()["visual_projection.weight"], whole.visual_projection.weight)
    assert weights.files["pretrained"].source == str(tmp_path / "own" / "model.safetensors")
    expert = weights.load(folder / "digits")
    assert torch.equal(expert["visual_projection.weight"], whole.visual_projection.weight)
    assert not torch.equal(expert["post_layernorm.weight"], 0 * whole.vision_model.post_layernorm.weight)
    other = write_folder(tmp_path / "other", whole)
    named = Weights(weights.encoder, folder, {"pretrained": str(other)})  # what a suite names goes first
    assert named.pretrained_file == other / "model.safetensors"
    write_folder(folder / "pretrained", whole)
    assert Weights(weights.encoder, folder).pretrained_file == folder / "pretrained" / "model.safetensors"


@pytest.mark.parametrize(
    ("name", "other", "fields", "words"),
    [
        ("vit", "Dinov2", {}, "is not a checkpoint of own"),
        ("dinov2", "ViT", {}, "is not a checkpoint of own"),
        ("vit", "ViT", {"hidden_act": "relu"}, "hidden_act relu, and own has gelu"),
        ("vit", "ViT", {"num_attention_heads": 2}, "num_attention_heads 2, and own has 4"),
        ("vit", "ViT", {"layer_norm_eps": 1e-3}, "layer_norm_eps 0.001, and own has 1e-12"),
        ("dinov2", "Dinov2", {"num_hidden_layers": 3}, "has a key 'encoder.layer.2"),
        ("clip", "CLIPVision", {"hidden_act": "gelu"}, "hidden_act gelu, and own has quick_gelu"),
        ("siglip", "SiglipVision", {"patch_size": 4}, "of shape .* instead of"),
    ],
)
def test_another_model_is_refused_in_one_line(tmp_path, name, other, fields, words):
    encoder = get_encoder(str(write_folder(tmp_path / "own", model_of(name))))
    config = getattr(transformers, f"{other}Config")(**(SMALL | fields))
    getattr(transformers, f"{other}Model")(config).save_pretrained(tmp_path / "expert")
    with pytest.raises(InputError, match=words) as caught:
        Weights(encoder, tmp_path / "own").load(tmp_path / "expert")
    assert "\n" not in str(caught.value)


def changed(**fields):
    return lambda config, processor: config.update(fields)


def prepared(**fields):
    return lambda config, processor: processor.update(fields)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda config, processor: config.clear(), "config.json has no model_type; CLIP, SigLIP"),
        (changed(model_type="bert"), "has a text model of type 'bert'; CLIP, SigLIP"),
        (changed(model_type="resnet"), "has a model of type 'resnet'"),
        (changed(auto_map={"AutoModel": "code.Model"}), "code of its own .auto_map., which is never run"),
        (changed(quantization_config={"bits": 4}), "quantised"),
        (changed(hidden_size="wide"), "config.json cannot be used"),
        (changed(num_hidden_layers=10**9), "<= 512 - at .*num_hidden_layers"),
        (changed(hidden_act="sine"), "config.json cannot be used: Invalid enum value 'sine'"),
        (changed(num_channels=1), "num_channels"),
        (changed(image_size=[32, 64]), "config.json cannot be used"),
        (changed(num_attention_heads=5), "hidden_size of 32, which is no multiple of its 5 heads"),
        (
            changed(image_size=64),
            "prepared at 32 pixels, and own takes 64; its position",
        ),
        (changed(image_size=4096, patch_size=1), "1 to 256 are in a row"),
        (prepared(image_processor_type="ConvNextImageProcessor"), "unknown image_processor_type in .*'ConvNextI"),
        (prepared(size={"shortest_edge": 32}), "do_center_crop"),
        (prepared(size={"height": 32, "width": 30}), "that are equal, are taken"),
        (prepared(do_resize=False), "does not resize .do_resize."),
        (prepared(do_pad=True), "do_pad"),
        (prepared(resample=4), "resample is 4; Pillow's numbers from 0 to 3"),
        (prepared(rescale_factor=0), "rescale_factor is 0"),
        (prepared(image_mean=[0.5]), "preprocessor_config.json cannot be used: Expected `array` of length 3"),
        (prepared(image_std=[0, 0.5, 0.5]), "preprocessor_config.json cannot be used"),
        (prepared(do_center_crop=True, crop_size={"height": 40, "width": 40}), "it crops to 40 x 40 from 32"),
    ],
)
def test_a_folder_that_cannot_be_used_is_refused_in_one_line(tmp_path, change, words):
    config = json.loads(transformers.ViTConfig(**SMALL).to_json_string())
    processor = {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}}
    change(config, processor)
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    with pytest.raises(InputError, match=words) as caught:
        assert get_encoder(str(folder)).shapes
    assert "\n" not in str(caught.value)


def test_a_folder_that_lacks_a_file_says_what_it_holds(tmp_path):
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "notes.txt").write_text("")
    with pytest.raises(InputError, match=r"own has no config.json, .* it holds: notes.txt"):
        get_encoder(str(tmp_path / "own"))
    (tmp_path / "own" / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="holds an adapter .LoRA or the like. and no model"):
        get_encoder(str(tmp_path / "own"))
    model_of("vit").save_pretrained(tmp_path / "own")
    with pytest.raises(InputError, match="own has no preprocessor_config.json"):
        get_encoder(str(tmp_path / "own"))
    nested = {"image_processor": {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}}}
    (tmp_path / "own" / "processor_config.json").write_text(json.dumps(nested))
    assert get_encoder(str(tmp_path / "own")).preprocessing.image_size == 32
    (tmp_path / "mini").mkdir()
    with pytest.raises(InputError, match="has the name of another encoder .'mini'.*rename it"):
        get_encoder(str(tmp_path / "mini"))
    with pytest.raises(InputError, match="no encoder at '/nowhere/model'"):
        get_encoder("/nowhere/model")


def described(encoder, **other):
    """The encoder of a cache's identity, as it is read from a file."""
    made = identity(
        ["a"], arch=encoder.name, encoder=encoder.description, preprocessing=encoder.preprocessing.to_json()
    )
    plain = json.loads(json.dumps(made.to_json()))
    plain["encoder"] |= other
    return encoder_of(decode(Identity, plain))


@pytest.mark.parametrize("name", KINDS)
def test_a_cache_describes_its_encoder_without_the_folder(tmp_path, name):
    encoder, built = tower(write_folder(tmp_path / "own", model_of(name)))
    state = built.state_dict()
    shutil.rmtree(tmp_path / "own")
    again = described(encoder)
    assert (again.name, again.description, again.shapes) == (encoder.name, encoder.description, encoder.shapes)
    assert again.preprocessing == encoder.preprocessing
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(again.build(again.state(state))(images), built(images))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"library": "timm"}, "unknown library of the encoder own 'timm'; choose from: open_clip, transformers"),
        ({"config": {}}, "the description of own cannot be used: Object missing required field"),
        ({"config": None}, "the description of own cannot be used"),
        ({"pooling": "__class__"}, "unknown pooling"),
        ({"config": {"model_type": "bert"}}, "unknown kind of model in the description of own 'bert'"),
        ({"config": {"num_hidden_layers": 10**6}}, "num_hidden_layers"),
        ({"config": {"auto_map": "x"}}, "unknown field"),
        ({"notes": "x" * 2**20}, "the description of own has more than"),
        ({"library": "open_clip"}, "is no configuration of open_clip"),
    ],
)
def test_a_description_by_anybody_is_one_line(tmp_path, change, words):
    encoder = get_encoder(str(write_folder(tmp_path / "own", model_of("vit"))))
    if change.get("config"):
        change = {"config": {**encoder.description["config"], **change["config"]}}
    with pytest.raises(InputError, match=words):
        described(encoder, **change)


def test_a_description_of_any_depth_is_one_line(tmp_path):
    encoder = get_encoder(str(write_folder(tmp_path / "own", model_of("vit"))))
    preprocessing, deep = encoder.preprocessing, []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(InputError, match="nested too deeply"):
        described_encoder("own", {**encoder.description, "notes": deep}, preprocessing)
    with pytest.raises(InputError, match="cannot be used"):
        described_encoder("own", encoder.description | {"config": []}, preprocessing)


@pytest.mark.parametrize("arch", ["hf:someone/model", "/etc/model.json", "../own"])
def test_the_name_in_a_cache_is_not_followed(tmp_path, monkeypatch, arch):
    write_folder(tmp_path / "own", model_of("vit"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *a: pytest.fail("it was fetched"))
    with pytest.raises(InputError, match="no encoder at|unknown arch"):
        encoder_of(identity(["a"], arch=arch))


ANIMALS = Task("animals", ("cat", "grey dog"), templates=("a photo of the {}", "{}"))


@torch.no_grad()
@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_zero_shot_classifiers_come_from_the_models_own_text_tower(tmp_path, name):
    model = model_of(name)
    (tmp_path / "experts").mkdir()
    weights = Weights(get_encoder(str(write_folder(tmp_path / "own", model))), tmp_path / "experts")
    with pytest.raises(InputError, match="own has no tokenizer .* name a file by `classifier` in the suite"):
        load_classifiers(weights, [ANIMALS], torch.device("cpu"))
    write_tokenizer(tmp_path / "own")
    classifier = load_classifiers(weights, [ANIMALS], torch.device("cpu"))["animals"].weight
    own = transformers.AutoTokenizer.from_pretrained(tmp_path / "own")
    for row, animal in zip(classifier, ANIMALS.class_names, strict=True):
        prompts = [template.format(animal) for template in ANIMALS.templates]
        tokens = own(prompts, padding="max_length", max_length=16, return_tensors="pt")
        features = model.get_text_features(input_ids=tokens["input_ids"])
        features = getattr(features, "pooler_output", features)
        mean = torch.nn.functional.normalize(features, dim=-1).mean(0)
        assert torch.allclose(row, model.logit_scale.exp() * mean / mean.norm(), atol=1e-4)
    assert len(set(classifier[:, 0].tolist())) == 2


def test_a_model_without_text_tower_or_of_another_width_says_what_to_give(tmp_path):
    (tmp_path / "experts").mkdir()
    for name, options, words in [
        ("vit", {}, "own has no text tower to make classifiers with; name a file by `classifier` in the suite"),
        ("clip", {"projection": False}, "gives 24 numbers, and own gives 32"),
    ]:
        folder = write_folder(tmp_path / name / "own", model_of(name))
        write_tokenizer(folder)
        weights = Weights(get_encoder(str(folder), **options), tmp_path / "experts")
        with pytest.raises(InputError, match=words):
            load_classifiers(weights, [ANIMALS], torch.device("cpu"))


def test_without_the_library_the_extra_is_named(tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "own", model_of("vit"))
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InputError, match=r"needs transformers; pip install 'probsurgery\[transformers\]'"):
        get_encoder(str(folder))
