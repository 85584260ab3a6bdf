"""A model as ONNX files, one for each task, each checked by ONNX Runtime before it counts."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from probsurgery.pipeline.config import ProbSettings
from probsurgery.pipeline.deploy.model import SurgeryModel
from probsurgery.pipeline.errors import InputError, ProbsurgeryError, first_line

TOLERANCE = 1e-4
"""Largest difference to torch, relative to the largest logit."""


class _OneTask(nn.Module):
    """What a file holds: images (B, 3, size, size) -> logits (B, C), and sigma (B,) where the head has one."""

    def __init__(self, model: SurgeryModel, task: str) -> None:
        super().__init__()
        self.model, self.task = model, task
        self.outputs = ["logits"]
        if isinstance(model.settings, ProbSettings) and model.settings.samples:
            self.outputs.append("sigma")

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        merged = self.model.encoder(images)
        logits = self.model.classify(self.model.correct(merged, self.task), self.task)
        return (logits, self.model.sigma(merged, self.task)) if "sigma" in self.outputs else (logits,)


def require_onnx() -> None:
    """Raise `InputError` if a package of the extra `onnx` is missing."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise InputError(f"--onnx needs {error.name}; pip install 'probsurgery[onnx]'") from None


def write_onnx(model: SurgeryModel, folder: Path, progress: Callable[[int, int, str], None]) -> list[Path]:
    """Write `<task>.onnx` for each task; input `images` with any number of rows.

    Raises `ProbsurgeryError` if a model cannot be exported, or if ONNX Runtime gives other numbers than torch.
    """
    require_onnx()
    import onnxruntime

    size = model.about["preprocessing"]["image_size"]
    drawn = torch.randn(5, 3, size, size, generator=torch.Generator().manual_seed(0))
    written = []
    for done, task in enumerate(model.tasks):
        progress(done, len(model.tasks), task)
        path, one = folder / f"{task}.onnx", _OneTask(model, task).eval()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of deprecations within the exporter
                logging.getLogger("torch.onnx").setLevel(logging.ERROR)
                torch.onnx.export(
                    one,
                    (drawn[:2],),
                    path,
                    input_names=["images"],
                    output_names=one.outputs,
                    dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
                    dynamo=True,
                    external_data=False,
                    verbose=False,
                )
            session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        except Exception as error:  # the exporter raises anything
            raise ProbsurgeryError(f"{task} cannot be written as ONNX: {first_line(error)}") from None
        for images in (drawn[:1], drawn):
            with torch.inference_mode():
                expected = one(images)
            for ours, theirs in zip(expected, session.run(None, {"images": images.numpy()}), strict=True):
                off = ((torch.from_numpy(theirs) - ours).abs().max() / ours.abs().max()).item()
                if not off <= TOLERANCE:
                    raise ProbsurgeryError(f"{path}: ONNX Runtime's output differs from torch's by {off:.1e}")
        written.append(path)
    return written
