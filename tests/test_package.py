"""The package as it is installed: contents of the wheel, public names, and which module may import which."""

import ast
import os
import platform
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import probsurgery
from probsurgery.pipeline.mini import MINI_TASKS

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
KERNELS = ("neon",) if platform.machine().lower() in ("arm64", "aarch64") else ("avx2", "avx512")
KERNELS = KERNELS if shutil.which("c++") else ()


def test_imports_follow_the_contracts():
    done = subprocess.run([BIN / "lint-imports", "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "3 kept, 0 broken" in done.stdout


def test_no_module_imports_the_top_level_by_its_bare_name():
    command = [BIN / "ruff", "check", "--select", "TID251", "."]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_public_names_exist_and_are_documented():
    assert len(probsurgery.__all__) <= 17
    typed = [n for n in ast.walk(ast.parse((ROOT / "__init__.py").read_text())) if isinstance(n, ast.ImportFrom)]
    for_checkers = {alias.asname for node in typed if node.module.startswith("probsurgery.") for alias in node.names}
    assert for_checkers == set(probsurgery.__all__)
    for name in probsurgery.__all__:
        assert getattr(probsurgery, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        probsurgery.nothing  # noqa: B018


def test_the_version_is_stated_once_and_heads_the_changelog():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "version" in project["dynamic"]
    assert "version" not in project
    latest = re.search(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1]
    assert latest == probsurgery.__version__


def test_the_licences_of_the_mini_suite_are_stated_beside_its_weights():
    table = (ROOT / "pipeline/mini/weights/LICENSES.md").read_text()
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| `")]
    assert rows == [[f"`{t.name}`", t.source, t.package, t.licence] for t in MINI_TASKS.values()]


def test_the_citation_names_the_software_and_both_papers():
    citation = (ROOT / "CITATION.cff").read_text()
    keys = dict(re.findall(r"^([a-z-]+): *(.*)$", citation, re.MULTILINE))
    assert {"cff-version", "message", "title", "authors", "references"} <= keys.keys()
    assert "version" not in keys  # __init__.py states it
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert (keys["cff-version"], keys["title"], keys["license"]) == ("1.2.0", project["name"], project["license"])
    for address in project["urls"].values():
        assert address in citation


def test_contributing_names_every_module_in_its_row():
    rows = [
        line.split(" | ", 1) for line in (ROOT / "CONTRIBUTING.md").read_text().splitlines() if line.startswith("| `")
    ]
    modules = {place.split("`")[-2]: names for place, names in rows}
    folders = {p.parent for name in ("commands", "pipeline") for p in (ROOT / name).rglob("*.py")}
    for folder in folders - {ROOT / "pipeline/merging", ROOT / "pipeline/mini"}:
        place = f"{folder.relative_to(ROOT)}/" + ("*.py" if folder.name == "pipeline" else "")
        assert not {p.stem for p in folder.glob("[a-z]*.py") if f"`{p.stem}`" not in modules[place]}, place


def test_importing_the_package_does_not_import_torch():
    code = "import sys, probsurgery; probsurgery.ExtractConfig; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, so that no build folder is left in the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    (folder / "source").mkdir()
    for name in (
        "pyproject.toml",
        "setup.py",
        "README.md",
        "LICENSE",
        "__init__.py",
        "__main__.py",
        "cli.py",
        "py.typed",
    ):
        shutil.copy(ROOT / name, folder / "source")
    for name in ("commands", "pipeline", "tests", "benchmarks", "cache"):
        ignored = shutil.ignore_patterns("__pycache__", "*_*" if name == "cache" else "_kernel_*")
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
    for package in ("commands", "pipeline"):
        sources += [p for p in (ROOT / package).rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    sources = [p for p in sources if p.suffix not in (".cpp", ".so")]
    compiled = {name for name in names if name.endswith(".so")}
    assert compiled == {f"probsurgery/pipeline/training/_kernel_{name}.abi3.so" for name in KERNELS}
    names -= compiled
    expected = {f"probsurgery/{p.relative_to(ROOT).as_posix()}" for p in sources}
    assert {n for n in names if ".dist-info/" not in n} == expected
    information = f"probsurgery-{probsurgery.__version__}.dist-info"
    assert {n for n in names if "/licenses/" in n} == {
        f"{information}/licenses/{name}" for name in ("LICENSE", "pipeline/mini/weights/LICENSES.md")
    }
    entry_points = zipfile.ZipFile(wheel).read(f"{information}/entry_points.txt").decode()
    assert "probsurgery = probsurgery.__main__:main" in entry_points
    metadata = zipfile.ZipFile(wheel).read(f"{information}/METADATA").decode()
    assert f"\nVersion: {probsurgery.__version__}\n" in metadata
    assert "\nLicense-Expression: MIT\n" in metadata


def test_the_wheel_works_where_there_is_no_checkout(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r})\n"
        "import probsurgery\n"
        f"assert probsurgery.__file__.startswith({str(tmp_path)!r}), probsurgery.__file__\n"
        "from probsurgery.pipeline.datasets.suites import select_tasks\n"
        "from probsurgery.pipeline.models.sources import Weights\n"
        "assert len(select_tasks('clip8', None)) == 8\n"
        "assert Weights('mini').pretrained()\n"
        "from probsurgery.pipeline.training import kernel\n"
        f"assert all(kernel._library(name) for name in {KERNELS!r})\n"
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


@pytest.mark.slow
def test_the_documented_snippets_have_no_type_error(tmp_path):
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 2
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "probsurgery").symlink_to(ROOT)
    (tmp_path / "snippets.py").write_text("\n".join(blocks))
    environment = os.environ | {"MYPYPATH": str(tmp_path / "package")}
    command = [BIN / "mypy", "--config-file", ROOT / "pyproject.toml", "--follow-imports", "silent", "snippets.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
