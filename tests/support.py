"""What several tests make or check: synthetic caches, and the one line of an error."""

from __future__ import annotations

import contextlib
import json
import pickle
import re
import sys
import types
from pathlib import Path

import numpy as np
import tokenizers
import torch
import transformers
from msgspec.structs import replace
from PIL import Image

from probsurgery.pipeline.files import write_json
from probsurgery.pipeline.fingerprints import fingerprint
from probsurgery.pipeline.models.architectures import Arch
from probsurgery.pipeline.models.checkpoints import VisualState
from probsurgery.pipeline.models.encoders import get_encoder
from probsurgery.pipeline.store import arrays as arrays_module
from probsurgery.pipeline.store.arrays import ArraySpec
from probsurgery.pipeline.store.lock import locked
from probsurgery.pipeline.store.maintenance import check
from probsurgery.pipeline.store.manifest import Identity, MergeIdentity, SplitRecord, TaskRecord
from probsurgery.pipeline.store.writer import CacheWriter

DIM = 16
TINY = Arch("ViT-T-quickgelu", "someone/clip-tiny", "someone/clip-tiny_{}", config=Path(__file__).parent / "tiny.json")


def to_visual(checkpoint, projection=None):
    """All tensors of open_clip's visual tower, from any published layout."""
    return dict(VisualState(checkpoint, None if projection is None else lambda: projection))


@contextlib.contextmanager
def opened(path, identity, store, *, fresh=False):
    """A cache opened for writing, as stage one does it."""
    with locked(path):
        yield CacheWriter.begin(path, identity, store, fresh=fresh)


def edit_manifest(path, change):
    """Change a manifest's JSON, and give it the digest that is right: whoever makes a cache can do that."""
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["digest"]
    change(manifest)
    write_json(path / "manifest.json", manifest | {"digest": fingerprint(manifest)})


def drop_seal(path, array, number):
    """Make a manifest forget a shard."""
    edit_manifest(path, lambda m: m["arrays"][array]["shards"].__setitem__(number, None))


def damage(cache):
    """What `cache verify` finds."""
    return [problem for one in check(cache) for problem in one.problems]


def identity(tasks, dim=DIM, dtype="float32", **other):
    return Identity(
        **{
            "arch": "mini",
            "suite": "mini",
            "dim": dim,
            "dtype": dtype,
            "precision": "fp32",
            "limit": None,
            "tasks": tuple(tasks),
            "checkpoints": {},
            "merge": MergeIdentity("ta", {"scale": 0.3}, digest="0"),
            "preprocessing": {},
        }
        | other
    )


def specs(arrays):
    """What is declared of arrays of values."""
    return {name: ArraySpec(values.shape, str(values.dtype)) for name, values in arrays.items()}


def synthetic(rows, dim=DIM, classes=3, seed=0):
    """Features of one task: experts' cluster by class, merged ones are rotated and shifted from them."""
    generator = np.random.default_rng(seed)
    classifier = generator.normal(size=(classes, dim)).astype("float32")
    labels = generator.integers(0, classes, rows)
    expert = classifier[labels] + generator.normal(size=(rows, dim)).astype("float32")
    drift = np.eye(dim) + generator.normal(size=(dim, dim)) * 0.3
    merged = (expert @ drift + 2 * generator.normal(size=dim)).astype("float32")
    pretrained = generator.normal(size=(rows, dim)).astype("float32")
    return {
        "merged": merged,
        "expert": expert.astype("float32"),
        "pretrained": pretrained,
        "labels": labels.astype("int64"),
        "classifier": classifier,
    }


def write_cache(
    path,
    sizes,
    store="zarr",
    dtype="float32",
    splits=("test",),
    change=lambda task, arrays: arrays,
    merged=None,
    dim=DIM,
):
    """A cache of synthetic features; `sizes` gives each task's rows, `change` may edit a task's arrays."""
    with opened(path, identity(merged or sizes, dim, dtype), store) as writer:
        writer.request([f"{split}/{task}" for split in splits for task in sizes])
        for seed, (task, rows) in enumerate(sizes.items()):
            for split in splits:
                arrays = change(task, synthetic(rows, dim, seed=seed + 100 * (split == "train")))
                own = {
                    f"classifiers/{task}": arrays.pop("classifier", None),
                    f"biases/{task}": arrays.pop("bias", None),
                }
                own = {name: values for name, values in own.items() if values is not None}
                normalise = arrays.pop("normalise", True)
                named = {f"{split}/{task}/{kind}": a for kind, a in arrays.items()}
                named = {n: a if n.endswith("labels") else a.astype(dtype) for n, a in named.items()}
                writer.declare(specs(named) | specs(own))
                for name, values in own.items():
                    writer.write(0, {name: values})
                for number in range(arrays_module.shard_count(rows)):
                    window = arrays_module.shard_rows(number, rows)
                    writer.write(number, {n: a[window.start : window.stop] for n, a in named.items()})
                tasks = dict(writer.manifest.tasks)
                digest = "0" if f"classifiers/{task}" in own else ""
                record = tasks.get(task) or TaskRecord(classes=3, classifier=digest, normalise=normalise, splits={})
                images = SplitRecord(rows, "0", labels="labels" in arrays)
                tasks[task] = replace(record, splits={**record.splits, split: images})
                writer.update(tasks=tasks)
    return path


def refused(result, *words, status=2):
    """Check that a command said one line of error with these words, and nothing else."""
    code, out, err = result
    err = re.sub(r"^(?!error: ).*[\d,]+ of [\d,]+ [a-z]+.*\n", "", err)  # progress, on a slow machine
    assert code == status, err
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1, err
    for word in words:
        assert str(word) in err
    return err


def hugging_face_config(hidden_act="quick_gelu", arch="mini"):
    """An architecture as transformers describes it."""
    config, vision = get_encoder(arch).config, get_encoder(arch).config["vision_cfg"]
    return transformers.CLIPVisionConfig(
        hidden_size=vision["width"],
        intermediate_size=int(vision["width"] * vision.get("mlp_ratio", 4)),
        projection_dim=config["embed_dim"],
        num_hidden_layers=vision["layers"],
        num_attention_heads=vision["width"] // vision.get("head_width", 64),
        image_size=vision["image_size"],
        patch_size=vision["patch_size"],
        hidden_act=hidden_act,
    )


def hub_data_set(folder, labels, classes=10, columns=("image", "label"), split="test", names=None):
    """A parquet data set as the hub serves it: image and label columns, and class names."""
    import datasets

    features = datasets.Features(
        {columns[0]: datasets.Image(), columns[1]: datasets.ClassLabel(names=names or [str(i) for i in range(classes)])}
    )
    shades = [Image.new("RGB", (8, 8), (10 * i % 256, 0, 7 * i % 256)) for i in range(len(labels))]
    table = datasets.Dataset.from_dict({columns[0]: shades, columns[1]: labels}, features=features)
    folder.mkdir(parents=True, exist_ok=True)
    table.to_parquet(folder / f"{split}-00000-of-00001.parquet")


def idx(values):
    """An array of bytes as MNIST's files have it."""
    return bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">u4").tobytes() + values.tobytes()


def parquet(folder, images, labels, split="test"):
    """A parquet file as pandas writes it, without the hub's metadata."""
    import pandas as pd

    folder.mkdir(parents=True, exist_ok=True)
    pd.DataFrame({"image": images, "label": labels}).to_parquet(folder / f"{split}-00000-of-00001.parquet")


def tiny_clip():
    """A whole CLIP of `TINY`'s sizes by transformers, text tower included, far enough from zero for GELUs to differ."""
    torch.manual_seed(0)
    text = json.loads(TINY.config.read_text())["text_cfg"]
    config = transformers.CLIPTextConfig(
        hidden_size=text["width"],
        intermediate_size=4 * text["width"],
        projection_dim=get_encoder("mini").dim,
        num_hidden_layers=text["layers"],
        num_attention_heads=text["heads"],
        max_position_embeddings=text["context_length"],
        vocab_size=text["vocab_size"],
        hidden_act="quick_gelu",
        eos_token_id=text["vocab_size"] - 1,
    )
    model = transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config=config.to_dict(),
            vision_config=hugging_face_config().to_dict(),
            projection_dim=get_encoder("mini").dim,
        )
    ).eval()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def write_tokenizer(folder):
    """Of words, in the folder of a model with 64 tokens."""
    names = ("<pad>", "<unk>", "a", "photo", "of", "the", "cat", "dog", "grey")
    words = {name: number for number, name in enumerate(names)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words | {"<end>": 63}, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.post_processor = tokenizers.processors.TemplateProcessing(single="$A <end>", special_tokens=[("<end>", 63)])
    special = {"unk_token": "<unk>", "eos_token": "<end>", "pad_token": "<pad>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, **special).save_pretrained(folder)


def pickled_like_task_vectors(path, weights, *, plain=False, legacy=False):
    """A whole pickled object of classes that are gone when it is read: an image encoder, or, of a tensor, a head."""
    names = ("src", "src.modeling", "old_clip", "old_clip.model")
    modules = {name: types.ModuleType(name) for name in names}

    def look_alike(module, name, base=torch.nn.Module):
        cls = type(name, (base,), {"__module__": module, "__qualname__": name})
        setattr(modules[module], name, cls)
        return cls

    image_encoder = look_alike("src.modeling", "ImageEncoder")
    head = look_alike("src.modeling", "ClassificationHead", torch.nn.Linear)
    clip = look_alike("old_clip.model", "CLIP")
    part = look_alike("old_clip.model", "VisualTransformer")
    if isinstance(weights, torch.Tensor):
        made = head(weights.shape[1], weights.shape[0])
        made.normalize = True
        made.weight = torch.nn.Parameter(weights.clone())
        made.bias = torch.nn.Parameter(torch.zeros(len(weights)))
    else:
        made = image_encoder()
        made.model = clip()
        made.model.visual = part()
        for name, tensor in weights.items():
            module = made.model.visual
            for step in name.split(".")[:-1]:
                if not hasattr(module, step):
                    module.add_module(step, part())
                module = getattr(module, step)
            module.register_parameter(name.split(".")[-1], torch.nn.Parameter(tensor.clone()))
        made.model.register_buffer("attn_mask", torch.zeros(3, 3), persistent=False)
        made.model.logit_scale = torch.nn.Parameter(torch.tensor(4.6))
        from torchvision import transforms

        made.val_preprocess = transforms.Compose([transforms.Resize(224, interpolation=3), transforms.ToTensor()])
        made.cache_dir = None
    path.parent.mkdir(parents=True, exist_ok=True)
    sys.modules |= modules
    try:
        if plain:
            path.write_bytes(pickle.dumps(made, protocol=pickle.HIGHEST_PROTOCOL))
        else:
            torch.save(made, path, _use_new_zipfile_serialization=not legacy)
    finally:
        for name in names:
            del sys.modules[name]
