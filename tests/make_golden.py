"""Makes the golden caches: the format as version 1 writes it, for later versions to read. Not run by the tests.

python tests/make_golden.py     # from the project's root; refuses to replace what is there
"""

import sys
from pathlib import Path

import numpy as np

from probsurgery.pipeline.store.lock import locked
from probsurgery.pipeline.store.manifest import SplitRecord, TaskRecord
from probsurgery.pipeline.store.writer import CacheWriter
from support import identity, specs

HERE = Path(__file__).parent / "golden"
ROWS, DIM, CLASSES = 5, 4, 3


def values() -> dict[str, np.ndarray]:
    """What the golden caches hold: numbers that anyone can write down."""
    count = np.arange(ROWS * DIM, dtype="float32").reshape(ROWS, DIM)
    return {
        "classifiers/a": np.eye(CLASSES, DIM, dtype="float32") * 100,
        "test/a/merged": count / 8,
        "test/a/expert": count / 8 + 0.5,
        "test/a/pretrained": -count,
        "test/a/labels": np.arange(ROWS) % CLASSES,
    }


def main() -> None:
    for store in ("zarr", "hdf5"):
        path = HERE / store
        expected = identity(["a"], dim=DIM, checkpoints={"pretrained": "0", "a": "1"})
        with locked(path):
            writer = CacheWriter.begin(path, expected, store)
            splits = {"test": SplitRecord(ROWS, "0")}
            task = TaskRecord(classes=CLASSES, class_names=("x", "y", "z"), classifier="0", splits=splits)
            writer.update(tasks={"a": task})
            writer.request(["test/a"])
            writer.declare(specs(values()))
            for name, array in values().items():
                writer.write(0, {name: array})
        (path / ".lock").unlink()


if __name__ == "__main__":
    if any((HERE / store).exists() for store in ("zarr", "hdf5")):
        sys.exit("the golden caches are there; they are made once for each version of the format")
    main()
