"""Options that several commands share, parsers of their values, and configurations made from them."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from typer import BadParameter, Option

from probsurgery.pipeline.analysis.tables import FORMATS
from probsurgery.pipeline.config import PLAIN_NUMBER
from probsurgery.pipeline.errors import InputError, unknown

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    Several = tuple[Any, ...]
else:
    Several = tuple  # Typer would read the full type as two arguments on the command line

Config = TypeVar("Config", bound="DataclassInstance")
_KINDS = {str: ("A,B,...", "a name"), int: ("N,N,...", "a whole number"), float: ("N,N,...", "a number")}
"""Types of the values in a comma list, with the metavar in the help and the noun in an error."""


def number(kind: type, text: object) -> Any:
    """A number as it is usually written; Python would also take `1_0`, spaces, and digits of other scripts."""
    if not isinstance(text, str):  # the default
        return text
    with suppress(ValueError):
        if PLAIN_NUMBER.fullmatch(text):
            return kind(text)
    raise BadParameter(f"{text[:80]!r} is not {_KINDS[kind][1]}")


def whole(text: object) -> Any:
    """A whole number from the command line."""
    return number(int, text)


def real(text: object) -> Any:
    """A number from the command line."""
    return number(float, text)


# Functions with names, which older releases of click ask for.
Whole = partial(Option, parser=whole, metavar="N")
"""An option that takes a whole number."""
Real = partial(Option, parser=real, metavar="X")
"""An option that takes a number."""


def real_or_auto(text: object) -> Any:
    """A positive number from the command line, or 0 for `auto`."""
    value = 0.0 if text == "auto" else number(float, text)
    if value == 0 and text != "auto":
        raise BadParameter(f"{str(text)[:80]!r} is not a positive number; write auto to have one chosen")
    return value


def comma_list(kind: type, help_text: str, parse_one: Callable[[str], Any] | None = None) -> Any:
    """Declare an option that takes values separated by commas; the command's parameter is a tuple.

    An empty list is left to the stage, whose error lists what there is to choose from.
    """
    metavar, noun = _KINDS[kind]

    def parse(text: str | Several) -> Several:
        if isinstance(text, tuple):  # the default
            return text
        values = []
        for item in map(str.strip, text.split(",")) if text.strip() else ():
            if not item:
                raise BadParameter(f"an item of {text[:80]!r} is empty; write {noun}, or several separated by commas")
            try:
                values.append(parse_one(item) if parse_one else item if kind is str else number(kind, item))
            except BadParameter as error:
                raise BadParameter(f"{error.message}; separate several by commas") from None
        return tuple(values)

    return Option(parser=parse, metavar=metavar, help=help_text)


def key_values(option: str, texts: list[str]) -> dict[str, str]:
    """The values of a repeated KEY=VALUE option by key; dashes in keys become underscores."""
    values: dict[str, str] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        key = key.strip().replace("-", "_")
        if not equals or not key or key in values:
            problem = "names a setting that was given before" if key in values else "is not KEY=VALUE"
            raise InputError(f"{option} {text[:80]!r} {problem}; write each setting once, such as scale=0.4")
        values[key] = value.strip()
    return values


def table_format(text: str) -> str:
    """A format for tables. Raises `InputError` for an unknown one."""
    formats = ("text", *FORMATS, "json")
    if text not in formats:
        raise unknown("format", text, formats)
    return text


def configured(config: type[Config], parameters: Mapping[str, Any], **computed: Any) -> Config:
    """Build a configuration from a command's parameters, which are its `locals()` at its beginning.

    Each field takes the parameter of the same name; `computed` gives or replaces the fields that differ from their
    parameters. The list of a repeated option becomes a tuple.
    """
    values = {f.name: parameters[f.name] for f in fields(config) if f.name in parameters} | computed
    return config(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


AsJson = Annotated[bool, Option("--json", help="Print a machine-readable result on standard output.")]
CacheFolder = Annotated[Path, Option("--cache", help="Folder of the cache, such as cache/mini_ta.")]
Device = Annotated[str, Option(help="auto, cpu, cuda or cuda:N.")]
StoredResults = Annotated[Path | None, Option(help="Folder of heads and results. [the cache]")]
TableFormat = Annotated[
    str,
    Option("--format", parser=table_format, metavar="FORMAT", help="Print text, markdown, latex, csv or json tables."),
]
JsonFormat = Annotated[bool, Option("--json", help="The same as --format json.")]
