"""A model as ONNX files, one for each task, each checked by ONNX Runtime."""

import io
import logging
import warnings
from contextlib import redirect_stdout
from pathlib import Path

import torch
from torch import Tensor, nn

from probsurgery.pipeline.deploy.model import SurgeryModel
from probsurgery.pipeline.errors import InputError, ProbsurgeryError, first_line
from probsurgery.pipeline.progress import Progress, no_progress

TOLERANCE = 1e-4
"""Largest difference to torch, relative to the largest logit."""


class _OneTask(nn.Module):
    """The graph of one file: images (B, 3, size, size) -> logits (B, C), and sigma (B,) where the head has one."""

    def __init__(self, model: SurgeryModel, task: str) -> None:
        super().__init__()
        self.model, self.task = model, task
        self.outputs = ["logits", "sigma"] if model.settings.predicts_sigma else ["logits"]

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


def write_onnx(model: SurgeryModel, folder: Path, progress: Progress = no_progress) -> None:
    """Write `<task>.onnx` for each task; input `images` with any number of rows.

    Raises `ProbsurgeryError` if a model cannot be exported, or if ONNX Runtime gives other numbers than torch.
    """
    require_onnx()
    import onnxruntime

    size = model.provenance.preprocessing.image_size
    drawn = torch.randn(5, 3, size, size, generator=torch.Generator().manual_seed(0))
    for done, task in enumerate(model.tasks):
        progress(done, len(model.tasks), task)
        path, graph = folder / f"{task}.onnx", _OneTask(model, task).eval()
        try:
            # Standard output is for results, and onnxscript before 0.7 prints what it did.
            with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
                warnings.simplefilter("ignore")  # deprecations within the exporter
                logging.getLogger("torch.onnx").setLevel(logging.ERROR)
                # One row works too, as is checked below; torch 2.8 complains at length about a range that has 1.
                shapes = {"images": {0: torch.export.Dim("batch", min=2)}}
                torch.onnx.export(
                    graph,
                    (drawn[:2],),
                    path,
                    input_names=["images"],
                    output_names=graph.outputs,
                    dynamic_shapes=shapes,
                    dynamo=True,
                    external_data=False,
                    verbose=False,
                )
            session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        except Exception as error:  # the exporter raises anything
            raise ProbsurgeryError(f"{task} cannot be written as ONNX: {first_line(error)}") from None
        for images in (drawn[:1], drawn):
            with torch.inference_mode():
                expected = graph(images)
            outputs = session.run(None, {"images": images.numpy()})
            for by_torch, by_onnx in zip(expected, outputs, strict=True):
                difference = ((torch.from_numpy(by_onnx) - by_torch).abs().max() / by_torch.abs().max()).item()
                if not difference <= TOLERANCE:
                    raise ProbsurgeryError(f"{path}: ONNX Runtime's output differs from torch's by {difference:.1e}")
