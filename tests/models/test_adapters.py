"""Adapters that peft wrote, as experts: the weights are those of its own merge_and_unload."""

import json
import re

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from probsurgery.pipeline.datasets.tasks import Task
from probsurgery.pipeline.errors import InputError
from probsurgery.pipeline.models.checkpoints import read_tensors
from probsurgery.pipeline.models.encoders import get_encoder
from probsurgery.pipeline.models.sources import Weights

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL = SIZES | {"image_size": 32, "patch_size": 8}
KINDS = {
    "clip": (transformers.CLIPVisionConfig(**SMALL, projection_dim=24), "CLIPVisionModelWithProjection"),
    "vit classifier": (transformers.ViTConfig(**SMALL), "ViTForImageClassification"),
    "dinov2": (transformers.Dinov2Config(**SMALL), "Dinov2Model"),
}
PROCESSOR = {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}}
QV = {"vit classifier": ["q_proj", "v_proj"], "clip": ["q_proj", "fc1"], "dinov2": ["q_proj", "fc2"]}
VARIANTS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "patterns": {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"q_proj": 5}},
    "bias": {"bias": "all"},
    "norms": {"modules_to_save": ["layernorm"]},
    "patches": {"target_modules": ["projection"]},
}


def model_of(name):
    config, model = KINDS[name]
    torch.manual_seed(0)
    return getattr(transformers, model)(config).eval()


def write_folder(folder, model):
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    return folder


def write_adapter(folder, name, **settings):
    """A trained adapter of the model `name`, and the model that peft merges it into."""
    model = model_of(name)
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": QV[name]} | settings)
    adapted = peft.get_peft_model(model, config)
    for key, parameter in adapted.named_parameters():
        if parameter.requires_grad or "lora" in key:
            parameter.data += 0.1 * torch.randn_like(parameter)
    adapted.save_pretrained(folder)
    return adapted.merge_and_unload()


@pytest.fixture
def base(tmp_path):
    """The base's folder, its encoder and its weights."""

    def made(name):
        folder = write_folder(tmp_path / "base", model_of(name))
        return get_encoder(str(folder))

    return made


def expert_of(encoder, folder):
    weights = Weights(encoder, None, {"pretrained": str(folder.parent / "base"), "pets": str(folder)})
    return weights.expert(Task("pets", ("cat", "dog")))


@pytest.mark.parametrize(
    ("name", "variant"),
    [("clip", "plain"), ("dinov2", "rslora"), *(("vit classifier", variant) for variant in VARIANTS)],
)
def test_the_weights_are_those_that_peft_merges(tmp_path, base, name, variant):
    encoder = base(name)
    merged = write_adapter(tmp_path / "adapter", name, **VARIANTS[variant])
    expert = expert_of(encoder, tmp_path / "adapter")
    write_folder(tmp_path / "merged", merged)
    expected = encoder.state(read_tensors(tmp_path / "merged" / "model.safetensors"))
    plain = encoder.state(read_tensors(tmp_path / "base" / "model.safetensors"))
    assert list(expert) == list(encoder.shapes)
    changed = [key for key in expert if not torch.equal(expert[key], plain[key])]
    assert changed
    for key, tensor in expert.items():
        assert torch.allclose(tensor, expected[key], atol=1e-6, rtol=0), key


def test_the_names_of_an_older_release_are_found(tmp_path, base):
    """Adapters of ViT that transformers 4 wrote have `attention.attention.query` where release 5 has `q_proj`."""
    encoder = base("vit classifier")
    write_adapter(tmp_path / "adapter", "vit classifier")
    new = expert_of(encoder, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    older = {}
    for key, tensor in load_file(file).items():
        module, lora, rest = key.partition(".lora_")
        path = module.removeprefix("base_model.model.vit.")
        published = encoder.checkpoint_name(f"{path}.weight").removesuffix(".weight")
        older[f"base_model.model.vit.{published}{lora}{rest}" if lora else key] = tensor
    assert older.keys() != load_file(file).keys()
    save_file(older, file)
    assert all(torch.equal(new[key], tensor) for key, tensor in expert_of(encoder, tmp_path / "adapter").items())


def edit(key, value):
    def edited(folder):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))

    return edited


def tensors(change):
    def edited(folder):
        path = folder / "adapter_model.safetensors"
        save_file(change(load_file(path)), path)

    return edited


def renamed(state):
    return {key.replace("layers.1.", "layers.7.").replace("layer.1.", "layer.7."): t for key, t in state.items()}


def without_b(state):
    last = max(key for key in state if "lora_B" in key)
    return {key: tensor for key, tensor in state.items() if key != last}


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda folder: (folder / "adapter_config.json").unlink(), "without adapter_config.json"),
        (lambda folder: (folder / "adapter_config.json").write_text("{"), "cannot be read"),
        (lambda folder: (folder / "adapter_config.json").write_text("[]"), "of an adapter of type None"),
        (edit("peft_type", "IA3"), "of an adapter of type IA3; LORA is merged here"),
        (edit("layer_replication", [[0, 2]]), "has layer_replication; merge it with"),
        (edit("init_lora_weights", "pissa_niter_4"), "began with pissa_niter_4, which changes its base"),
        (edit("lora_alpha", "much"), "has a lora_alpha of 'much'; it must be a number above 0"),
        (edit("alpha_pattern", {"q_proj": None}), "has a lora_alpha of 'None'"),
        (edit("r", 8), r"another base: '.*lora_A.weight' has shape \(4, 32\), and base takes shape \(8, 32\)"),
        (edit("r", 0), "has a r of '0'"),
        (edit("use_dora", [1]), "lacks .*lora_magnitude_vector|cannot be merged by peft"),
        (tensors(lambda state: {k: t * float("nan") for k, t in state.items()}), "holds NaN or infinite values in"),
        (tensors(renamed), r"of another base: it changes '.*7.*', which base lacks"),
        (
            tensors(lambda state: {k: t[:, :8].contiguous() if "lora_A" in k else t for k, t in state.items()}),
            r"another base: .*lora_A",
        ),
        (tensors(without_b), "is damaged: it lacks .*lora_B"),
        (
            tensors(lambda state: {k: t for k, t in state.items() if "classifier" in k}),
            "changes nothing of the image tower",
        ),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(tmp_path, base, spoil, words):
    encoder = base("vit classifier")
    write_adapter(tmp_path / "adapter", "vit classifier", modules_to_save=["classifier"])
    spoil(tmp_path / "adapter")
    with pytest.raises(InputError, match=words) as caught:
        expert_of(encoder, tmp_path / "adapter")
    assert "\n" not in str(caught.value)


def test_an_adapter_is_no_base_and_is_not_for_open_clip(tmp_path, base):
    encoder = base("clip")
    write_adapter(tmp_path / "adapter", "clip")
    with pytest.raises(InputError, match=re.escape("merge_and_unload()")):
        Weights(encoder, None, {"pretrained": str(tmp_path / "adapter")}).pretrained()
    given = {"pretrained": str(tmp_path / "base"), "pets": str(tmp_path / "adapter")}
    with pytest.raises(InputError, match="adapters are for models of transformers, not ViT-B-32"):
        Weights("ViT-B-32", None, given).expert(Task("pets", ("cat", "dog")))


def test_without_peft_it_says_what_to_install(tmp_path, base, monkeypatch):
    encoder = base("clip")
    write_adapter(tmp_path / "adapter", "clip")
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(InputError, match=re.escape("pip install 'probsurgery[adapters]'")):
        expert_of(encoder, tmp_path / "adapter")
