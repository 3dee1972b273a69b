"""`pbkd export`: the folder, what is said of it, and what is refused."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from pbkd.artifacts import Workspace, read_json, write_json
from pbkd.cli import app
from pbkd.data import load_prepared
from pbkd.errors import ArtifactError, ConfigError, DataError, ExportError
from pbkd.export import OnnxModel, Parity, load_pt2
from pbkd.export_model import default_folder, export_model, format_of
from pbkd.loading import load
from pbkd.models import read_card
from pbkd.report import read_metrics


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["export", *arguments], catch_exceptions=False)
    assert result.exit_code == 0
    return " ".join(result.output.split())


@pytest.fixture
def student(workspace: Workspace) -> str:
    (name,) = read_metrics(workspace.results).students
    return name


def test_int8_stands_beside_float32_with_the_accuracy_of_both(workspace, student):
    output = run(student, "--int8", "-o", "out")
    folder = workspace.root / "out"
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "class_names.json",
        "model-int8.onnx",
        "model.json",
        "model.onnx",
    ]
    assert "Exported to out" in output
    own = read_metrics(workspace.results).students[student].val_accuracy
    assert f"float32 {own:.2%}" in output
    val = load_prepared(workspace.prepared).split("val")
    images = torch.from_numpy(np.array(val.images)).float() / 255
    labels = torch.from_numpy(val.labels)
    small = OnnxModel(folder / "model-int8.onnx")
    accuracy = float((small(images).argmax(1) == labels).float().mean())
    assert f"accuracy on the validation split: {accuracy:.2%}, float32" in output
    whole = OnnxModel(folder / "model.onnx")
    with torch.no_grad():
        wanted = load(student)(images)
    assert torch.allclose(whole(images), wanted, atol=1e-4 * float(wanted.abs().max()))
    card = read_card(folder)
    assert small.digest == whole.digest == card.digest
    assert tuple(read_json(folder / "class_names.json")) == card.class_names == whole.class_names
    assert "100.0% of the answers are the same (216 validation images)" in output
    _readme_runs(folder / "README.md")
    with pytest.raises(ArtifactError, match="is not empty"):
        export_model(workspace, load(student), folder)


def _readme_runs(path) -> None:
    """The code of the card gives a class name."""
    code = path.read_text().split("```python\n")[1].split("```")[0]
    printed: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path.parent)
        exec(code, {"print": printed.append})
    assert printed[0] in read_json(path.parent / "class_names.json")


def test_pt2_needs_no_images_and_says_so(workspace, student):
    shutil.rmtree(workspace.prepared)
    output = run(student, "--format", "pt2")
    folder = workspace.root / "exported" / student
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "class_names.json",
        "model.json",
        "model.pt2",
    ]
    assert "(256 random images)" in output
    assert "compared on noise" in output
    assert load_pt2(folder / "model.pt2").digest == read_card(folder).digest
    _readme_runs(folder / "README.md")


def test_int8_without_the_models_images_is_refused_before_any_work(workspace, student):
    model = load(student)
    meta = workspace.prepared / "meta.json"
    write_json(meta, read_json(meta) | {"digest": "of other data"})
    with pytest.raises(DataError, match="after: pbkd prepare"):
        export_model(workspace, model, workspace.root / "out", int8=True)
    shutil.rmtree(workspace.prepared)
    with pytest.raises(DataError, match="none of this model's data"):
        export_model(workspace, model, workspace.root / "out", int8=True)
    assert not (workspace.root / "out").exists()


def test_a_file_that_computes_something_else_is_not_written(workspace, student, monkeypatch):
    wrong = Parity(max_difference=0.5, max_logit=2.0, same_predictions=0.9, num_images=1)
    monkeypatch.setattr("pbkd.export_model.parity", lambda *_: wrong)
    with pytest.raises(ExportError, match=r"differ by up to 0\.5"):
        export_model(workspace, load(student), workspace.root / "out", "pt2")
    assert not (workspace.root / "out").exists()


def test_formats_and_folders():
    assert format_of("onnx", int8=True) == "onnx"
    assert format_of("pt2", int8=False) == "pt2"
    with pytest.raises(ConfigError, match="got `tflite`, expected onnx or pt2"):
        format_of("tflite", int8=False)
    with pytest.raises(ConfigError, match="--int8 writes ONNX"):
        format_of("pt2", int8=True)
    assert default_folder("models:/digits/3").as_posix() == "exported/digits-3"
    assert default_folder("half").as_posix() == "exported/half"
    assert default_folder("some/folder").as_posix() == "exported/some-folder"
