"""The architecture table, the towers it builds, and classifiers."""

import pytest
import torch
from safetensors.torch import save_file

from probsurgery.pipeline import encoders
from probsurgery.pipeline.encoders import ARCHS, Weights, expected_shapes, image_transform, model_config
from probsurgery.pipeline.errors import InputError
from probsurgery.pipeline.tasks import Task, select_tasks


@pytest.mark.parametrize("arch", ARCHS)
def test_every_tower_has_quickgelu_in_every_block(arch):
    blocks = encoders._empty_tower(arch).transformer.resblocks
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
    tower = encoders.build_visual("mini", model.visual.state_dict())
    size = model_config("mini")["vision_cfg"]["image_size"]
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        assert torch.equal(tower(images), model.encode_image(images, normalize=False))
    assert not any(p.requires_grad for p in tower.parameters())


def test_the_transform_makes_normalised_squares_of_any_image():
    from PIL import Image

    size = model_config("mini")["vision_cfg"]["image_size"]
    for mode, shape in (("L", (100, 60)), ("RGB", (7, 9)), ("RGBA", (64, 64))):
        tensor = image_transform("mini")(Image.new(mode, shape))
        assert tensor.shape == (3, size, size)
    black = image_transform("mini")(Image.new("RGB", (50, 50)))[:, 0, 0]
    assert torch.allclose(
        black, -torch.tensor([0.48145466, 0.4578275, 0.40821073]) / torch.tensor([0.26862954, 0.26130258, 0.27577711])
    )


def test_text_classifiers_average_normalised_prompts_and_carry_the_scale(monkeypatch):
    import open_clip

    torch.manual_seed(0)
    model = open_clip.CLIP(**model_config("mini"))
    vocabulary = model_config("mini")["text_cfg"]["vocab_size"]
    length = model_config("mini")["text_cfg"]["context_length"]

    def tokenizer(texts):
        tokens = torch.zeros(len(texts), length, dtype=torch.long)
        for row, text in enumerate(texts):
            tokens[row, :4] = torch.tensor([hash_ % (vocabulary - 2) + 1 for hash_ in map(ord, (text + "    ")[-4:])])
            tokens[row, 4] = vocabulary - 1
        return tokens

    asked = []
    monkeypatch.setattr(open_clip, "create_model", lambda *a, **k: asked.append((a, k["pretrained"])) or model)
    monkeypatch.setattr(open_clip, "get_tokenizer", lambda name: asked.append(name) or tokenizer)
    task = Task("t", "clip8", "T", ("cat", "dog"), ("a {}.", "the {}!", "{}"))
    made = encoders.text_classifiers("vitb32", [task], torch.device("cpu"))["t"]
    assert asked == [(("ViT-B-32-quickgelu",), "openai"), "ViT-B-32-quickgelu"]
    with torch.no_grad():
        for row, name in zip(made, task.class_names, strict=True):
            prompts = model.encode_text(tokenizer([t.format(name) for t in task.templates]))
            mean = torch.nn.functional.normalize(prompts, dim=-1).mean(0)
            assert torch.allclose(row, model.logit_scale.exp() * mean / mean.norm(), atol=1e-4)


def test_classifiers_come_from_the_folder_if_it_has_them(tmp_path):
    tasks = select_tasks("mini", ["mnist"])
    dim = model_config("mini")["embed_dim"]
    with pytest.raises(InputError, match="no folder of checkpoints"):
        Weights("mini", tmp_path / "nothing")
    for held, words in [
        ({"other": torch.zeros(10, dim)}, "no classifier of 'mnist'; it holds: other"),
        ({"mnist": torch.zeros(9, dim)}, r"has shape \(9, 64\), not \(C, d\) = \(10, 64\)"),
    ]:
        save_file(held, tmp_path / "classifiers.safetensors")
        with pytest.raises(InputError, match=words):
            Weights("mini", tmp_path).classifiers(tasks, torch.device("cpu"))
    save_file({"mnist": torch.ones(10, dim).half()}, tmp_path / "classifiers.safetensors")
    assert Weights("mini", tmp_path).classifiers(tasks, torch.device("cpu"))["mnist"].dtype == torch.float32


def test_a_missing_expert_is_named_with_where_it_was_looked_for(tmp_path):
    (task,) = select_tasks("mini", ["mnist"])
    with pytest.raises(
        InputError, match=r"no checkpoint of 'mnist'.*mnist\.safetensors, mnist\.pt, mnist/model\.safetensors"
    ):
        Weights("mini", tmp_path).expert(task)


def test_no_connection_is_one_line(monkeypatch):
    import huggingface_hub

    def offline(*arguments):
        raise OSError("no route to host\nand more")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(
        InputError, match=r"openai/clip-vit-base-patch32 from Hugging Face \(no route to host\)"
    ) as caught:
        Weights("vitb32").pretrained()
    assert "\n" not in str(caught.value)


def test_hub_files_are_asked_for_by_their_published_names(monkeypatch, tmp_path):
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    asked = []

    def download(repo, name):
        asked.append((repo, name))
        if name == "model.safetensors":
            raise EntryNotFoundError("404")
        return tmp_path / name

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    weights, (cars,) = Weights("vitl14"), select_tasks("clip8", ["cars"])
    with pytest.raises(InputError, match="no checkpoint at"):
        weights.expert(cars)
    assert asked == [
        ("tanganke/clip-vit-large-patch14_stanford-cars", name) for name in ("model.safetensors", "pytorch_model.bin")
    ]
