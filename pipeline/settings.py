"""Settings of each kind of head, with their defaults, and the checks that configurations share."""

from collections.abc import Collection
from dataclasses import asdict, dataclass, fields
from numbers import Real
from typing import Any, ClassVar

from probsurgery.pipeline.errors import InputError, unknown
from probsurgery.pipeline.fingerprints import shortened

LOSSES = ("l1", "mse", "smooth-l1", "cosine")
OPTIMIZERS = ("separate", "joint")


def number_text(value: float) -> str:
    """The shortest text of a number that is read back as the same number."""
    short = f"{value:g}"
    return short if float(short) == value else repr(value)


def check_choice(what: str, value: str, allowed: Collection[str]) -> None:
    if value not in allowed:
        raise unknown(what, value, allowed)


def check_integers(config: object, **ranges: tuple[int, int]) -> None:
    """Check whole numbers of a configuration by their ranges; None is allowed where it is the default."""
    for name, (low, high) in ranges.items():
        value = getattr(config, name)
        if value is None and getattr(type(config), name) is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise InputError(
                f"{option_name(name)} is {shortened(value)}; it must be a whole number from {low} to {high:,}"
            )


def check_number(option: str, value: float, low: float, high: float, *, above_low: bool = False) -> None:
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not is_number or not low <= value <= high or (above_low and value == low):
        span = f"above {low:g} and at most {high:g}" if above_low else f"from {low:g} to {high:g}"
        raise InputError(f"{option} is {shortened(value)}; it must be {span}")


@dataclass(frozen=True)
class _HeadSettings:
    """Properties of a kind of head, so that callers need not check its type."""

    kind: ClassVar[str]  # name in options and files
    title: ClassVar[str]  # name in tables
    width_name: ClassVar[str | None] = None  # the setting that is the inner width
    is_trained: ClassVar[bool] = True  # step by step, and not solved in closed form
    corrects_features: ClassVar[bool] = True  # and leaves the task's classifier as it is
    # Of a kind without these settings. Not annotated, so that they are fields of the other kinds only.
    steps = 0
    batch_size = 0
    optimizer = "separate"
    samples = 0
    kl_weight, feature_scale = 0.0, 1.0

    @property
    def predicts_sigma(self) -> bool:
        """Whether the head predicts a standard deviation of its correction that was trained."""
        return self.samples > 0


@dataclass(frozen=True)
class SteppedSettings(_HeadSettings):
    """Settings of every head that is trained step by step. A step is one update of one head."""

    steps: int = 1_000
    batch_size: int = 16
    """Rows in a step."""
    lr: float = 1e-3
    """Adam's learning rate; its betas are (0.9, 0.999)."""

    def __post_init__(self) -> None:
        check_integers(self, steps=(1, 10_000_000), batch_size=(1, 65_536))
        check_number("--lr", self.lr, 0, 10, above_low=True)
        object.__setattr__(self, "lr", float(self.lr))  # 1 and 1.0 are one setting, and have one digest


@dataclass(frozen=True)
class TrainedSettings(SteppedSettings):
    """Settings of heads of two layers, which correct features."""

    width_name: ClassVar[str]

    loss: str = "l1"
    """Distance to the expert's feature: one of `LOSSES`."""
    optimizer: str = "separate"
    """`separate`: an Adam for each head. `joint`: one for all tasks of the cache, whose momentum moves each head at the
    other tasks' steps too, as in ProbSurgery's public code (see `training.joint`)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integers(self, **{self.width_name: (1, 16_384)})
        check_choice("loss", self.loss, LOSSES)
        check_choice("optimizer", self.optimizer, OPTIMIZERS)


@dataclass(frozen=True)
class SurgerySettings(TrainedSettings):
    """Surgery (Yang et al., ICML 2024, arxiv.org/abs/2402.02705): a correction of low rank r."""

    kind = "surgery"
    title = "Surgery"
    width_name = "rank"

    rank: int = 16


@dataclass(frozen=True)
class ProbSettings(TrainedSettings):
    """ProbSurgery (Wei et al., ICML 2025): a Gaussian over the correction."""

    kind = "prob"
    title = "ProbSurgery"
    width_name = "hidden"

    steps: int = 5_000
    hidden: int = 128
    """Width h of the shared bottleneck."""
    kl_weight: float = 1e-4
    """Weight lambda of the KL divergence to the standard normal."""
    samples: int = 1
    """Draws of the correction in a step: 5 in the paper, 1 in its code. 0: no noise, only the mean is trained."""
    feature_scale: float = 1.0
    """What features are multiplied by in training, whose noise starts at 1; 0: chosen by `fitting.scale`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integers(self, samples=(0, 1_024))
        for name, low in (("kl_weight", 0), ("feature_scale", 1e-6 if self.feature_scale else 0)):
            check_number(option_name(name), getattr(self, name), low, 1e6)
            object.__setattr__(self, name, float(getattr(self, name)) + 0.0)  # -0.0 becomes 0.0


@dataclass(frozen=True)
class RidgeSettings(_HeadSettings):
    """Ridge regression from merged to expert features, in closed form."""

    kind = "ridge"
    title = "ridge"
    is_trained = False

    penalty: float | None = None
    """Penalty relative to the mean eigenvalue of the features' covariance; None: chosen by leave-one-out."""

    def __post_init__(self) -> None:
        if self.penalty is not None:
            check_number("--penalty", self.penalty, 1e-12, 1e6)


@dataclass(frozen=True)
class AffineSettings(_HeadSettings):
    """A scale and a shift of each dimension by least squares: ridge with a diagonal matrix and no penalty."""

    kind = "affine"
    title = "affine"
    is_trained = False


@dataclass(frozen=True)
class OrthogonalSettings(_HeadSettings):
    """The orthogonal matrix that brings merged features nearest to the expert's (Procrustes), in closed form."""

    kind = "orthogonal"
    title = "orthogonal"
    is_trained = False


@dataclass(frozen=True)
class ClassifierSettings(SteppedSettings):
    """FT-Classifier (Kong et al., arxiv.org/abs/2412.13526): the task's classifier itself, by the expert's predictions.

    Features are left as they are, and nothing is added at inference.
    """

    kind = "classifier"
    title = "FT-Classifier"
    corrects_features = False

    batch_size: int = 64
    lr: float = 1e-2
    """Adam's learning rate, in units of the root mean square of the entries of the expert's classifier. The default is
    the one of the least KL divergence on held-out images of the mini suite (benchmarks/RESULTS.md)."""


HeadSettings = SurgerySettings | ProbSettings | RidgeSettings | AffineSettings | OrthogonalSettings | ClassifierSettings
_KINDS = (ProbSettings, SurgerySettings, RidgeSettings, AffineSettings, OrthogonalSettings, ClassifierSettings)
HEAD_SETTINGS: dict[str, type[HeadSettings]] = {settings.kind: settings for settings in _KINDS}
ABBREVIATIONS = {"hidden": "h", "rank": "r", "kl_weight": "kl", "batch_size": "batch", "feature_scale": "scale"}
ABBREVIATIONS |= {"optimizer": ""}  # its value says enough


def head_settings(head: str, **given: Any) -> HeadSettings:
    """Settings of a kind of head by its name; a value of None stands for the default.

    Raises `InputError` for an unknown head, a setting that this kind does not have, or a value out of range.
    """
    check_choice("head", head, HEAD_SETTINGS)
    given = {name: value for name, value in given.items() if value is not None}
    for name in given:
        if name not in setting_names(head):
            allowed = ", ".join(map(option_name, setting_names(head))) or "none"
            raise InputError(f"{option_name(name)} is not a setting of {head} heads; they take: {allowed}")
    return HEAD_SETTINGS[head](**given)


def changed_settings(head: HeadSettings, **changed: Any) -> HeadSettings:
    """The same kind of head, with other values of some settings."""
    return head_settings(head.kind, **asdict(head) | changed)


def setting_names(head: str) -> list[str]:
    return [f.name for f in fields(HEAD_SETTINGS[head])]


def option_name(name: str) -> str:
    return "--" + name.replace("_", "-")
