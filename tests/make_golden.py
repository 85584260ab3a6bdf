"""Makes the golden caches: the format as each version writes it, for later ones to read. Not run by the tests.

python tests/make_golden.py     # from the project's root; replaces nothing
"""

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


def values_2() -> dict[str, np.ndarray]:
    """What those of version 2 hold: a classifier of plain features with a bias, and a task without any or labels."""
    of_b = {
        name.replace("/a/", "/b/"): array for name, array in values().items() if name.endswith(("merged", "expert"))
    }
    return values() | {"biases/a": np.arange(CLASSES, dtype="float32") - 1} | of_b


def folder(store: str, version: int) -> Path:
    return HERE / (store if version == 1 else f"{store}-{version}")


def write(path: Path, store: str, arrays: dict[str, np.ndarray], tasks: dict[str, TaskRecord]) -> None:
    expected = identity([*tasks], dim=DIM, checkpoints={"pretrained": "0", "a": "1"})
    with locked(path):
        writer = CacheWriter.begin(path, expected, store)
        writer.update(tasks=tasks)
        writer.request([f"test/{task}" for task in tasks])
        writer.declare(specs(arrays))
        for name, array in arrays.items():
            writer.write(0, {name: array})
    (path / ".lock").unlink()


def main() -> None:
    about = {"classes": CLASSES, "class_names": ("x", "y", "z"), "classifier": "0"}
    first = {"a": TaskRecord(**about, splits={"test": SplitRecord(ROWS, "0")})}
    second = {
        "a": TaskRecord(**about, title="Letter A", normalise=False, splits={"test": SplitRecord(ROWS, "0")}),
        "b": TaskRecord(classes=0, classifier="", splits={"test": SplitRecord(ROWS, "0", labels=False)}),
    }
    for version, arrays, tasks in ((1, values(), first), (2, values_2(), second)):
        for store in ("zarr", "hdf5"):
            if not folder(store, version).exists():  # they are made once for each version of the format
                write(folder(store, version), store, arrays, tasks)


if __name__ == "__main__":
    main()
