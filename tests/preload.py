"""What the fork server of `processes` imports and reads once, for all processes that it starts.

Not the `datasets` library: it reads the environment when it is imported, and what it imports is most of its time.
"""

from functools import cache

import matplotlib.pyplot  # noqa: F401
import open_clip  # noqa: F401
import pandas  # noqa: F401
import pyarrow.parquet  # noqa: F401
import torch

import processes  # noqa: F401
import support  # noqa: F401
from probsurgery import cli  # noqa: F401
from probsurgery.pipeline import mini
from probsurgery.pipeline.analysis import page, report  # noqa: F401
from probsurgery.pipeline.extraction import extract  # noqa: F401
from probsurgery.pipeline.fitting import fit, sweep  # noqa: F401

torch.set_num_threads(1)
mini.load = cache(mini.load)
for task in ("digits8", "texture", "street"):
    mini.load(task, "test")
