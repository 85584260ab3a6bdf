"""The package as it is installed: what the wheel holds, what it shows, and which module may import which."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import probsurgery

ROOT = Path(__file__).parents[1]
FLOORS = {
    "errors": 0,
    "config": 0,
    "files": 0,
    "device": 1,
    "ranks": 1,
    "scratch": 1,
    "backends": 1,
    "manifest": 1,
    "store": 1,
    "writer": 1,
    "reuse": 2,
    "upkeep": 2,
    "pickles": 1,
    "checkpoints": 1,
    "hub": 1,
    "folders": 1,
    "heads": 1,
    "objectives": 1,
    "metrics": 1,
    "results": 1,
    "tables": 1,
    "mini": 1,
    "ridge": 2,
    "step": 2,
    "train": 2,
    "workers": 2,
    "schedule": 2,
    "merging": 2,
    "encoders": 2,
    "tasks": 2,
    "weights": 2,
    "reader": 2,
    "samples": 3,
    "merged": 3,
    "encode": 3,
    "extract": 3,
    "protocol": 3,
    "fit": 3,
    "sweep": 3,
    "report": 3,
    "study": 3,
    "uncertainty": 2,
    "looks": 3,
    "figures": 3,
    "page": 3,
    "corruption": 1,
    "transfer": 3,
    "model": 3,
    "onnx_files": 3,
}
WITHIN_A_FLOOR = {
    ("config", "errors"),
    ("files", "config"),
    ("files", "errors"),
    ("encoders", "tasks"),
    ("manifest", "backends"),
    ("store", "backends"),
    ("store", "manifest"),
    ("store", "scratch"),
    ("writer", "backends"),
    ("writer", "manifest"),
    ("extract", "encode"),
    ("extract", "merged"),
    ("extract", "samples"),
    ("sweep", "fit"),
    ("study", "fit"),
    ("study", "report"),
    ("looks", "report"),
    ("figures", "looks"),
    ("figures", "report"),
    ("page", "figures"),
    ("model", "merged"),
    ("transfer", "looks"),
    ("transfer", "report"),
    ("onnx_files", "model"),
    ("page", "looks"),
    ("page", "report"),
    ("fit", "protocol"),
    ("checkpoints", "pickles"),
    ("weights", "encoders"),
    ("weights", "tasks"),
    ("reader", "encoders"),
    ("reader", "tasks"),
}
WITHIN_A_FLOOR |= {("tables", "results")}
WITHIN_A_FLOOR |= {("train", "ridge"), ("train", "step"), ("workers", "train")}
WITHIN_A_FLOOR |= {("schedule", "train"), ("schedule", "workers")}


def imported_modules(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            if node.module.startswith("probsurgery.pipeline."):
                yield node.module.split(".")[2]
            elif node.module == "probsurgery.pipeline":
                yield from (alias.name for alias in node.names)


def test_modules_import_from_floors_below():
    modules = {p.stem: p for p in (ROOT / "pipeline").glob("*.py") if p.stem != "__init__"}
    assert modules.keys() | {"mini", "merging"} == FLOORS.keys()
    readers = [("mini", ROOT / "pipeline" / "mini" / name) for name in ("__init__.py", "readers.py")]
    merges = [("merging", path) for path in (ROOT / "pipeline" / "merging").glob("*.py")]
    assert len(merges) > 5
    for name, path in [*modules.items(), *readers, *merges]:
        for other in imported_modules(path):
            allowed = FLOORS[other] < FLOORS[name] or (name, other) in WITHIN_A_FLOOR or other == name
            assert allowed, f"{name} imports {other}"


def test_only_the_backends_know_zarr_and_h5py():
    for path in (ROOT / "pipeline").rglob("*.py"):
        imported = {
            alias.name.split(".")[0]
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Import)
            for alias in node.names
        }
        assert path.stem == "backends" or not imported & {"zarr", "h5py"}, path


def test_no_module_imports_the_top_level_by_its_bare_name():
    for path in [
        ROOT / "cli.py",
        ROOT / "__init__.py",
        *(ROOT / "pipeline").rglob("*.py"),
        *(ROOT / "tests").glob("*.py"),
    ]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not {"pipeline", "cli"} & {name.split(".")[0] for name in names if name}, path


def test_the_public_names_exist_and_are_documented():
    assert len(probsurgery.__all__) <= 17
    assert set(probsurgery._HOMES) == set(probsurgery.__all__)
    for name in probsurgery.__all__:
        assert getattr(probsurgery, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        probsurgery.nothing  # noqa: B018


def test_the_version_is_one():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == probsurgery.__version__
    assert f"## {probsurgery.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_importing_the_package_does_not_import_torch():
    code = "import sys, probsurgery; probsurgery.ExtractConfig; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, so that no build folder is left here."""
    folder = tmp_path_factory.mktemp("wheel")
    (folder / "source").mkdir()
    for name in ("pyproject.toml", "README.md", "__init__.py", "__main__.py", "cli.py", "py.typed"):
        shutil.copy(ROOT / name, folder / "source")
    for name in ("pipeline", "tests", "benchmarks", "cache"):
        ignored = shutil.ignore_patterns("__pycache__", "*_*") if name == "cache" else None
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=ignored)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, folder / "source"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (path,) = folder.glob("*.whl")
    return path


def test_the_wheel_holds_the_package_and_nothing_beside_it(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.split("/")[0].split("-")[0] for name in names} == {"probsurgery"}
    sources = [ROOT / n for n in ("__init__.py", "__main__.py", "cli.py", "py.typed")]
    sources += [p for p in (ROOT / "pipeline").rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    expected = {f"probsurgery/{p.relative_to(ROOT).as_posix()}" for p in sources}
    assert {n for n in names if ".dist-info/" not in n} == expected
    metadata = next(n for n in names if n.endswith("entry_points.txt"))
    assert "probsurgery = probsurgery.__main__:main" in zipfile.ZipFile(wheel).read(metadata).decode()


def test_the_wheel_works_where_there_is_no_checkout(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r})\n"
        "import probsurgery\n"
        f"assert probsurgery.__file__.startswith({str(tmp_path)!r}), probsurgery.__file__\n"
        "from probsurgery.pipeline.tasks import select_tasks\n"
        "from probsurgery.pipeline.weights import Weights\n"
        "assert len(select_tasks('clip8', None)) == 8\n"
        "assert Weights('mini').pretrained()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


COMMANDS = ["extract", "fit", "sweep", "study", "report", "transfer", "predict", "export"]
COMMANDS += [f"cache {name}" for name in ("ls", "info", "verify", "convert", "rm")]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_readme_names_every_command_and_option(run, command):
    readme = (ROOT / "README.md").read_text()
    assert f"probsurgery {command}" in readme
    options = set(re.findall(r"--[a-z-]+", run(*command.split(), "--help")[1])) - {"--help"}
    assert options
    assert not {option for option in options if option not in readme}


def test_the_readme_begins_with_the_two_commands():
    first_screen = (ROOT / "README.md").read_text()[:2_500]
    places = [first_screen.index(c) for c in ("make demo", "make test", "pip install", "--arch mini", "--arch vitl14")]
    assert places == sorted(places)
