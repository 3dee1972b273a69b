"""`pbkd init`: what it makes is a workspace that DVC and git know, and that runs."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from pbkd.config import load_params
from pbkd.errors import ArtifactError, ConfigError, DataError
from pbkd.workspace_init import PRESETS, init_workspace

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _bare_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No repository around, no settings of the user's."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    for name in [name for name in os.environ if name.startswith("GIT_DIR")]:
        monkeypatch.delenv(name)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A zip of two classes."""
    rng = np.random.default_rng(0)
    path = tmp_path / "animals.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("cat", "dog"):
            for index in range(12):
                pixels = rng.integers(0, 256, (10, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "one.png")
                archive.write(tmp_path / "one.png", f"animals/{name}/{index}.png")
    return path


def run(folder: Path, *command: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_makes_a_workspace_whose_parameters_load(tmp_path: Path, preset: str) -> None:
    folder = tmp_path / "deep" / "workspace"
    params = load_params(init_workspace(folder, preset))
    assert params.prepare.path == "data/raw"
    assert (folder / "data" / "raw").is_dir()
    assert (folder / ".git").is_dir()
    assert (folder / ".dvc" / "config").is_file()
    assert ".pbkd/" in (folder / ".dvcignore").read_text()
    text = (folder / "params.yaml").read_text()
    names = {"digits": "vgg_small", "cifar10-vgg16": "cifar_vgg16", "image-folder": "resnet18"}
    assert params.teacher.model == names.get(preset, "cifar_resnet20")
    assert set(yaml.safe_load(text)) == {
        "seed",
        *yaml.safe_load((folder / "dvc.yaml").read_text())["stages"],
    }


def test_the_images_are_tracked_and_prepare_runs_under_dvc(tmp_path: Path, images: Path) -> None:
    folder = tmp_path / "workspace"
    params = init_workspace(folder, "image-folder", images)
    assert load_params(params).prepare.path == "data/raw/animals.zip"
    assert (folder / "data" / "raw" / "animals.zip").read_bytes() == images.read_bytes()
    assert (folder / "data" / "raw" / "animals.zip.dvc").is_file()
    run(folder, "dvc", "repro", "prepare")
    lock = yaml.safe_load((folder / "dvc.lock").read_text())
    assert lock["stages"]["prepare"]["deps"][0]["path"] == "data/raw/animals.zip"
    ignored = subprocess.run(
        ["git", "check-ignore", "data/raw/animals.zip", "data/prepared", ".pbkd", "artifacts/x"],
        cwd=folder, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ignored.stdout.split() == [
        "data/raw/animals.zip",
        "data/prepared",
        ".pbkd",
        "artifacts/x",
    ]
    assert "up to date" in run(folder, "dvc", "status", "prepare")


def test_a_name_with_signs_of_yaml_stays_whole(tmp_path: Path, images: Path) -> None:
    odd = images.rename(tmp_path / "my #1: cats & dogs.zip")
    params = init_workspace(tmp_path / "work space", "image-folder", odd)
    assert load_params(params).prepare.path == "data/raw/my #1: cats & dogs.zip"
    assert "prepare" in run(params.parent, "dvc", "stage", "list")


def test_a_folder_of_images_becomes_data_raw(tmp_path: Path, images: Path) -> None:
    with zipfile.ZipFile(images) as archive:
        archive.extractall(tmp_path / "plain")
    folder = tmp_path / "workspace"
    params = init_workspace(folder, "image-folder", tmp_path / "plain")
    assert load_params(params).prepare.path == "data/raw"
    assert len(list((folder / "data" / "raw").rglob("*.png"))) == 24
    assert (folder / "data" / "raw.dvc").is_file()


def test_images_in_the_workspace_stay_where_they_are(tmp_path: Path, images: Path) -> None:
    folder = tmp_path / "workspace"
    (folder / "mine").mkdir(parents=True)
    images.rename(folder / "mine" / "animals.zip")
    params = init_workspace(folder, "image-folder", folder / "mine" / "animals.zip")
    assert load_params(params).prepare.path == "mine/animals.zip"
    assert (folder / "mine" / "animals.zip.dvc").is_file()


@pytest.mark.parametrize(
    ("link", "expected"),
    [("animals.zip", "data/raw/animals.zip"), ("workspace/mine.zip", "mine.zip")],
)
def test_a_link_to_an_archive_gives_its_own_name(
    tmp_path: Path, images: Path, link: str, expected: str
) -> None:
    target = images.rename(tmp_path / "0a1b2c")
    (tmp_path / "workspace").mkdir()
    (tmp_path / link).symlink_to(target)
    params = init_workspace(tmp_path / "workspace", "image-folder", tmp_path / link)
    assert load_params(params).prepare.path == expected
    assert (params.parent / expected).read_bytes() == target.read_bytes()
    assert (params.parent / f"{expected}.dvc").is_file()
    run(params.parent, "dvc", "repro", "prepare")


def test_a_folder_within_a_repository_becomes_a_project_of_its_own(tmp_path: Path) -> None:
    subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True)
    init_workspace(tmp_path / "sub", "digits")
    assert not (tmp_path / "sub" / ".git").exists()
    assert (tmp_path / "sub" / ".dvc").is_dir()
    assert "prepare" in run(tmp_path / "sub", "dvc", "stage", "list")


def test_a_file_that_is_there_is_kept(tmp_path: Path) -> None:
    folder = tmp_path / "workspace"
    folder.mkdir()
    (folder / "README.md").write_text("mine\n")
    (folder / ".gitignore").write_text("secret\n/artifacts/\n")
    init_workspace(folder, "digits")
    assert (folder / "README.md").read_text() == "mine\n"
    lines = (folder / ".gitignore").read_text().splitlines()
    assert lines[:2] == ["secret", "/artifacts/"]
    assert lines.count("/artifacts/") == 1
    assert "/.pbkd/" in lines


def test_what_cannot_be_is_told_and_leaves_nothing(tmp_path: Path, images: Path) -> None:
    folder = tmp_path / "workspace"
    with pytest.raises(ConfigError, match="--preset: got `cifar`, expected one of digits, "):
        init_workspace(folder, "cifar")
    with pytest.raises(ConfigError, match="digits brings its own images"):
        init_workspace(folder, "digits", images)
    with pytest.raises(DataError, match=r"--data: .*none\.zip does not exist"):
        init_workspace(folder, "image-folder", tmp_path / "none.zip")
    assert not folder.exists()


def test_a_workspace_is_not_made_twice(tmp_path: Path) -> None:
    before = init_workspace(tmp_path / "workspace", "digits").read_text()
    with pytest.raises(ArtifactError, match=r"has a params\.yaml already"):
        init_workspace(tmp_path / "workspace", "cifar10-vgg16")
    assert (tmp_path / "workspace" / "params.yaml").read_text() == before


def test_a_machine_without_git_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ArtifactError, match="`git` is not installed"):
        init_workspace(tmp_path / "workspace", "digits")


@pytest.mark.parametrize(
    ("own", "preset"), [("dvc.yaml", "pipeline.yaml"), ("params.yaml", "digits.yaml")]
)
def test_the_repository_is_a_workspace_like_any_other(own: str, preset: str) -> None:
    presets = REPOSITORY / "pbkd" / "presets"
    assert (REPOSITORY / own).read_text() == (presets / preset).read_text()


def test_dvc_reads_one_pipeline_in_the_repository() -> None:
    found = [path.parent for path in REPOSITORY.rglob("dvc.yaml") if ".venv" not in path.parts]
    assert found == [REPOSITORY]
