"""The papers' tasks with the real clients of the Hub, against a hub server on this machine."""

import errno
import hashlib
import json
import os
import subprocess
import sys

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import processes
from local_hub import LocalHub
from probsurgery.pipeline.datasets.suites import select_tasks
from probsurgery.pipeline.datasets.tasks import open_images
from probsurgery.pipeline.errors import InputError
from probsurgery.pipeline.hub import explain
from probsurgery.pipeline.models.encoders import get_encoder
from probsurgery.pipeline.store.cache import Cache
from support import hub_data_set, hugging_face_config, tiny_clip, to_visual, write_tokenizer

TASKS = ("eurosat", "svhn", "mnist")
DATA = {"eurosat": "tanganke/eurosat", "svhn": "ufldl-stanford/svhn", "mnist": "ylecun/mnist"}
# The command with one more architecture: the published ones are too large for tests.
COMMAND = """
from probsurgery.pipeline.models import architectures
from support import TINY
architectures.ARCHS["tiny"] = TINY
from probsurgery.cli import main
main()
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    root = tmp_path_factory.mktemp("hub")
    tiny_clip().save_pretrained(root / "models/someone/clip-tiny")
    for seed, task in enumerate(TASKS):
        torch.manual_seed(seed)
        transformers.CLIPVisionModel(hugging_face_config()).save_pretrained(root / f"models/someone/clip-tiny_{task}")
        folder = root / "datasets" / DATA[task]
        for split, rows in (("test", 40), ("train", 20)):
            inner = "cropped_digits" if task == "svhn" else "data"
            hub_data_set(folder / inner, [i % 10 for i in range(rows)], split=split)
        if task == "svhn":
            (folder / "README.md").write_text(
                "---\nconfigs:\n- config_name: cropped_digits\n  data_files:\n"
                "  - split: train\n    path: cropped_digits/train-*\n"
                "  - split: test\n    path: cropped_digits/test-*\n"
                "- config_name: full_numbers\n  data_files: full_numbers/*\n---\n"
            )
    with LocalHub(root) as hub:
        yield hub


@pytest.fixture
def environment(hub, tmp_path, monkeypatch):
    """An empty home, from which this hub can be reached only."""
    for name in [name for name in os.environ if name.startswith("HF_")]:
        monkeypatch.delenv(name)
    return hub.environment(tmp_path / "home") | {"XDG_CACHE_HOME": str(tmp_path / "xdg")}


@pytest.fixture
def command(environment, tmp_path):
    def call(*arguments, **more):
        return processes.python(COMMAND, *arguments, cwd=tmp_path, environment=environment | more)

    return call


EXTRACT = ("extract", "--arch", "tiny", "--tasks", ",".join(TASKS), "--any-rows", "--device", "cpu")


def test_extract_fit_and_report_from_the_hub_and_then_without_it(hub, command, environment, tmp_path):
    arguments = [*EXTRACT, "--split", "both", "--workers", "2"]
    variables = os.environ | environment | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(  # a new interpreter, as users have it; the others are forked
        [sys.executable, "-c", COMMAND, *arguments], cwd=tmp_path, env=variables, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    path = tmp_path / "cache" / "tiny_ta_eurosat+svhn+mnist"
    cache = Cache(path)
    assert cache.rows("svhn") == 40
    assert cache.rows("svhn", "train") == 20
    assert cache.labels("mnist").tolist() == [i % 10 for i in range(40)]
    files = cache.manifest.files
    assert {name: files[name].source for name in ("pretrained", "svhn")} == {
        "pretrained": "someone/clip-tiny",
        "svhn": "someone/clip-tiny_svhn",
    }
    assert all(files[name].hub_digest == "agrees" for name in ("pretrained", *TASKS))
    assert files["classifier svhn"].source == "text tower"
    assert cache.manifest.tasks["svhn"].origins["test"].class_order == "checked"
    for arguments in (("fit", "--steps", "30"), ("report",)):
        done = command(*arguments, "--cache", path)
        assert done.returncode == 0, done.stderr
    assert "eurosat" in done.stdout

    requests = len(hub.requests)
    offline = command(*EXTRACT, "--out", tmp_path / "again", HF_HUB_OFFLINE="1")
    assert offline.returncode == 0, offline.stderr
    assert len(hub.requests) == requests
    again = Cache(tmp_path / "again")
    assert torch.equal(again.features("svhn"), cache.features("svhn"))


def test_a_merge_learns_from_images_of_the_hub(hub, command, tmp_path):
    """The images of all merged tasks are used, although one task is extracted, from the train split."""
    brief = ("--merge-arg", "steps=2", "--merge-arg", "batch-size=4", "--merge-arg", "split=train")
    asked = ("--merge", "lw-adamerging++", "--merge", "regmean", "--merge-arg", "images=8", "--only", "svhn")
    done = command(*EXTRACT, *asked, *brief, "--workers", "2")
    assert done.returncode == 0, done.stderr
    caches = {Cache(path).identity.merge.method: Cache(path) for path in (tmp_path / "cache").iterdir()}
    assert caches.keys() == {"lw-adamerging++", "regmean"}
    for cache in caches.values():
        assert cache.manifest.merge.images.keys() == set(TASKS)
        assert cache.tasks() == ("svhn",)


def test_features_are_those_of_the_checkpoints_on_the_hub(hub, command, tmp_path):
    assert command(*EXTRACT, "--only", "mnist").returncode == 0
    expert = load_file(hub.root / "models/someone/clip-tiny_mnist/model.safetensors")
    projection = load_file(hub.root / "models/someone/clip-tiny/model.safetensors")["visual_projection.weight"].T
    (task,) = select_tasks("clip8", ["mnist"])
    hub_copy = tmp_path / "data"
    hub_copy.mkdir()
    (hub_copy / "mnist").symlink_to(hub.root / "datasets" / DATA["mnist"])
    images = open_images(task, "test", str(hub_copy), any_rows=True)
    batch = torch.stack([get_encoder("mini").preprocessing.transform(images.decode(row)) for row in range(40)])
    with torch.no_grad():
        expected = get_encoder("mini").build(to_visual(expert, projection))(batch)
    features = Cache(tmp_path / "cache" / "tiny_ta_eurosat+svhn+mnist").features("mnist", "expert")
    assert torch.allclose(features, expected, atol=1e-5)


def refused(done, *words):
    assert done.returncode == 2, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in errors[0], errors[0]


def test_what_cannot_be_fetched_is_named_with_what_to_do(hub, command, tmp_path):
    refused(
        command(*EXTRACT, HF_HUB_OFFLINE="1"),
        "the model someone/clip-tiny is not in",
        str(tmp_path / "home"),
        "because HF_HUB_OFFLINE is set",
        "hf download someone/clip-tiny --local-dir DIR/someone/clip-tiny` and give --checkpoints DIR",
    )
    hub.gated.add("someone/clip-tiny_mnist")
    refused(command(*EXTRACT), "the model someone/clip-tiny_mnist is gated", "hf auth login")
    hub.gated.clear()
    hidden = hub.root / "models/someone/hidden"
    (hub.root / "models/someone/clip-tiny_mnist").rename(hidden)
    refused(command(*EXTRACT), f"there is no model someone/clip-tiny_mnist at {hub.url}")
    hidden.rename(hub.root / "models/someone/clip-tiny_mnist")
    hub.gated.add(DATA["svhn"])
    refused(command(*EXTRACT), "the dataset ufldl-stanford/svhn is gated")
    hub.gated.clear()
    assert not (tmp_path / "cache").exists()


def test_a_full_disk_is_not_called_a_connection_problem():
    full = RuntimeError("failed")
    full.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    assert explain(full, "a/b", "--data", "dataset").startswith("no space left for the dataset a/b; free some in")


def test_an_interrupted_download_is_resumed(hub, command, tmp_path):
    file = hub.root / "models/someone/clip-tiny_mnist/model.safetensors"
    content = file.read_bytes()
    blobs = tmp_path / "home/hub/models--someone--clip-tiny_mnist/blobs"
    blobs.mkdir(parents=True)
    (blobs / f"{hashlib.sha256(content).hexdigest()}.incomplete").write_bytes(content[: len(content) // 2])
    assert command(*EXTRACT, "--only", "mnist").returncode == 0
    file = Cache(tmp_path / "cache" / "tiny_ta_eurosat+svhn+mnist").manifest.files["mnist"]
    assert file.hub_digest == "agrees"


def test_local_copies_of_the_hubs_repositories_need_no_network(hub, command, tmp_path):
    """Copies as made by `hf download --local-dir`, the command in the error messages."""
    (tmp_path / "models").symlink_to(hub.root / "models")
    (tmp_path / "datasets").symlink_to(hub.root / "datasets")
    done = command(*EXTRACT, "--checkpoints", tmp_path / "models", "--data", tmp_path / "datasets", HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "cache/tiny_ta_eurosat+svhn+mnist/manifest.json").read_text())
    assert manifest["files"]["svhn"]["source"] == "someone/clip-tiny_svhn/model.safetensors"
    with pytest.raises(InputError, match="has 40 images, and not 26,032 as its suite states; .*--any-rows"):
        open_images(select_tasks("clip8", ["svhn"])[0], "test", str(tmp_path / "datasets"))


def test_an_encoder_of_the_hub_brings_its_preprocessing_and_its_weights(hub, command, tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = transformers.ViTModel(transformers.ViTConfig(**sizes, image_size=16, patch_size=8))
    repo = hub.root / "models/someone/small-vit"
    for folder in (repo, tmp_path / "experts" / "mnist"):
        model.save_pretrained(folder)
    save_file({"mnist": torch.randn(10, 16)}, tmp_path / "experts" / "classifiers.safetensors")
    asked = ("extract", "--arch", "hf:someone/small-vit", "--checkpoints", tmp_path / "experts", "--suite", "mini")
    asked = (*asked, "--tasks", "mnist", "--limit", 8, "--device", "cpu", "--out", tmp_path / "c")
    refused(command(*asked), "someone/small-vit holds none of preprocessor_config.json, processor_config.json")
    processor = {"image_processor_type": "ViTImageProcessor", "size": {"height": 16, "width": 16}}
    (repo / "preprocessor_config.json").write_text(json.dumps(processor))
    done = command(*asked)
    assert done.returncode == 0, done.stderr
    cache = Cache(tmp_path / "c")
    assert cache.identity.arch == "small-vit"
    assert cache.manifest.files["pretrained"].source == "someone/small-vit"
    assert cache.manifest.files["pretrained"].hub_digest == "agrees"
    assert torch.equal(cache.features("mnist", "pretrained"), cache.features("mnist", "expert"))
    offline = command(*asked[:-1], tmp_path / "again", HF_HUB_OFFLINE="1")
    assert offline.returncode == 0, offline.stderr
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(hub.root / "models/someone/mnist-lora")
    suite = 'name = "own"\nencoder = "hf:someone/small-vit"\n[tasks.mnist]\ntest = "mini:mnist"\n'
    suite += f'expert = "hf:someone/mnist-lora"\nclassifier = "{tmp_path}/mnist.safetensors"\n'
    (tmp_path / "own.toml").write_text(suite)
    save_file({"weight": torch.randn(10, 16)}, tmp_path / "mnist.safetensors")
    lora = command("extract", "--suite", tmp_path / "own.toml", *asked[-6:-1], tmp_path / "lora")
    assert lora.returncode == 0, lora.stderr
    cache = Cache(tmp_path / "lora")
    assert cache.manifest.files["mnist"].source == "someone/mnist-lora"
    assert not torch.equal(cache.features("mnist", "pretrained"), cache.features("mnist", "expert"))
    refused(command("extract", "--arch", "hf:someone/none"), f"there is no model someone/none at {hub.url}")
    refused(command("extract", "--arch", "hf:someone"), "'hf:someone'", "hf:owner/name")


def test_a_clip_of_the_hub_makes_classifiers_with_its_own_tokenizer(hub, command, tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = sizes | {"vocab_size": 64, "max_position_embeddings": 8, "eos_token_id": 63}
    config = transformers.CLIPConfig(
        vision_config=sizes | {"image_size": 16, "patch_size": 8}, text_config=text, projection_dim=12
    )
    repo = hub.root / "models/someone/small-clip"
    transformers.CLIPModel(config).save_pretrained(repo)
    processor = {"image_processor_type": "CLIPImageProcessor", "size": 16, "crop_size": 16}
    (repo / "preprocessor_config.json").write_text(json.dumps(processor))
    (tmp_path / "numbers.toml").write_text(
        """name = "numbers"
        encoder = "hf:someone/small-clip"
        [tasks.mnist]
        test = "mini:mnist"
        expert = "hf:someone/small-clip"
        templates = ["a photo of the {}"]
        """
    )
    asked = ("extract", "--suite", tmp_path / "numbers.toml", "--limit", 8, "--device", "cpu", "--out", tmp_path / "c")
    refused(command(*asked), "has no tokenizer (tokenizer.json)", "name a file by `classifier` in the suite")
    write_tokenizer(repo)
    done = command(*asked)
    assert done.returncode == 0, done.stderr
    cache = Cache(tmp_path / "c")
    assert cache.manifest.files["classifier mnist"].source == "text tower"
    assert cache.classifier("mnist").shape == (10, 12)
