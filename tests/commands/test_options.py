"""Values of options, and the configurations made from them."""

import inspect
from dataclasses import fields
from pathlib import Path
from typing import get_args

import pytest
import typer

from probsurgery.cli import CACHE_COMMANDS, COMMANDS
from probsurgery.commands.extract import extract_command
from probsurgery.commands.fit import fit_command, sweep_command
from probsurgery.commands.options import comma_list, configured, key_values, number, real, real_or_auto, whole
from probsurgery.pipeline.config import HEAD_SETTINGS, ExtractConfig, FitConfig, SweepConfig
from probsurgery.pipeline.errors import InputError


@pytest.mark.parametrize(
    ("kind", "text", "values"),
    [
        (str, "a,b", ("a", "b")),
        (str, " a , b", ("a", "b")),
        (str, "", ()),
        (int, "4, 8", (4, 8)),
        (float, "0,1e-4", (0.0, 1e-4)),
        (float, (1.0,), (1.0,)),
    ],
)
def test_a_comma_list_becomes_a_tuple(kind, text, values):
    assert comma_list(kind, "").parser(text) == values


@pytest.mark.parametrize(("kind", "text"), [(int, "4,x"), (int, "4.5"), (float, "0.1,a")])
def test_a_comma_list_names_the_wrong_value(kind, text):
    with pytest.raises(typer.BadParameter, match=f"'{text.split(',')[-1]}' is not a .*number"):
        comma_list(kind, "").parser(text)


@pytest.mark.parametrize("text", ["a,", ",a", "a,,b", " , ", ","])
@pytest.mark.parametrize("kind", [str, int, float])
def test_a_comma_list_has_no_empty_item(kind, text):
    with pytest.raises(typer.BadParameter, match="is empty"):
        comma_list(kind, "").parser(text if kind is str else text.replace("a", "1").replace("b", "2"))


@pytest.mark.parametrize("text", ["1_0", " 1", "1 ", "\u0663", "1_0.5", "x", ""])
@pytest.mark.parametrize("kind", [int, float])
def test_a_number_is_written_as_usual(kind, text):
    with pytest.raises(typer.BadParameter, match="number"):
        number(kind, text)
    if text == text.strip() != "":
        with pytest.raises(typer.BadParameter, match="number"):
            comma_list(kind, "").parser(f"1,{text}")


def test_every_option_with_a_number_is_read_so():
    """Typer's own types take what Python takes."""
    for command in (*COMMANDS.values(), *CACHE_COMMANDS.values()):
        for name, parameter in inspect.signature(command, eval_str=True).parameters.items():
            types = get_args(parameter.annotation)
            kinds = {types[0], *get_args(types[0])} if types else set()
            if kinds & {int, float}:
                assert types[1].parser in (whole, real, real_or_auto), (command, name)


def test_keys_and_values_are_split_once():
    assert key_values("--merge-arg", ["off-diagonal = 0.9", "path=a=b"]) == {"off_diagonal": "0.9", "path": "a=b"}
    for texts in (["scale"], ["=1"], ["scale=1", "scale=1"]):
        with pytest.raises(InputError, match="--merge-arg"):
            key_values("--merge-arg", texts)


def test_a_configuration_takes_the_parameters_of_its_fields():
    parameters = {"cache": Path("c"), "seed": 3, "tasks": ["a"], "rank": 4, "as_json": True}
    assert configured(FitConfig, parameters, holdout=0.5) == FitConfig(Path("c"), seed=3, tasks=("a",), holdout=0.5)


@pytest.mark.parametrize(
    ("command", "config", "computed"),
    [
        (extract_command, ExtractConfig, set()),
        (fit_command, FitConfig, set()),
        (sweep_command, SweepConfig, {"values"}),
    ],
)
def test_every_field_of_a_configuration_has_an_option(command, config, computed):
    parameters = set(inspect.signature(command).parameters)
    assert {field.name for field in fields(config)} - computed <= parameters


@pytest.mark.parametrize("command", [fit_command, sweep_command])
def test_every_setting_of_a_head_has_an_option(command):
    settings = {field.name for kind in HEAD_SETTINGS.values() for field in fields(kind)}
    assert settings <= set(inspect.signature(command).parameters)
