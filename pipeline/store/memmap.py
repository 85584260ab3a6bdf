"""Features in .npy files, mapped into memory: for worker processes, and for more than memory holds."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from probsurgery.pipeline.errors import ProbsurgeryError, first_line


def spill(file: Path, shape: tuple[int, int], blocks: Iterable[np.ndarray]) -> Tensor:
    """Write blocks of rows to a .npy file in float32, and map it. Raises `ProbsurgeryError` if the disk is full."""
    try:
        # Written, not mapped for writing: a full disk kills a process that writes to a map.
        with file.open("wb") as out:
            header = {"descr": "<f4", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(out, header)
            for block in blocks:
                out.write(np.ascontiguousarray(block, dtype="<f4").data)
    except OSError as error:
        raise ProbsurgeryError(
            f"cannot write {file.parent}: {first_line(error)}; point TMPDIR to a folder with room for the features"
        ) from None
    return mapped(file)


def mapped(file: Path) -> Tensor:
    """An array on disk as a tensor, read when it is used. It is shared: writing to it would reach the file."""
    return torch.from_numpy(np.load(file, mmap_mode="r+"))
