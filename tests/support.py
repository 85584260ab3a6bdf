"""What several tests make or check: synthetic caches, and the one line of an error."""

from __future__ import annotations

import numpy as np

from probsurgery.pipeline.store import SHARD_ROWS, CacheWriter

DIM = 16


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
    expert = classifier[labels] * 2 + generator.normal(size=(rows, dim)).astype("float32") * 0.3
    drift = np.eye(dim) + generator.normal(size=(dim, dim)) * 0.2
    merged = (expert @ drift + generator.normal(size=dim)).astype("float32")
    pretrained = generator.normal(size=(rows, dim)).astype("float32")
    return {
        "merged": merged,
        "expert": expert.astype("float32"),
        "pretrained": pretrained,
        "labels": labels.astype("int64"),
        "classifier": classifier,
    }


def write_cache(path, sizes, store="zarr", dtype="float32", splits=("test",), change=lambda task, arrays: arrays):
    """A cache of synthetic features; `sizes` gives each task's rows, `change` may edit a task's arrays."""
    with CacheWriter.open(path, identity(sizes, dtype=dtype), store) as writer:
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
                about = writer.manifest["tasks"].setdefault(task, {"classes": 3, "class_names": [], "splits": {}})
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
