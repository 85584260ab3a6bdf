"""probsurgery: representation surgery for merged CLIP encoders.

Stage one, `extract`, writes the features of the merged and the individual encoders to a cache. Stage two trains heads
on the cache: `fit` with one setting, `sweep` with many. `report` gives tables of the results. The command
`probsurgery` does the same.

    cache = probsurgery.open_cache("cache/mini_ta")
    head = probsurgery.load_head("cache/mini_ta/heads/prob-h128")
    corrected = head(cache.features("mnist"), "mnist")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from probsurgery.pipeline.analysis.report import report
    from probsurgery.pipeline.config import ExtractConfig, FitConfig, SweepConfig, head_settings
    from probsurgery.pipeline.deploy.model import load_model
    from probsurgery.pipeline.errors import ProbsurgeryError
    from probsurgery.pipeline.extraction.extract import extract
    from probsurgery.pipeline.fitting.fit import fit
    from probsurgery.pipeline.fitting.sweep import sweep
    from probsurgery.pipeline.heads.head import Head, load_head
    from probsurgery.pipeline.heads.metrics import accuracy, representation_bias
    from probsurgery.pipeline.merging.registry import merge
    from probsurgery.pipeline.store.cache import Cache as open_cache

__version__ = "0.1.0"

# Imported on first use, so that `probsurgery --help` does not wait for torch.
_SOURCES = {
    "ExtractConfig": ("config", "ExtractConfig"),
    "FitConfig": ("config", "FitConfig"),
    "Head": ("heads.head", "Head"),
    "ProbsurgeryError": ("errors", "ProbsurgeryError"),
    "SweepConfig": ("config", "SweepConfig"),
    "accuracy": ("heads.metrics", "accuracy"),
    "extract": ("extraction.extract", "extract"),
    "fit": ("fitting.fit", "fit"),
    "head_settings": ("config", "head_settings"),
    "load_head": ("heads.head", "load_head"),
    "load_model": ("deploy.model", "load_model"),
    "merge": ("merging.registry", "merge"),
    "open_cache": ("store.cache", "Cache"),
    "report": ("analysis.report", "report"),
    "representation_bias": ("heads.metrics", "representation_bias"),
    "sweep": ("fitting.sweep", "sweep"),
}

__all__ = [
    "ExtractConfig",
    "FitConfig",
    "Head",
    "ProbsurgeryError",
    "SweepConfig",
    "accuracy",
    "extract",
    "fit",
    "head_settings",
    "load_head",
    "load_model",
    "merge",
    "open_cache",
    "report",
    "representation_bias",
    "sweep",
]


def __getattr__(name: str) -> object:
    if name not in _SOURCES:
        raise AttributeError(f"module 'probsurgery' has no attribute {name!r}")
    module, attribute = _SOURCES[name]
    return getattr(importlib.import_module(f"probsurgery.pipeline.{module}"), attribute)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
