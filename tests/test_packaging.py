"""The wheel and the sdist: what is in them, and that they work where only they are."""

from __future__ import annotations

import email
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

from pbkd import __version__

REPOSITORY = Path(__file__).parents[1]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
PACKAGES = ("pbkd", "flows")
FOLDERS = (*PACKAGES, "tests", "docs", "benchmarks")
NOT_OURS = shutil.ignore_patterns("__pycache__", ".*_cache", ".hypothesis", "results")


def python(code: str, folder: Path, *arguments: str, path: Path | None = None) -> str:
    """What a fresh Python prints; the repository is not on its path."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PBKD_", "PYTHON"))}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built by setuptools itself, which needs no network."""
    source = tmp_path_factory.mktemp("source") / "pbkd"
    for folder in FOLDERS:
        shutil.copytree(REPOSITORY / folder, source / folder, ignore=NOT_OURS)
    for path in REPOSITORY.iterdir():
        if path.is_file() and path.name != ".git":
            shutil.copy(path, source)
    target = tmp_path_factory.mktemp("sdist")
    build = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    python(build, source, str(target))
    (path,) = target.iterdir()
    return path


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the sdist, as an installer does where there is no wheel."""
    source = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(source, filter="data")
    target = tmp_path_factory.mktemp("wheel")
    build = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    python(build, next(source.iterdir()), str(target))
    (path,) = target.iterdir()
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the wheel's files alone."""
    folder = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def _own_files() -> set[str]:
    """Files of the packages in this repository."""
    return {
        path.relative_to(REPOSITORY).as_posix()
        for package in PACKAGES
        for path in (REPOSITORY / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_the_wheel_holds_every_file_of_both_packages_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    about = f"pbkd-{__version__}.dist-info/"
    assert {name for name in names if not name.startswith(about)} == _own_files()
    assert {"pbkd/py.typed", "pbkd/report/page.html", "pbkd/presets/digits.yaml"} <= names
    assert f"{about}licenses/LICENSE" in names


def test_the_metadata_say_what_pyproject_says(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        about = f"pbkd-{__version__}.dist-info"
        metadata = email.message_from_bytes(archive.read(f"{about}/METADATA"))
        scripts = archive.read(f"{about}/entry_points.txt").decode()
    assert metadata["Name"] == "pbkd"
    assert metadata["Version"] == __version__
    assert metadata["License-Expression"] == PROJECT["license"]
    assert set(metadata.get_all("Provides-Extra", [])) == set(PROJECT["optional-dependencies"])
    core = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert len(core) == len(PROJECT["dependencies"])
    assert metadata.get_payload().startswith("# pbkd")
    assert f"pbkd = {PROJECT['scripts']['pbkd']}" in scripts


def test_the_version_stands_in_one_place() -> None:
    assert PROJECT["dynamic"] == ["version"]
    assert "version" not in PROJECT
    text = (REPOSITORY / "pbkd" / "_version.py").read_text()
    assert text.count(f'"{__version__}"') == 1


def test_the_sdist_holds_what_the_tests_and_the_docs_need(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert _own_files() <= names
    for folder in ("tests", "docs", "benchmarks"):
        expected = {
            path.relative_to(REPOSITORY).as_posix()
            for path in (REPOSITORY / folder).rglob("*")
            if path.suffix in (".py", ".md") and "results" not in path.parts
        }
        assert expected <= names
    assert {"LICENSE", "SECURITY.md", "dvc.yaml", "params.yaml", "requirements.lock"} <= names
    assert not [
        name for name in names if name.endswith(".pyc") or name.startswith((".git", ".venv"))
    ]


# ---------------------------------------------------------------- what runs


def test_the_command_runs_from_the_wheel_alone(installed: Path, tmp_path: Path) -> None:
    code = (
        "import sys, pbkd; from pbkd.__main__ import main; print(pbkd.__file__, flush=True);"
        "sys.argv[:1] = ['pbkd']; main()"
    )
    said = python(code, tmp_path, "--version", path=installed).splitlines()
    assert said == [str(installed / "pbkd" / "__init__.py"), f"pbkd {__version__}"]
    said = python(code, tmp_path, "init", "here", "--preset", "digits", path=installed)
    assert "preset digits" in said
    presets = installed / "pbkd" / "presets"
    for name, source in (("params.yaml", "digits.yaml"), ("dvc.yaml", "pipeline.yaml")):
        assert (tmp_path / "here" / name).read_text() == (presets / source).read_text()


def test_flows_and_templates_come_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    code = (
        "from importlib import resources, util\n"
        "print(util.find_spec('flows.compress').origin)\n"
        "print(resources.files('pbkd').joinpath('report/page.html').read_text()[:200])"
    )
    said = python(code, tmp_path, path=installed)
    assert said.startswith(str(installed / "flows" / "compress.py"))
    assert "base.html" in said


BLOCKER = """
import importlib, pkgutil, sys
CORE = {"torch", "torchvision", "numpy", "PIL", "pandas", "scipy", "safetensors", "pydantic"}
EXTRAS = {
    "typer", "rich", "prefect", "fastapi", "dvc", "mlflow", "psutil", "pynvml", "matplotlib",
    "jinja2", "sklearn", "constriction", "torch_pruning", "onnx", "onnxscript", "onnxruntime",
    "ray",
}

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in EXTRAS:
            raise ModuleNotFoundError(f"{name} is blocked", name=name)

sys.meta_path.insert(0, Blocker())
import pbkd
"""


def test_importing_pbkd_loads_none_of_the_heavy_libraries(tmp_path: Path) -> None:
    code = BLOCKER + "print(sorted((CORE | EXTRAS) & set(sys.modules)))"
    assert python(code, tmp_path, path=REPOSITORY).strip() == "[]"


def test_every_module_but_the_command_line_imports_with_the_core_alone(tmp_path: Path) -> None:
    code = BLOCKER + (
        "pbkd.compress, pbkd.load\n"
        "modules = pkgutil.walk_packages(pbkd.__path__, 'pbkd.', lambda name: None)\n"
        "names = [module.name for module in modules]\n"
        "own = [n for n in names if not n.startswith('pbkd.cli') and n != 'pbkd.export_model']\n"
        "for name in own: importlib.import_module(name)\n"
        "print(len(own))"
    )
    assert int(python(code, tmp_path, path=REPOSITORY)) > 100


LACKING = """
from pathlib import Path
from pbkd.artifacts import Workspace
from pbkd.config import PrepareConfig
from pbkd.data import prepare
from pbkd.elastic.actors import ray_module
from pbkd.errors import MissingExtraError
from pbkd.report.svg import new_figure
from pbkd.report.template import fill
from pbkd.shrink.range_coder import _constriction
from pbkd.tracking.mlflow_run import mlflow_client

here = Path.cwd()
digits = PrepareConfig(source="digits", path="raw")
for what, function in {
    "mlflow": lambda: mlflow_client(Workspace(here, here / "state")),
    "matplotlib": lambda: new_figure(1, 1),
    "jinja2": lambda: fill("page.html"),
    "scikit-learn": lambda: prepare(digits, 0, here / "prepared", here, here / "downloads"),
    "constriction": _constriction,
    "ray": ray_module,
}.items():
    try:
        function()
    except MissingExtraError as error:
        assert what in str(error), error
        print(what, str(error).partition("pip install ")[2])
"""


def test_what_lacks_an_extra_names_it(tmp_path: Path) -> None:
    said = python(BLOCKER + LACKING, tmp_path, path=REPOSITORY).splitlines()
    assert said == [
        "mlflow 'pbkd[pipeline]'",
        "matplotlib 'pbkd[pipeline]'",
        "jinja2 'pbkd[pipeline]'",
        "scikit-learn 'pbkd[digits]'",
        "constriction 'pbkd[shrink]'",
        "ray 'pbkd[ray]'",
    ]


def test_the_command_without_its_extra_says_so_in_one_line(tmp_path: Path) -> None:
    code = BLOCKER + (
        "from pbkd.__main__ import main\ntry: main()\nexcept SystemExit as error: print(error.code)"
    )
    said = python(code, tmp_path, path=REPOSITORY)
    assert said.startswith("error: the command line needs")
    assert said.count("\n") == 1
    assert "pip install 'pbkd[pipeline]'" in said
