"""Checkpoints are found in every known layout, and missing or wrong ones are named."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
import transformers
from safetensors.torch import load_file

from probsurgery.pipeline import hub
from probsurgery.pipeline.datasets.suites import select_tasks
from probsurgery.pipeline.errors import InputError
from probsurgery.pipeline.models import architectures
from probsurgery.pipeline.models.checkpoints import digest
from probsurgery.pipeline.models.encoders import get_encoder
from probsurgery.pipeline.models.sources import Weights
from probsurgery.pipeline.models.text_classifiers import load_classifiers
from support import TINY, hugging_face_config, pickled_like_task_vectors, tiny_clip, to_visual

CPU = torch.device("cpu")
(EUROSAT, SVHN) = select_tasks("clip8", ["eurosat", "svhn"])


@pytest.fixture(scope="module")
def clip():
    return tiny_clip()


@pytest.fixture(scope="module")
def expert():
    torch.manual_seed(1)
    return transformers.CLIPVisionModel(hugging_face_config())


def expert_state(clip, expert):
    return to_visual(expert.state_dict(), to_visual(clip.state_dict())["proj"])


@pytest.mark.parametrize(
    ("pretrained", "expert_folder"),
    [
        ("pretrained", "eurosat"),
        ("clip-tiny", "clip-tiny_eurosat"),
        ("someone/clip-tiny", "someone/clip-tiny_eurosat"),
        (
            "models--someone--clip-tiny/snapshots/0123abc",
            "models--someone--clip-tiny_eurosat/snapshots/0123abc",
        ),
    ],
)
def test_hugging_face_folders_are_found_by_any_name(tmp_path, tiny, clip, expert, pretrained, expert_folder):
    for model, folder in ((clip, pretrained), (expert, expert_folder)):
        model.save_pretrained(tmp_path / folder)
        if "snapshots" in folder:
            refs = tmp_path / folder / ".." / ".." / "refs"
            refs.mkdir()
            (refs / "main").write_text("0123abc")
    weights = Weights("tiny", tmp_path)
    assert digest(weights.pretrained()) == digest(to_visual(clip.state_dict()))
    assert digest(weights.expert(EUROSAT)) == digest(expert_state(clip, expert))
    assert weights.files["eurosat"].source == f"{expert_folder}/model.safetensors"


@pytest.mark.parametrize("inner", ["", "ViT-T"])
@pytest.mark.parametrize("plain", [True, False])
def test_the_task_vectors_layout_is_read_whole(tmp_path, tiny, clip, expert, inner, plain, monkeypatch):
    folder, state = tmp_path / inner, expert_state(clip, expert)
    head = torch.randn(10, get_encoder("tiny").dim)
    pickled_like_task_vectors(folder / "zeroshot.pt", to_visual(clip.state_dict()), plain=plain)
    pickled_like_task_vectors(folder / "EuroSAT" / "finetuned.pt", state, plain=plain)
    pickled_like_task_vectors(folder / "head_EuroSAT.pt", head, plain=plain)
    weights = Weights("tiny", tmp_path)
    assert digest(weights.pretrained()) == digest(to_visual(clip.state_dict()))
    assert digest(weights.expert(EUROSAT)) == digest(state)
    assert torch.equal(load_classifiers(weights, [EUROSAT], CPU)["eurosat"].weight, head)
    assert weights.files["classifier eurosat"].source.endswith("head_EuroSAT.pt")
    monkeypatch.setitem(architectures.ARCHS, "tiny", replace(TINY, pretrained_repo=None))
    weights = Weights("tiny", tmp_path)
    with pytest.raises(InputError, match=r"no text tower .* of svhn .* classifiers.safetensors or head_SVHN.pt"):
        load_classifiers(weights, [EUROSAT, SVHN], CPU)


def test_a_missing_expert_is_named_with_the_names_that_were_tried(tmp_path):
    (tmp_path / "SUN397").mkdir()
    with pytest.raises(
        InputError, match=r"no checkpoint of 'eurosat'.*EuroSAT/finetuned\.pt.*also in ViT-B-32/"
    ) as caught:
        Weights("vitb32", tmp_path).expert(EUROSAT)
    assert "clip-vit-base-patch32_eurosat" in str(caught.value)
    assert "holds: SUN397" in str(caught.value)


def test_a_checkpoint_of_another_architecture_is_described(tmp_path, clip):
    clip.save_pretrained(tmp_path / "pretrained")
    with pytest.raises(
        InputError, match=r"it is not a checkpoint of vitb32; it looks like a CLIP ViT of width \d+, patch"
    ):
        Weights("vitb32", tmp_path).pretrained()


def test_the_activation_in_transformers_config_is_checked(tmp_path, tiny, clip):
    clip.save_pretrained(tmp_path / "pretrained")
    Weights("tiny", tmp_path).pretrained()
    path = tmp_path / "pretrained" / "config.json"
    config = json.loads(path.read_text())
    config["vision_config"]["hidden_act"] = "gelu"
    path.write_text(json.dumps(config))
    with pytest.raises(InputError, match="was trained with gelu, which tiny does not have"):
        Weights("tiny", tmp_path).pretrained()


def test_a_file_that_differs_from_the_hubs_digest_is_refused(tmp_path, tiny, clip):
    """The client names a file in its cache by its digest, and writes the digest next to a file in a local folder."""
    clip.save_pretrained(tmp_path / "plain")
    file = tmp_path / "plain" / "model.safetensors"
    sha256 = hub.checked_digest(file).sha256
    blobs, snapshot = tmp_path / "m" / "blobs", tmp_path / "m" / "snapshots" / "1"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    notes = tmp_path / "local" / ".cache" / "huggingface" / "download"
    notes.mkdir(parents=True)
    for known in (sha256, hub._git_digest(file)):
        shutil.copy(file, blobs / known)
        (snapshot / "model.safetensors").unlink(missing_ok=True)
        (snapshot / "model.safetensors").symlink_to(blobs / known)
        shutil.copy(file, tmp_path / "local" / "model.safetensors")
        (notes / "model.safetensors.metadata").write_text(f"commit\n{known}\n1700000000.0\n")
        for path in (snapshot / "model.safetensors", tmp_path / "local" / "model.safetensors"):
            assert hub.checked_digest(path).hub_digest == "agrees"
            changed = bytearray(path.read_bytes())
            changed[-5] ^= 1
            path.resolve().write_bytes(changed)
            load_file(path)  # the format does not detect a flipped byte of a weight
            with pytest.raises(InputError, match="is damaged: its digest is"):
                hub.checked_digest(path)
    assert hub.checked_digest(file).hub_digest == "unknown"


def test_architectures_without_published_experts_need_a_folder():
    with pytest.raises(InputError, match="no experts of ViT-B-32-quickgelu are published; give --checkpoints FOLDER"):
        Weights("ViT-B-32-quickgelu")
