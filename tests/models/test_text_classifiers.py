"""Zero-shot classifiers: from a folder of checkpoints, or from the text tower and then from the user's cache."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from probsurgery.pipeline.datasets.suites import select_tasks
from probsurgery.pipeline.datasets.tasks import Task
from probsurgery.pipeline.errors import InputError
from probsurgery.pipeline.models import text_classifiers
from probsurgery.pipeline.models.checkpoints import to_classifier, to_text
from probsurgery.pipeline.models.encoders import get_encoder
from probsurgery.pipeline.models.sources import Weights
from probsurgery.pipeline.models.text_classifiers import build_classifiers, load_classifiers
from support import tiny_clip

CPU = torch.device("cpu")
(EUROSAT, SVHN) = select_tasks("clip8", ["eurosat", "svhn"])


@pytest.fixture(scope="module")
def clip():
    return tiny_clip()


@torch.no_grad()
def test_classifiers_average_normalised_prompts_and_include_the_scale(tiny, clip):
    """Against transformers' own text tower, with open_clip's tokens."""
    import open_clip

    task = Task("t", ("cat", "dog"), templates=("a {}.", "the {}!", "{}"))
    classifier = build_classifiers(get_encoder("tiny"), to_text(clip.state_dict()), [task], torch.device("cpu"))["t"]
    tokenizer = open_clip.get_tokenizer("ViT-B-32-quickgelu")
    for row, name in zip(classifier, task.class_names, strict=True):
        tokens = tokenizer([template.format(name) for template in task.templates])[:, :77]
        prompts = clip.get_text_features(input_ids=tokens)
        prompts = getattr(prompts, "pooler_output", prompts)
        mean = torch.nn.functional.normalize(prompts, dim=-1).mean(0)
        assert torch.allclose(row, clip.logit_scale.exp() * mean / mean.norm(), atol=1e-4)


def test_heads_that_are_not_classifiers_are_refused(tmp_path, tiny, clip):
    clip.save_pretrained(tmp_path / "pretrained")
    dim = get_encoder("tiny").dim
    path = tmp_path / "head_EuroSAT.pt"
    for value, words in [
        ({"weight": torch.ones(10, dim), "bias": torch.ones(9)}, r"bias is of shape \(C,\) = \(10,\), not .*\(9,\)"),
        ({"weight": torch.zeros(9, dim)}, rf"has shape \(9, {dim}\), not \(C, d\) = \(10, {dim}\)"),
        ({"conv1.weight": torch.zeros(3)}, "a classifier's weight is of shape"),
    ]:
        torch.save(value, path)
        with pytest.raises(InputError, match=words) as caught:
            load_classifiers(Weights("tiny", tmp_path), [EUROSAT], CPU)
        assert "head_EuroSAT.pt" in str(caught.value)
    torch.save({"weight": torch.ones(10, dim), "bias": torch.full((10,), torch.nan)}, path)
    with pytest.raises(InputError, match="the classifier of 'eurosat' in .* has rows that are NaN"):
        load_classifiers(Weights("tiny", tmp_path), [EUROSAT], CPU)


@pytest.mark.parametrize("name", ["head_EuroSAT.pt", "classifiers.safetensors"])
def test_a_bias_is_read(tmp_path, tiny, clip, name):
    clip.save_pretrained(tmp_path / "pretrained")
    weight, bias = torch.ones(10, get_encoder("tiny").dim), torch.arange(10.0)
    if name.endswith(".pt"):
        torch.save({"weight": weight, "bias": bias}, tmp_path / name)
    else:
        save_file({"eurosat": weight, "eurosat.bias": bias}, tmp_path / name)
    classifier = load_classifiers(Weights("tiny", tmp_path), [EUROSAT], CPU)["eurosat"]
    assert torch.equal(classifier.bias, bias)
    assert classifier.normalise


def test_classifiers_are_built_from_the_pretrained_text_tower_once(tmp_path, tiny, clip, monkeypatch):
    clip.save_pretrained(tmp_path / "pretrained")
    expected = build_classifiers(get_encoder("tiny"), to_text(clip.state_dict()), [EUROSAT, SVHN], CPU)
    first = load_classifiers(Weights("tiny", tmp_path), [EUROSAT, SVHN], CPU)
    assert all(torch.equal(first[name].weight, expected[name]) for name in expected)
    built = []
    monkeypatch.setattr(
        text_classifiers,
        "build_classifiers",
        lambda a, t, tasks, d: built.append(tasks) or build_classifiers(a, t, tasks, d),
    )
    again = load_classifiers(Weights("tiny", tmp_path), [EUROSAT, SVHN], CPU)
    assert built == []
    assert all(torch.equal(again[name].weight, expected[name]) for name in expected)
    files = sorted((text_classifiers.user_cache() / "classifiers").iterdir())
    assert len(files) == 2
    files[0].write_bytes(b"torn")
    files[1].unlink()
    assert torch.equal(load_classifiers(Weights("tiny", tmp_path), [SVHN], CPU)["svhn"].weight, expected["svhn"])
    assert len(built) == 1


def test_classifiers_are_built_even_if_the_users_cache_is_not_writable(tmp_path, tiny, clip, monkeypatch):
    clip.save_pretrained(tmp_path / "pretrained")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert load_classifiers(Weights("tiny", tmp_path), [SVHN], CPU)["svhn"].weight.shape[0] == 10


def test_classifiers_are_built_for_a_user_without_a_home(tmp_path, tiny, clip, monkeypatch):
    """As of `docker run --user 12345`: neither HOME nor an entry among the system's users."""

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    clip.save_pretrained(tmp_path / "pretrained")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", no_home)
    assert load_classifiers(Weights("tiny", tmp_path), [SVHN], CPU)["svhn"].weight.shape[0] == 10


def test_classifiers_come_from_the_folder_if_it_has_them(tmp_path):
    tasks = select_tasks("mini", ["mnist"])
    dim = get_encoder("mini").dim
    with pytest.raises(InputError, match="no folder of checkpoints"):
        Weights("mini", tmp_path / "nothing")
    for tensors, words in [
        ({"other": torch.zeros(10, dim)}, "holds no classifier of 'mnist'"),
        ({"mnist": torch.full((10, dim), torch.nan)}, "the classifier of 'mnist' in .* rows that are NaN"),
        ({"mnist": torch.zeros(10, dim)}, "the classifier of 'mnist' in .* or zero, the first is '0''s"),
        ({"mnist": torch.zeros(9, dim)}, r"has shape \(9, 64\), not \(C, d\) = \(10, 64\)"),
    ]:
        save_file(tensors, tmp_path / "classifiers.safetensors")
        with pytest.raises(InputError, match=words):
            load_classifiers(Weights("mini", tmp_path), tasks, CPU)
    save_file({"mnist": torch.ones(10, dim).half()}, tmp_path / "classifiers.safetensors")
    assert load_classifiers(Weights("mini", tmp_path), tasks, CPU)["mnist"].weight.dtype == torch.float32


@pytest.mark.parametrize("prefix", ["", "fc.", "module.fc.", "0."])
def test_a_linear_layer_may_be_called_anything(tmp_path, prefix):
    state = {f"{prefix}weight": torch.ones(3, 4), f"{prefix}bias": torch.ones(3)}
    assert torch.equal(to_classifier(state, tmp_path).weight, torch.ones(3, 4))
    beside = {"vit.encoder.weight": torch.ones(4, 4), "classifier.weight": torch.ones(2, 4), "vit.x": torch.ones(1)}
    assert to_classifier(beside, tmp_path).weight.shape == (2, 4)
