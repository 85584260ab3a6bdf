"""Suites: named sets of tasks whose experts are merged, each a TOML file in `suites/`."""

import tomllib
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from probsurgery.pipeline.config import SUITES
from probsurgery.pipeline.datasets.tasks import Task
from probsurgery.pipeline.errors import InputError, unknown
from probsurgery.pipeline.files import Record, decode


class _SuiteFile(Record, frozen=True, forbid_unknown_fields=True):
    """One file: the tasks of the suite that it extends come first."""

    name: str
    tasks: Mapping[str, Mapping[str, Any]]
    extends: str | None = None


def suite_path(suite: str) -> Path:
    """The file of a suite. Raises `InputError` for an unknown one."""
    if suite not in SUITES:
        raise unknown("suite", suite, SUITES)
    return Path(__file__).parent / "suites" / f"{suite}.toml"


@cache
def suite_tasks(suite: str) -> Mapping[str, Task]:
    """All tasks of a suite by name, in order. Raises `InputError` for an unknown suite."""
    file = decode(_SuiteFile, tomllib.loads(suite_path(suite).read_text(encoding="utf-8")))
    own = {name: decode(Task, {**row, "name": name}) for name, row in file.tasks.items()}
    return {**(suite_tasks(file.extends) if file.extends else {}), **own}


def select_tasks(suite: str, names: Sequence[str] | None) -> tuple[Task, ...]:
    """Tasks of a suite by name, in the suite's order; all if None. Raises `InputError` for an unknown name."""
    known = suite_tasks(suite)
    if names is None:
        return tuple(known.values())
    check_names(names, known)
    return tuple(task for name, task in known.items() if name in names)


def check_names(names: Sequence[str], known: Collection[str]) -> None:
    """Raise `InputError` unless there is at least one name, all names are known, and none is repeated."""
    if not names:
        raise InputError(f"no task was named; choose from: {', '.join(known)}")
    for name in names:
        if name not in known:
            raise unknown("task", name, known)
    if len(set(names)) < len(names):
        raise InputError(f"a task is named twice: {', '.join(names)}")
