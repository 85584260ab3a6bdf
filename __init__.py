"""probsurgery: representation surgery for merged CLIP encoders.

Stage one, `extract`, writes the features of the merged and the individual encoders to a cache. Stage two trains heads
on the cache: `fit` with one setting, `sweep` with many. `report` gives tables of the results. The command
`probsurgery` does the same.

    cache = probsurgery.open_cache("cache/mini_ta")
    head = probsurgery.load_head("cache/mini_ta/heads/prob-h128")
    corrected = head(cache.features("mnist"), "mnist")
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from probsurgery.pipeline.analysis.report import report as report
    from probsurgery.pipeline.config import ExtractConfig as ExtractConfig
    from probsurgery.pipeline.config import FitConfig as FitConfig
    from probsurgery.pipeline.config import SweepConfig as SweepConfig
    from probsurgery.pipeline.config import head_settings as head_settings
    from probsurgery.pipeline.deploy.model import load_model as load_model
    from probsurgery.pipeline.errors import ProbsurgeryError as ProbsurgeryError
    from probsurgery.pipeline.extraction.extract import extract as extract
    from probsurgery.pipeline.fitting.fit import fit as fit
    from probsurgery.pipeline.fitting.sweep import sweep as sweep
    from probsurgery.pipeline.heads.head import Head as Head
    from probsurgery.pipeline.heads.head import load_head as load_head
    from probsurgery.pipeline.heads.metrics import accuracy as accuracy
    from probsurgery.pipeline.heads.metrics import representation_bias as representation_bias
    from probsurgery.pipeline.merging.registry import merge as merge
    from probsurgery.pipeline.store.cache import open_cache as open_cache
    from probsurgery.pipeline.store.imports import write_cache as write_cache


__version__ = "0.2.0"

# Imported on first use, so that `probsurgery --help` does not wait for torch.
_MODULES = {
    "analysis.report": ("report",),
    "config": ("ExtractConfig", "FitConfig", "SweepConfig", "head_settings"),
    "deploy.model": ("load_model",),
    "errors": ("ProbsurgeryError",),
    "extraction.extract": ("extract",),
    "fitting.fit": ("fit",),
    "fitting.sweep": ("sweep",),
    "heads.head": ("Head", "load_head"),
    "heads.metrics": ("accuracy", "representation_bias"),
    "merging.registry": ("merge",),
    "store.cache": ("open_cache",),
    "store.imports": ("write_cache",),
}
__all__ = sorted(name for names in _MODULES.values() for name in names)


def __getattr__(name: str) -> object:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f"probsurgery.pipeline.{module}"), name)
    raise AttributeError(f"module 'probsurgery' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
