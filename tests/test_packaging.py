"""Wheel and sdist: what is in them, and that a wheel is enough to work."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import pbkd

ROOT = Path(__file__).parents[1]
NEEDED = ("pbkd", "flows", "tests", "docs", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in")
BUILD = """
import sys
from setuptools import build_meta
folder = sys.argv[1]  # setuptools changes sys.argv
print(build_meta.build_wheel(folder), build_meta.build_sdist(folder))
"""
ONLY_CORE = """
import importlib.abc, importlib, pkgutil, sys

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in sys.argv[1].split():
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
import pbkd
for module in "api loading arrays compression testing export shrink report".split():
    importlib.import_module(f"pbkd.{module}")
for package in "blocks activations plan distill students models data measure".split():
    found = importlib.import_module(f"pbkd.{package}")
    for module in pkgutil.iter_modules(found.__path__):
        importlib.import_module(f"pbkd.{package}.{module.name}")
pbkd.compress, pbkd.load
"""
EXTRAS = (
    "typer rich click prefect fastapi dvc mlflow psutil pynvml matplotlib jinja2 sklearn "
    "constriction torch_pruning onnx onnxscript onnxruntime ray flows"
)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Wheel and sdist, of a copy: setuptools writes into the folder that it builds."""
    copy = tmp_path_factory.mktemp("source")
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in NEEDED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, copy)
    done = subprocess.run(
        [sys.executable, "-c", BUILD, str(copy / "out")],
        cwd=copy, text=True, capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    wheel, sdist = done.stdout.split()[-2:]
    return copy / "out" / wheel, copy / "out" / sdist


def files_of_wheel(wheel: Path) -> set[str]:
    return set(zipfile.ZipFile(wheel).namelist())


def sources() -> set[str]:
    return {
        str(path.relative_to(ROOT))
        for package in ("pbkd", "flows")
        for path in (ROOT / package).rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }


def test_the_wheel_has_both_packages_whole_and_nothing_else(built):
    files = files_of_wheel(built[0])
    packaged = {name for name in files if ".dist-info/" not in name}
    assert packaged == sources()
    assert {"pbkd/py.typed", "pbkd/report/page.html", "pbkd/presets/digits.yaml"} <= packaged


def test_the_metadata_is_whole(built):
    with zipfile.ZipFile(built[0]) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith("/METADATA"))
        metadata = Parser().parsestr(wheel.read(name).decode())
        entry = wheel.read(name.replace("METADATA", "entry_points.txt")).decode()
    assert metadata["Version"] == pbkd.__version__
    assert metadata["Requires-Python"] == "<3.14,>=3.11"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert "Typing :: Typed" in metadata.get_all("Classifier")
    extras = {"pipeline", "digits", "shrink", "export", "ray", "docs", "dev"}
    assert set(metadata.get_all("Provides-Extra")) == extras
    assert "pbkd = pbkd.cli:main" in entry


def test_the_sdist_builds_the_same_wheel(built, tmp_path):
    wheel, sdist = built
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (folder,) = tmp_path.iterdir()
    assert not (folder / "tests").exists()
    assert (folder / "docs" / "index.md").is_file()
    done = subprocess.run(
        [sys.executable, "-c", BUILD, str(tmp_path)], cwd=folder, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    assert files_of_wheel(tmp_path / wheel.name) == files_of_wheel(wheel)


def test_an_unpacked_wheel_works(built, tmp_path):
    with zipfile.ZipFile(built[0]) as wheel:
        wheel.extractall(tmp_path / "site")
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site"), "PYTHONSAFEPATH": "1"}

    def python(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=tmp_path, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout
        return done.stdout

    where = python("-c", "import pbkd, flows; print(pbkd.__file__, flows.__path__[0])").split()
    assert all(Path(place).is_relative_to(tmp_path / "site") for place in where)
    assert pbkd.__version__ in python("-m", "pbkd.cli", "--version")
    python("-m", "pbkd.cli", "init", "made", "--preset", "digits")
    assert (tmp_path / "made" / "dvc.yaml").read_text() == (ROOT / "dvc.yaml").read_text()


def test_the_library_needs_no_extra():
    done = subprocess.run(
        [sys.executable, "-c", ONLY_CORE, EXTRAS], cwd=ROOT, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr
