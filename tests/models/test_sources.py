"""Where checkpoints and classifiers are found, in every layout that people have, and what is said if they are not."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from probsurgery.pipeline import hub
from probsurgery.pipeline.datasets.tasks import select_tasks
from probsurgery.pipeline.errors import InputError
from probsurgery.pipeline.models import architectures, text_classifiers
from probsurgery.pipeline.models.architectures import model_config
from probsurgery.pipeline.models.checkpoints import digest, to_text, to_visual
from probsurgery.pipeline.models.sources import Weights
from probsurgery.pipeline.models.text_classifiers import build_classifiers, load_classifiers
from support import TINY, hugging_face_config, pickled_like_task_vectors, tiny_clip

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
    ("pretrained", "its"),
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
def test_hugging_face_folders_are_found_by_any_name(tmp_path, tiny, clip, expert, pretrained, its):
    for model, folder in ((clip, pretrained), (expert, its)):
        model.save_pretrained(tmp_path / folder)
        if "snapshots" in folder:
            refs = tmp_path / folder / ".." / ".." / "refs"
            refs.mkdir()
            (refs / "main").write_text("0123abc")
    found = Weights("tiny", tmp_path)
    assert digest(found.pretrained()) == digest(to_visual(clip.state_dict()))
    assert digest(found.expert(EUROSAT)) == digest(expert_state(clip, expert))
    assert found.files["eurosat"].source == f"{its}/model.safetensors"


@pytest.mark.parametrize("inner", ["", "ViT-T"])
@pytest.mark.parametrize("plain", [True, False])
def test_the_task_vectors_layout_is_read_whole(tmp_path, tiny, clip, expert, inner, plain, monkeypatch):
    folder, state = tmp_path / inner, expert_state(clip, expert)
    head = torch.randn(10, model_config("tiny")["embed_dim"])
    pickled_like_task_vectors(folder / "zeroshot.pt", to_visual(clip.state_dict()), plain=plain)
    pickled_like_task_vectors(folder / "EuroSAT" / "finetuned.pt", state, plain=plain)
    pickled_like_task_vectors(folder / "head_EuroSAT.pt", head, plain=plain)
    found = Weights("tiny", tmp_path)
    assert digest(found.pretrained()) == digest(to_visual(clip.state_dict()))
    assert digest(found.expert(EUROSAT)) == digest(state)
    assert torch.equal(load_classifiers(found, [EUROSAT], CPU)["eurosat"], head)
    assert found.files["classifier eurosat"].source.endswith("head_EuroSAT.pt")
    monkeypatch.setitem(architectures.ARCHS, "tiny", replace(TINY, pretrained_repo=None))
    found = Weights("tiny", tmp_path)
    with pytest.raises(
        InputError, match=r"no text tower, and .* holds neither classifiers.safetensors nor head_SVHN.pt"
    ):
        load_classifiers(found, [EUROSAT, SVHN], CPU)


def test_heads_that_are_no_classifiers_are_refused(tmp_path, tiny, clip):
    clip.save_pretrained(tmp_path / "pretrained")
    dim = model_config("tiny")["embed_dim"]
    path = tmp_path / "head_EuroSAT.pt"
    for value, words in [
        ({"weight": torch.zeros(10, dim), "bias": torch.ones(10)}, "the bias of .* is not zero"),
        ({"weight": torch.zeros(9, dim)}, rf"has shape \(9, {dim}\), not \(C, d\) = \(10, {dim}\)"),
        ({"conv1.weight": torch.zeros(3)}, "is not a classification head; it looks like tensors named 'conv1.weight'"),
    ]:
        torch.save(value, path)
        with pytest.raises(InputError, match=words) as caught:
            load_classifiers(Weights("tiny", tmp_path), [EUROSAT], CPU)
        assert "head_EuroSAT.pt" in str(caught.value)


def test_classifiers_are_made_from_the_pretrained_text_tower_once(tmp_path, tiny, clip, monkeypatch):
    clip.save_pretrained(tmp_path / "pretrained")
    expected = build_classifiers("tiny", to_text(clip.state_dict()), [EUROSAT, SVHN], CPU)
    first = load_classifiers(Weights("tiny", tmp_path), [EUROSAT, SVHN], CPU)
    assert all(torch.equal(first[name], expected[name]) for name in expected)
    built = []
    monkeypatch.setattr(
        text_classifiers,
        "build_classifiers",
        lambda a, t, tasks, d: built.append(tasks) or build_classifiers(a, t, tasks, d),
    )
    again = load_classifiers(Weights("tiny", tmp_path), [EUROSAT, SVHN], CPU)
    assert built == []
    assert all(torch.equal(again[name], expected[name]) for name in expected)
    files = sorted((text_classifiers.user_cache() / "classifiers").iterdir())
    assert len(files) == 2
    files[0].write_bytes(b"torn")
    files[1].unlink()
    assert torch.equal(load_classifiers(Weights("tiny", tmp_path), [SVHN], CPU)["svhn"], expected["svhn"])
    assert len(built) == 1


def test_a_home_that_cannot_be_written_costs_no_classifier(tmp_path, tiny, clip, monkeypatch):
    clip.save_pretrained(tmp_path / "pretrained")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert load_classifiers(Weights("tiny", tmp_path), [SVHN], CPU)["svhn"].shape[0] == 10


def test_classifiers_come_from_the_folder_if_it_has_them(tmp_path):
    tasks = select_tasks("mini", ["mnist"])
    dim = model_config("mini")["embed_dim"]
    with pytest.raises(InputError, match="no folder of checkpoints"):
        Weights("mini", tmp_path / "nothing")
    for held, words in [
        ({"other": torch.zeros(10, dim)}, "holds no classifier of 'mnist'"),
        ({"mnist": torch.full((10, dim), torch.nan)}, "the classifier of 'mnist' in .* holds NaN"),
        ({"mnist": torch.zeros(9, dim)}, r"has shape \(9, 64\), not \(C, d\) = \(10, 64\)"),
    ]:
        save_file(held, tmp_path / "classifiers.safetensors")
        with pytest.raises(InputError, match=words):
            load_classifiers(Weights("mini", tmp_path), tasks, CPU)
    save_file({"mnist": torch.ones(10, dim).half()}, tmp_path / "classifiers.safetensors")
    assert load_classifiers(Weights("mini", tmp_path), tasks, CPU)["mnist"].dtype == torch.float32


def test_a_missing_expert_is_named_with_where_it_was_looked_for(tmp_path):
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


def test_the_activation_that_transformers_notes_is_checked(tmp_path, tiny, clip):
    clip.save_pretrained(tmp_path / "pretrained")
    Weights("tiny", tmp_path).pretrained()
    path = tmp_path / "pretrained" / "config.json"
    config = json.loads(path.read_text())
    config["vision_config"]["hidden_act"] = "gelu"
    path.write_text(json.dumps(config))
    with pytest.raises(InputError, match="was trained with gelu, which tiny does not have"):
        Weights("tiny", tmp_path).pretrained()


def test_a_file_that_differs_from_the_hubs_digest_is_refused(tmp_path, tiny, clip):
    """The client names a file in its cache by its digest, and notes it beside a file in a local folder."""
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
            load_file(path)  # a flipped byte of a weight is no error of the format
            with pytest.raises(InputError, match="is damaged: its digest is"):
                hub.checked_digest(path)
    assert hub.checked_digest(file).hub_digest == "unknown"


def test_architectures_without_published_experts_need_a_folder():
    with pytest.raises(InputError, match="no experts of ViT-B-32-quickgelu are published; give --checkpoints FOLDER"):
        Weights("ViT-B-32-quickgelu")
