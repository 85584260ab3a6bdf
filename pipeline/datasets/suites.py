"""Suites: sets of tasks whose experts are merged, each a TOML file: the package's in `suites/`, or one's own.

Paths in a file are relative to it; `hf:` marks the Hub. docs/own-tasks.md describes the keys.
"""

import os
import re
import tomllib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import msgspec

from probsurgery.pipeline.config import SUITES
from probsurgery.pipeline.datasets.tables import HubDataset
from probsurgery.pipeline.datasets.tasks import DataSource, Task, with_classes
from probsurgery.pipeline.errors import InputError, first_line, nearest, unknown
from probsurgery.pipeline.files import Record, open_file
from probsurgery.pipeline.store.manifest import RESERVED_TASKS

_FOLDER = Path(__file__).parent / "suites"
_MOST_BYTES = 2**24
_MOST_PARENTS = 8
_SCHEMES = ("hf:", "mini:")
"""What begins a place that is not a path."""
TASK_NAME = r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,99}"
_WRONG_NAME = "a name has at most 100 letters, digits, and . _ + -, and begins with a letter, a digit or _"


class EncoderChoice(Record, frozen=True):
    """An encoder that needs more than a name, in a suite's table `[encoder]`."""

    model: str
    """A model of open_clip by name, the path of its JSON configuration, or a folder or `hf:` of transformers."""
    pooling: str | None = None
    projection: bool | None = None


class _SuiteFile(Record, frozen=True):
    """One file: the tasks of the suite that it extends come first."""

    name: str
    tasks: Mapping[str, Task] = {}
    extends: str | None = None
    """A suite of the package, or another file."""
    architectures: tuple[str, ...] = ()
    """Architectures whose own suite this is: `extract --arch` without `--suite` takes it."""
    encoder: EncoderChoice | None = None
    pretrained: str | None = None
    """The checkpoint that the experts were fine-tuned from."""


@dataclass(frozen=True)
class Suite:
    """A set of tasks, and perhaps the encoder and the checkpoint that their experts share."""

    name: str
    tasks: Mapping[str, Task]
    """All tasks by name, in order."""
    path: Path
    architectures: tuple[str, ...] = ()
    encoder: EncoderChoice | None = None
    pretrained: str | None = None

    @property
    def places(self) -> dict[str, str]:
        """Where checkpoints are that the suite names: by task, and `pretrained`."""
        experts = {name: task.expert for name, task in self.tasks.items() if task.expert}
        return experts | ({"pretrained": self.pretrained} if self.pretrained else {})

    def select(self, names: Sequence[str] | None) -> tuple[Task, ...]:
        """Tasks by name, in the suite's order, with their class names; all if None.

        Raises `InputError` for an unknown name.
        """
        if names is not None:
            check_names(names, self.tasks)
        return tuple(with_classes(task) for name, task in self.tasks.items() if names is None or name in names)


def load_suite(suite: str) -> Suite:
    """A suite of the package by name, or one's own by the path of its file.

    Raises `InputError` for an unknown name, and for the first problem of a file.
    """
    loaded, problems = read_suite(suite_path(suite))
    if loaded is None:
        more = f" ({len(problems)} problems; `probsurgery suites check {suite}` lists them)" if problems[1:] else ""
        raise InputError(problems[0] + more)
    return loaded


def own_suite(arch: str) -> str:
    """The suite of an architecture: that which names it, or the papers' eight tasks."""
    return next((name for name in SUITES if arch in load_suite(name).architectures), "clip8")


def suite_path(suite: str) -> Path:
    """The file of a suite. Raises `InputError` for an unknown one."""
    if suite in SUITES:
        return _FOLDER / f"{suite}.toml"
    path = Path(suite)
    if path.suffix != ".toml" and not path.exists():
        raise unknown("suite", suite, [*SUITES, "or the path of a TOML file"])
    return path


def suite_tasks(suite: str) -> Mapping[str, Task]:
    """All tasks of a suite by name, in order. Raises `InputError` for an unknown suite."""
    return {task.name: task for task in load_suite(suite).select(None)}


def select_tasks(suite: str, names: Sequence[str] | None) -> tuple[Task, ...]:
    """Tasks of a suite by name, in the suite's order; all if None. Raises `InputError` for an unknown name."""
    return load_suite(suite).select(names)


def check_names(names: Sequence[str], known: Collection[str]) -> None:
    """Raise `InputError` unless there is at least one name, all names are known, and none is repeated."""
    if not names:
        raise InputError(f"no task was named; choose from: {', '.join(known)}")
    for name in names:
        if name not in known:
            raise unknown("task", name, known)
    if len(set(names)) < len(names):
        raise InputError(f"a task is named twice: {', '.join(names)}")


def read_suite(path: Path) -> tuple[Suite | None, list[str]]:
    """A suite's file, and a line for each of its problems; no suite if there are any. What it names is not opened."""
    if path.parent == _FOLDER:
        return _read_own(path.stem), []
    suite, problems = _read_file(path, _MOST_PARENTS)
    return (None if problems else suite), problems


@cache
def _read_own(name: str) -> Suite:
    suite, problems = _read_file(_FOLDER / f"{name}.toml", _MOST_PARENTS)
    assert suite is not None, problems
    return suite


def _read_file(path: Path, parents: int) -> tuple[Suite | None, list[str]]:
    try:
        with open_file(path) as opened:
            plain = tomllib.loads(opened.read(_MOST_BYTES).decode("utf-8-sig"))
    except OSError as error:
        return None, [f"no suite {path}: {error.strerror or first_line(error)}; --suite takes a TOML file"]
    except (ValueError, RecursionError) as error:
        return None, [f"{path} is not valid TOML: {first_line(error)}"]
    base: Suite | None = None
    problems: list[str] = []
    if isinstance(extends := plain.get("extends"), str):
        if parents == 0:
            return None, [f"{path}: extends: files extend each other without end"]
        other = _FOLDER / f"{extends}.toml" if extends in SUITES else Path(_resolved(extends, path))
        base, problems = _read_file(other, parents - 1)
    problems += [f"{path}: {problem}" for problem in _problems(plain, path, base)]
    if problems:
        return None, problems
    file = msgspec.convert(_completed(plain, path), _SuiteFile)
    encoder, pretrained = file.encoder, file.pretrained
    if base is not None:
        encoder, pretrained = encoder or base.encoder, pretrained or base.pretrained
    tasks = {**(base.tasks if base else {}), **file.tasks}
    return Suite(file.name, MappingProxyType(tasks), path, file.architectures, encoder, pretrained), []


def _problems(plain: Mapping[str, Any], path: Path, base: Suite | None) -> Iterator[str]:
    """What is wrong with a file's own keys and values, each with its key."""
    tables: list[tuple[type, Mapping[str, Any], str]] = [(_SuiteFile, plain, "")]
    if isinstance(encoder := plain.get("encoder"), dict):
        tables.append((EncoderChoice, encoder, "encoder."))
    tasks = plain.get("tasks", {})
    named = tasks if isinstance(tasks, dict) else {}
    for name, task in named.items():
        if not isinstance(task, dict):
            yield f"tasks.{name} is no table of keys"
            continue
        tables.append((Task, task, f"tasks.{name}."))
        tables += [
            (kind, task[key], f"tasks.{name}.{key}.")
            for key, kind in (("test", DataSource), ("train", DataSource), ("dataset", HubDataset))
            if isinstance(task.get(key), dict)
        ]
    for kind, table, where in tables:
        yield from _wrong_keys(kind, table, where)
    known = {**(base.tasks if base else {}), **named}
    if not known:
        yield "it has no tasks; a task is a table [tasks.NAME]"
    for name in named:
        if base and name in base.tasks:
            yield f"tasks.{name} is a task of {base.name} already; choose another name"
    for name, times in Counter(name.lower() for name in known).items():
        if times > 1:
            yield f"tasks.{name} is there {times} times, in other case; choose another name"
    if path.parent != _FOLDER:
        own = {*SUITES, *(arch for suite in SUITES for arch in load_suite(suite).architectures)}
        if plain.get("name") in own:
            yield f"name {plain['name']!r} is that of a suite or an architecture of the package; choose another"
    yield from _missing_paths([("pretrained", plain.get("pretrained"))], path)
    titles = Counter(task.get("title") or name for name, task in named.items() if isinstance(task, dict))
    titles.update(task.title or name for name, task in (base.tasks if base else {}).items())
    for title, times in titles.items():
        if times > 1:
            yield f"{times} tasks have the title {title!r}; give each its own"
    for name, task in named.items():
        if isinstance(task, dict):
            yield from (f"tasks.{name}: {problem}" for problem in _wrong_task(name, task, path))


def _wrong_keys(kind: type, table: Mapping[str, Any], where: str) -> Iterator[str]:
    """Keys that a record does not have or lacks, and values of another type. Tables in it are checked on their own."""
    fields = {field.encode_name: field for field in msgspec.structs.fields(kind)}
    allowed = [name for name in fields if not (kind is Task and name == "name")]
    for key, value in table.items():
        if kind is _SuiteFile and key == "name":
            if not (isinstance(value, str) and re.fullmatch(TASK_NAME, value)):
                yield f"name is {str(value)[:80]!r}: {_WRONG_NAME}"
        elif key not in allowed:
            yield f"unknown key {where}{key}{nearest(key, allowed)}; allowed are: {', '.join(allowed)}"
        elif not isinstance(value, dict) or key == "rows":
            try:
                msgspec.convert(_in_full(key, value), fields[key].type)
            except msgspec.ValidationError as error:
                yield f"{where}{key} is not valid: {first_line(error)}"
    for name in allowed:
        if fields[name].required and name not in table:
            yield f"the key {where}{name} is missing"


def _wrong_task(name: str, task: Mapping[str, Any], path: Path) -> Iterator[str]:
    if not re.fullmatch(TASK_NAME, name):
        yield _WRONG_NAME
    if isinstance(classes := task.get("classes"), list):
        for listed, times in Counter(map(str, classes)).items():
            if times > 1:
                yield f"classes lists {listed!r} {times} times; list each class once"
    templates = task.get("templates")
    for template in templates if isinstance(templates, list) else []:
        if isinstance(template, str) and template.count("{}") != 1:
            yield f"templates: {template!r} needs {{}} once, for the class name"
    if templates and "classifier" in task:
        yield "classifier is given beside templates; give one of them"
    if name.lower() in {reserved.lower() for reserved in RESERVED_TASKS}:
        listed = ", ".join(RESERVED_TASKS)
        yield f"a task cannot be called {name!r}, as tables and manifests use {listed}; choose another name"
    if templates and task.get("labels") is False and not task.get("classes"):
        yield "templates need `classes` where images have no labels"
    if task.get("classifier") is True:
        yield "classifier is a file, or false for none"
    if "normalise" in task and not task.get("classifier"):
        yield "normalise is for a classifier from a file, and none is given"
    if not {"test", "train", "dataset"} & task.keys():
        yield "test (or train) is missing: where the images are"
    places = [(key, task.get(key)) for key in ("expert", "classifier", "test", "train")]
    yield from _missing_paths([(k, v.get("data") if isinstance(v, dict) else v) for k, v in places], path)


def _missing_paths(places: Sequence[tuple[str, Any]], path: Path) -> Iterator[str]:
    """The keys whose values are paths of nothing."""
    for key, place in places:
        if isinstance(place, str) and not place.strip():
            yield f"{key} is empty; give a path, or leave it out"
        elif isinstance(place, str) and not place.startswith(_SCHEMES):
            found = Path(_resolved(place, path))
            if not found.exists():
                siblings = [inner.name for inner in found.parent.iterdir()] if found.parent.is_dir() else []
                yield f"{key} is {place!r}, but there is no {found}{nearest(found.name, siblings)}"


def _in_full(key: str, value: Any) -> Any:
    """The table that a plain text stands for."""
    short = {"test": "data", "train": "data", "encoder": "model"}
    return {short[key]: value} if key in short and isinstance(value, str) else value


def _completed(plain: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """A file's content with its paths made absolute, tables for short forms, and the tasks' names."""

    def complete(table: Mapping[str, Any]) -> dict[str, Any]:
        full = {key: _in_full(key, value) for key, value in table.items()}
        for key in ("expert", "classifier", "pretrained", "data", "model"):
            if isinstance(full.get(key), str) and not (key == "model" and _is_name(full[key], path)):
                full[key] = _resolved(full[key], path)
        return {k: complete(v) if k in ("test", "train", "encoder") else v for k, v in full.items()}

    tasks = {name: complete(task) | {"name": name} for name, task in plain.get("tasks", {}).items()}
    return complete({key: value for key, value in plain.items() if key != "tasks"}) | {"tasks": tasks}


def _resolved(place: str, path: Path) -> str:
    """A place that a file names, its path made absolute."""
    return place if place.startswith(_SCHEMES) else os.path.normpath(path.absolute().parent / os.path.expanduser(place))


def _is_name(model: str, path: Path) -> bool:
    """Whether an encoder is named, and not given by a path."""
    return "/" not in model and not model.endswith(".json") and not Path(_resolved(model, path)).exists()
