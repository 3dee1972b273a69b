"""ONNX files: logits at any batch size, metadata, and that they are whole or absent."""

from __future__ import annotations

import copy
import json
import sys

import pytest
import torch
from torch import Tensor, nn

from pbkd.errors import ArtifactError, ExportError, MissingExtraError
from pbkd.export import TOLERANCE, OnnxModel, Parity, check_parity, parity, to_onnx
from tests.export.networks import CLASSES, images_of


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_logits_are_the_models_at_every_batch_size(files, batch_size):
    images = images_of(files.card, batch_size, seed=99)
    with torch.no_grad():
        wanted = files.model(images)
    logits = OnnxModel(files.onnx, threads=1)(images)
    assert logits.shape == (batch_size, len(CLASSES))
    assert (logits - wanted).abs().max() <= TOLERANCE * wanted.abs().max()
    if batch_size > 1:
        assert (wanted[0] - wanted[1]).abs().max() > 0.01 * wanted.abs().max()  # images matter


def test_the_file_stands_alone_and_says_what_it_is(files):
    import onnx

    assert sorted(path.name for path in files.onnx.parent.iterdir()) == [
        "model-int8.onnx",
        "model.onnx",
    ]
    proto = onnx.load(files.onnx, load_external_data=False)
    onnx.checker.check_model(proto, full_check=True)
    (images,), (logits,) = proto.graph.input, proto.graph.output
    assert (images.name, logits.name) == ("images", "logits")
    dims = images.type.tensor_type.shape.dim
    assert dims[0].dim_param
    assert tuple(dim.dim_value for dim in dims[1:]) == (3, *files.card.image_size)
    assert images.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    for path in (files.onnx, files.int8):
        model = OnnxModel(path)
        assert model.class_names == CLASSES
        assert model.digest == files.card.digest


def test_no_path_of_this_machine_is_in_the_file(files):
    for path in (files.onnx, files.int8):
        content = path.read_bytes()
        assert b"site-packages" not in content
        assert b"/pbkd/" not in content
        assert b", line " not in content


def test_equal_models_give_equal_bytes_and_the_model_stays_as_it_was(vgg, tmp_path, capfd):
    model = copy.deepcopy(vgg.model).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    to_onnx(model, vgg.card, tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == vgg.onnx.read_bytes()
    assert model.training
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert capfd.readouterr() == ("", "")


class Guessing(nn.Module):
    """A network whose path depends on the values of its images."""

    def forward(self, x_nchw: Tensor) -> Tensor:
        return x_nchw.mean((2, 3)) if x_nchw.sum().item() > 0 else x_nchw.amax((2, 3))


def test_a_network_that_cannot_be_traced_is_an_error_and_leaves_no_file(vgg, tmp_path):
    model = copy.deepcopy(vgg.model)
    model.net = Guessing()
    with pytest.raises(ExportError, match="cannot be traced for ONNX"):
        to_onnx(model, vgg.card, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_library_is_told_with_its_extra(vgg, tmp_path, monkeypatch):
    for name in ("onnx", "onnxscript", "onnxruntime"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtraError, match=r"pip install 'pbkd\[export\]'"):
        to_onnx(vgg.model, vgg.card, tmp_path / "model.onnx")
    with pytest.raises(MissingExtraError, match="onnxruntime"):
        OnnxModel(vgg.onnx)


def test_what_is_no_file_of_ours_is_an_error(vgg, tmp_path):
    import onnx

    with pytest.raises(ArtifactError, match="is missing"):
        OnnxModel(tmp_path / "absent.onnx")
    (tmp_path / "torn.onnx").write_bytes(vgg.onnx.read_bytes()[:5000])
    foreign = onnx.load(vgg.onnx)
    del foreign.metadata_props[:]
    onnx.save_model(foreign, tmp_path / "foreign.onnx")
    for name in ("torn", "foreign"):
        with pytest.raises(ArtifactError, match="is no ONNX file of `pbkd export`"):
            OnnxModel(tmp_path / f"{name}.onnx")


# ---------------------------------------------------------------- parity


def test_parity_of_a_good_file(files):
    found = parity(files.model, OnnxModel(files.onnx), images_of(files.card, 70, seed=7))
    assert found.is_close
    assert found.same_predictions == 1
    assert found.num_images == 70
    check_parity(found, "the file")


def test_a_model_that_changed_since_is_found(vgg):
    changed = copy.deepcopy(vgg.model)
    with torch.no_grad():
        changed.net.classifier.bias[2] += 0.01
    found = parity(changed, OnnxModel(vgg.onnx), images_of(vgg.card, 5))
    assert found.max_difference == pytest.approx(0.01, rel=1e-2)
    with pytest.raises(ExportError, match="does not compute what the model computes"):
        check_parity(found, "the file")


def test_parity_counts_answers(vgg):
    images = images_of(vgg.card, 8)

    def turned(x_nchw: Tensor) -> Tensor:
        with torch.no_grad():
            logits = vgg.model(x_nchw)
        return -logits if len(logits) == 1 else logits  # the first image is passed alone

    assert parity(vgg.model, turned, images).same_predictions == 7 / 8


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_close(broken):
    assert not Parity(broken, 1.0, 1.0, 1).is_close
    assert not Parity(broken, broken, 1.0, 1).is_close
    assert Parity(0.0, 0.0, 1.0, 1).is_close


def test_metadata_are_json(vgg):
    import onnx

    entries = {entry.key: entry.value for entry in onnx.load(vgg.onnx).metadata_props}
    assert tuple(json.loads(entries["pbkd.class_names"])) == CLASSES
