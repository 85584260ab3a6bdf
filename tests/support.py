"""What several tests make or check: synthetic caches, and the one line of an error."""

from __future__ import annotations

import contextlib

import numpy as np
import transformers
from PIL import Image

from probsurgery.pipeline.backends import SHARD_ROWS
from probsurgery.pipeline.encoders import model_config
from probsurgery.pipeline.store import CacheWriter, locked

DIM = 16


@contextlib.contextmanager
def opened(path, identity, store, *, fresh=False):
    """A cache opened for writing, as stage one does it."""
    with locked(path):
        yield CacheWriter.begin(path, identity, store, fresh=fresh)


def identity(tasks, dim=DIM, dtype="float32", **other):
    return {
        "arch": "mini",
        "suite": "mini",
        "dim": dim,
        "dtype": dtype,
        "precision": "fp32",
        "limit": None,
        "tasks": list(tasks),
        "checkpoints": {},
        "merge": {"method": "ta", "settings": {"scale": 0.3}, "digest": "0"},
        "preprocessing": {},
    } | other


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
    path, sizes, store="zarr", dtype="float32", splits=("test",), change=lambda task, arrays: arrays, merged=None
):
    """A cache of synthetic features; `sizes` gives each task's rows, `change` may edit a task's arrays."""
    with opened(path, identity(merged or sizes, dtype=dtype), store) as writer:
        writer.request([f"{split}/{task}" for split in splits for task in sizes])
        for seed, (task, rows) in enumerate(sizes.items()):
            for split in splits:
                arrays = change(task, synthetic(rows, seed=seed + 100 * (split == "train")))
                classifier = arrays.pop("classifier")
                named = {f"{split}/{task}/{kind}": a for kind, a in arrays.items()}
                named = {n: a if n.endswith("labels") else a.astype(dtype) for n, a in named.items()}
                writer.declare({n: {"shape": list(a.shape), "dtype": str(a.dtype)} for n, a in named.items()})
                writer.declare({f"classifiers/{task}": {"shape": list(classifier.shape), "dtype": "float32"}})
                writer.write(0, {f"classifiers/{task}": classifier})
                for part in range(-(-rows // SHARD_ROWS)):
                    window = slice(part * SHARD_ROWS, (part + 1) * SHARD_ROWS)
                    writer.write(part, {n: a[window] for n, a in named.items()})
                about = {"classes": 3, "class_names": [], "classifier": "0", "splits": {}}
                about = writer.manifest["tasks"].setdefault(task, about)
                about["splits"][split] = {"rows": rows, "fingerprint": "0"}
                writer.save()
    return path


def refused(result, *words, status=2):
    """Check that a command said one line of error with these words, and nothing else."""
    code, out, err = result
    assert code == status, err
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1, err
    for word in words:
        assert str(word) in err
    return err


def hugging_face_config(hidden_act="quick_gelu"):
    """The mini architecture as transformers describes it."""
    config, vision = model_config("mini"), model_config("mini")["vision_cfg"]
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


def hub_data_set(folder, labels, classes=10, columns=("image", "label"), split="test"):
    """A parquet data set as the hub serves it: image and label columns, and class names."""
    import datasets

    features = datasets.Features(
        {columns[0]: datasets.Image(), columns[1]: datasets.ClassLabel(names=[str(i) for i in range(classes)])}
    )
    shades = [Image.new("RGB", (8, 8), (10 * i % 256, 0, 7 * i % 256)) for i in range(len(labels))]
    table = datasets.Dataset.from_dict({columns[0]: shades, columns[1]: labels}, features=features)
    folder.mkdir(parents=True, exist_ok=True)
    table.to_parquet(folder / f"{split}-00000-of-00001.parquet")
