"""One row of the table of merging methods, and its settings with their ranges."""

import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

from probsurgery.pipeline.config import PLAIN_NUMBER, number_text
from probsurgery.pipeline.errors import InputError, unknown
from probsurgery.pipeline.merging.adamerging import adamerging
from probsurgery.pipeline.merging.vectors import Merged

Value = float | int | bool | str


@dataclass(frozen=True)
class Setting:
    """One setting of a merging method."""

    default: Value
    description: str
    low: float = -math.inf
    high: float = math.inf
    choices: tuple[str, ...] = ()
    is_later: bool = False
    """Whether caches of the method were written before it had this setting: at its default it is not recorded."""

    def check(self, name: str, value: object) -> Value:
        """The value in the default's type, parsed if it is text. Raises `InputError` if it is not allowed."""
        kind: type[Value] = type(self.default)
        with suppress(ValueError, KeyError):
            if isinstance(value, str) and kind is bool:
                value = {"true": True, "false": False}[value.lower()]
            elif isinstance(value, str):
                value = kind(value) if kind is str or PLAIN_NUMBER.fullmatch(value) else value
            elif kind is float and type(value) is int:
                value = kind(value)
        span = "" if math.isinf(self.low) else f" from {number_text(self.low)}"
        span += "" if math.isinf(self.high) else f" to {number_text(self.high)}"
        allowed = {bool: "true or false", int: f"a whole number{span}", float: f"a number{span}"}
        if (
            type(value) is not kind
            or (self.choices and value not in self.choices)
            or (isinstance(value, int | float) and not (self.low <= value <= self.high and math.isfinite(value)))
        ):
            expected = " or ".join(self.choices) if self.choices else allowed.get(kind, "text")
            raise InputError(f"the setting {name} is {str(value)[:80]!r}; it must be {expected}")
        return value


@dataclass(frozen=True)
class Method:
    """One row of the table of merging methods."""

    title: str
    paper: str
    function: Callable[..., Merged] | None
    """None if there is nothing to merge: a checkpoint of the method's name is used."""
    settings: dict[str, Setting] = field(default_factory=dict)
    learns: bool = False
    """Whether it learns from images."""
    classifies: bool = True
    """Whether, if it learns, it does so from predictions, which need a classifier of each task."""
    computes: bool = False
    """Whether its function takes a `Machine`, and its result depends on it, to float noise."""
    follows: bool = False
    """Whether it is a follower, whose function takes the merged state dict after the experts."""

    @property
    def takes_coefficients(self) -> bool:
        """Whether coefficients can be given instead of learned."""
        return getattr(self.function, "func", None) is adamerging

    @property
    def is_layerwise(self) -> bool:
        """Whether it has a coefficient for each tensor of a task, and not one for each task."""
        return bool(getattr(self.function, "keywords", {}).get("layerwise"))

    def checked(self, method: str, given: Mapping[str, object]) -> dict[str, Value]:
        """All settings, given or default. Raises `InputError` for an unknown one, or a value that is not allowed."""
        for name in given:
            if name not in self.settings:
                raise unknown(f"setting of {method}", name, self.settings or ["(it has none)"])
        return {n: s.check(n, given[n]) if n in given else s.default for n, s in self.settings.items()}
