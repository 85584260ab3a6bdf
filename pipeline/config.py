"""What a run is asked to do: frozen dataclasses with every default. Paths may be given as text."""

import math
import re
from collections import Counter
from dataclasses import asdict, dataclass, field, fields
from itertools import product
from pathlib import Path
from typing import Any

from probsurgery.pipeline.errors import InputError
from probsurgery.pipeline.fingerprints import shortened
from probsurgery.pipeline.settings import (
    ABBREVIATIONS,
    HEAD_SETTINGS,
    LOSSES,
    OPTIMIZERS,
    AffineSettings,
    ClassifierSettings,
    HeadSettings,
    OrthogonalSettings,
    ProbSettings,
    RidgeSettings,
    SurgerySettings,
    TrainedSettings,
    changed_settings,
    check_choice,
    check_integers,
    check_number,
    head_settings,
    number_text,
    option_name,
    setting_names,
)

__all__ = [  # heads' settings are found here too
    "HEAD_SETTINGS",
    "LOSSES",
    "OPTIMIZERS",
    "AffineSettings",
    "ClassifierSettings",
    "HeadSettings",
    "OrthogonalSettings",
    "ProbSettings",
    "RidgeSettings",
    "SurgerySettings",
    "TrainedSettings",
    "changed_settings",
    "head_settings",
    "number_text",
]

DTYPES = ("float32", "float16")
PRECISIONS = ("fp32", "bf16", "fp16")
STORES = ("zarr", "hdf5")
SPLITS = ("test", "train")
SUITES = ("mini", "clip8", "clip14", "clip20")  # built in, and the papers' 8, 14 and 20 tasks
PLAIN_NUMBER = re.compile(r"[!-^`-~]+")
"""Text that is a number as usual if Python takes it: not `1_0`, with spaces, or in digits of other scripts."""
CACHES = Path("cache")  # folder in which caches get their default names


def _plain_name(name: str | None) -> None:
    if name is not None and not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,199}", name):
        raise InputError(f"--name {name[:80]!r} is not a plain folder name: letters, digits, and . _ + -")


def _as_paths(config: object, *names: str) -> None:
    """Convert fields of a frozen configuration to paths; None stays None."""
    for name in names:
        if (value := getattr(config, name)) is not None:
            object.__setattr__(config, name, Path(value))


@dataclass(frozen=True)
class ExtractConfig:
    """One run of stage one."""

    arch: str | None = None
    """Encoder: a name in `models.architectures.ARCHS`, or whatever `get_encoder` takes; None: the suite's."""
    merges: tuple[str, ...] = ("ta",)
    """Merging methods, each a name in `merging.registry.METHODS` or the path of a merged checkpoint."""
    merge_args: dict[str, object] = field(default_factory=dict)
    """Settings of the merges that have them (see `merging.registry.METHODS`), as values or as text."""
    coefficients: str | Path | None = None
    """AdaMerging's coefficients, from a file instead of learned."""
    name: str | None = None
    """What a merged checkpoint is called in reports and in its cache's name; None: the file's name."""
    tasks: tuple[str, ...] | None = None
    """Tasks whose experts are merged, and which are extracted; None: all of the suite."""
    only: tuple[str, ...] | None = None
    """Those of the tasks to extract now; the others can follow later."""
    checkpoints: str | None = None
    """Folder of checkpoints; None: the architecture's published ones."""
    data: str | None = None
    """Folder of data sets (see `datasets.layouts`); None: the suite's published ones."""
    split: str = "test"
    """`test`, `train` or `both`."""
    limit: int | None = None
    """Number of images to take from each task and split, the first ones; None: all."""
    store: str = "zarr"
    dtype: str = "float32"
    """Type in which features are stored."""
    precision: str = "fp32"
    """Type in which the encoders compute."""
    batch_size: int = 128
    workers: int | None = None
    """Processes that decode images; 0: the main process; None: one for each core, for images in files."""
    device: str = "auto"
    root: str | Path = CACHES
    """Folder in which caches get their default names."""
    out: str | Path | None = None
    """Folder of the one cache to write, instead of `root` and a default name."""
    pretrained: bool = True
    """Extract the pre-trained encoder's features too, for the report."""
    fresh: bool = False
    """Replace a cache that was written with other settings."""
    skip_bad: bool = False
    """Leave out images that cannot be decoded, and record them."""
    corrupt: str | None = None
    """Corruption of every image before it is encoded, such as `noise:3` (see `datasets.corruptions`)."""
    any_rows: bool = False
    """Accept data sets whose number of images is not the one that the suite states."""
    suite: str | None = None
    """Set of tasks: one of `SUITES`, or the path of a TOML file; None: the architecture's own."""

    def __post_init__(self) -> None:
        _as_paths(self, "coefficients", "root", "out")
        if self.arch is None and self.suite is None:
            raise InputError(
                "nothing to extract was named; give --arch, such as mini, or --suite FILE with its encoder"
            )
        choices = {"split": (*SPLITS, "both"), "store": STORES, "dtype": DTYPES, "precision": PRECISIONS}
        for name, allowed in choices.items():
            check_choice(name, getattr(self, name), allowed)
        check_integers(self, batch_size=(1, 65_536), workers=(0, 256), limit=(1, 1_000_000_000))
        if not self.merges:
            raise InputError("no merge was asked for; give --merge at least once")
        if len(set(self.merges)) < len(self.merges):
            raise InputError(f"a merge is named twice: {', '.join(self.merges)}")
        _plain_name(self.name)
        if self.out is not None and len(self.merges) > 1:
            raise InputError("--out names one cache, but several merges were asked for; use --root instead")

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that `split` stands for."""
        return SPLITS if self.split == "both" else (self.split,)


@dataclass(frozen=True)
class FitConfig:
    """One run of stage two: one head for each task, or one for all."""

    cache: str | Path
    head: HeadSettings = ProbSettings()  # noqa: RUF009 (it is frozen)
    tasks: tuple[str, ...] | None = None
    """Tasks to fit; None: all tasks in the cache."""
    shared: bool = False
    """One head for all tasks: it takes their batches in turn, and `steps` updates for each task."""
    fraction: float = 1.0
    """Share of the rows that the fit may see."""
    holdout: float = 0.0
    """Share of the test rows to evaluate on and not to fit; 0: evaluate on the fitted rows, as the papers do."""
    fit_split: str = "test"
    """Split whose images are fitted; evaluation is always on test images."""
    online: bool = False
    """Take each row once, in the order of the data, one row and one step at a time (Surgery, Tab. 5)."""
    seed: int = 0
    device: str = "auto"
    workers: int | None = None
    """Threads (where torch takes the steps: processes) that train on a CPU; 0: none besides; None: by the work."""
    tf32: bool = False
    """Multiply in TF32 on CUDA: faster, and less exact."""
    name: str | None = None
    """Folder of the head under `heads/`; None: derived from the settings."""
    results: str | Path | None = None
    """Folder of heads and results; None: the cache."""

    def __post_init__(self) -> None:
        _as_paths(self, "cache", "results")
        check_choice("fit split", self.fit_split, SPLITS)
        check_number("--fraction", self.fraction, 0, 1, above_low=True)
        check_integers(self, seed=(0, 2**31 - 1), workers=(0, 1_024))
        if not 0 <= self.holdout < 1:
            raise InputError(f"--holdout is {self.holdout}; it must be from 0 to below 1")
        if self.holdout and self.fit_split == "train":
            raise InputError("--holdout splits the test rows; with --fit-split train no test row is fitted anyway")
        if self.shared and not isinstance(self.head, TrainedSettings):
            raise InputError("--shared is for heads that correct features step by step: prob, surgery")
        if self.shared and self.head.optimizer == "joint":
            raise InputError("--optimizer joint is for heads of one task each; a shared head is trained as one")
        _plain_name(self.name)
        if self.online:
            if self.shared or not self.head.is_trained:
                raise InputError(
                    "--online is for heads of one task that are trained step by step: prob, surgery, classifier"
                )
            for name in ("steps", "batch_size"):
                if getattr(self.head, name) not in (1, getattr(type(self.head), name)):
                    raise InputError(f"--online takes every row once, one at a time; leave {option_name(name)} out")
            object.__setattr__(self, "head", changed_settings(self.head, steps=1, batch_size=1))

    @property
    def known_tasks(self) -> tuple[str, ...]:
        """The tasks of a configuration whose tasks have been filled in from the cache."""
        assert self.tasks is not None, "stage two fills the tasks in first"
        return self.tasks

    @property
    def protocol(self) -> str:
        """How fitted and evaluated rows relate; recorded with every result."""
        on_test = f"holdout {number_text(self.holdout)}" if self.holdout else "transductive"
        protocol = ("train" if self.fit_split == "train" else on_test) + (", online" if self.online else "")
        return protocol if self.fraction == 1 else f"{protocol}, fraction {number_text(self.fraction)}"

    def default_name(self) -> str:
        """The kind of head, its width, and every setting that is not the default."""
        defaults, width_name = type(self.head), self.head.width_name
        fixed = ("steps", "batch_size") if self.online else ()
        parts = [self.head.kind]
        for name, value in sorted(asdict(self.head).items(), key=lambda item: item[0] != width_name):
            if name == width_name or (value != getattr(defaults, name) and name not in fixed):
                value = number_text(value) if isinstance(value, float) else str(value)
                parts.append(ABBREVIATIONS.get(name, name) + value)
        parts += ["shared"] if self.shared else []
        parts += [self.protocol.replace(", ", "-").replace(" ", "")] if self.protocol != "transductive" else []
        parts += ["+".join(self.tasks)] if self.tasks is not None else []
        parts += (["tf32"] if self.tf32 else []) + ([f"seed{self.seed}"] if self.seed else [])
        return "-".join(parts)


@dataclass(frozen=True)
class SweepConfig:
    """Many runs of stage two: every combination of the values given."""

    cache: str | Path
    head: tuple[str, ...] = ("prob",)
    values: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    """Values of the heads' settings, by name; each kind of head takes the settings that it has."""
    fraction: tuple[float, ...] = (FitConfig.fraction,)
    seed: tuple[int, ...] = (FitConfig.seed,)
    tasks: tuple[str, ...] | None = None
    shared: bool = FitConfig.shared
    holdout: float = FitConfig.holdout
    fit_split: str = FitConfig.fit_split
    online: bool = FitConfig.online
    device: str = FitConfig.device
    workers: int | None = FitConfig.workers
    tf32: bool = FitConfig.tf32
    results: str | Path | None = FitConfig.results
    keep_heads: bool = False
    """Keep the fitted heads, besides their results."""

    def __post_init__(self) -> None:
        _as_paths(self, "cache", "results")
        for name, values in {"head": self.head, "fraction": self.fraction, "seed": self.seed, **self.values}.items():
            option = option_name(name)
            if not values:
                raise InputError(f"{option} is empty; give one value or more, separated by commas")
            value, times = Counter(values).most_common(1)[0]
            if times > 1:
                raise InputError(f"{option} names {shortened(value)} {times} times; give each value once")
        for name in self.head:
            check_choice("head", name, HEAD_SETTINGS)
        for name in self.values:
            if not any(name in setting_names(head) for head in self.head):
                # No kind takes it: raise the error of the first, which lists its settings.
                head_settings(self.head[0], **{name: self.values[name][0]})

    @property
    def size(self) -> int:
        """Number of runs in the grid, each of which has a head for every task."""
        combinations = sum(math.prod(map(len, self._values_of(head).values())) for head in self.head)
        return combinations * len(self.fraction) * len(self.seed)

    def _values_of(self, head: str) -> dict[str, tuple[Any, ...]]:
        return {name: values for name, values in self.values.items() if name in setting_names(head)}

    def expand(self) -> list[FitConfig]:
        """Every run of the grid; the seed varies fastest. Raises `InputError` for a value out of range."""
        common = {f.name: getattr(self, f.name) for f in fields(FitConfig) if hasattr(self, f.name)}
        return [
            FitConfig(**common | {"head": settings, "fraction": fraction, "seed": seed})
            for head in self.head
            for combination in product(*self._values_of(head).values())
            for settings in [head_settings(head, **dict(zip(self._values_of(head), combination, strict=True)))]
            for fraction in self.fraction
            for seed in self.seed
        ]
