"""int8 files: smaller, close to the model, repeatable, and really in int8."""

from __future__ import annotations

import copy
import logging
import math
import sys

import pytest
import torch

from pbkd.errors import ExportError, MissingExtraError
from pbkd.export import OnnxModel, parity, to_int8, to_onnx
from tests.export.networks import images_of


def test_int8_is_smaller_and_close_to_the_model(files):
    assert files.int8.stat().st_size < 0.5 * files.onnx.stat().st_size
    found = parity(files.model, OnnxModel(files.int8), images_of(files.card, 100, seed=8))
    assert found.max_difference > 0
    if files.card.network.name == "mobilenet_v3_small":  # deep, and of random weights
        assert found.same_predictions >= 0.6  # of five classes
    else:
        assert found.max_difference < 0.25 * found.max_logit
        assert found.same_predictions >= 0.8


def test_convolutions_are_int8_and_a_small_stem_and_a_small_last_layer_are_not(files):
    import onnx

    graph = onnx.load(files.int8).graph
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    made_by = {output: node for node in graph.node for output in node.output}
    convolutions = [node for node in graph.node if node.op_type == "Conv"]
    assert len(convolutions) > 3
    stem, *others = convolutions
    window = next(tensor.dims[1:] for tensor in graph.initializer if tensor.name == stem.input[1])
    assert math.prod(window) == 27
    assert types[stem.input[1]] == onnx.TensorProto.FLOAT
    for node in others:
        source = made_by[node.input[1]]
        assert source.op_type == "DequantizeLinear"
        assert types[source.input[0]] == onnx.TensorProto.INT8
    last = made_by["logits"]
    assert last.op_type == "Gemm"
    assert types[last.input[1]] == onnx.TensorProto.FLOAT


def test_no_pair_of_products_overflows_16_bits(files):
    import onnx

    for tensor in onnx.load(files.int8).graph.initializer:
        if tensor.data_type == onnx.TensorProto.INT8:
            weight = onnx.numpy_helper.to_array(tensor).astype(int)
            assert 2 * 255 * abs(weight).max() < 2**15, tensor.name


def test_batch_norm_is_folded(vgg):
    import onnx

    kinds = {node.op_type for node in onnx.load(vgg.int8).graph.node}
    assert "Conv" in kinds
    assert "BatchNormalization" not in kinds


def test_a_batch_norm_without_a_convolution_stays_in_float(vgg, tmp_path):
    import onnx

    model = copy.deepcopy(vgg.model)
    path = next(
        name
        for name, module in reversed(list(model.net.named_modules()))
        if isinstance(module, torch.nn.Conv2d) and module.in_channels == module.out_channels
    )
    parent, _, child = path.rpartition(".")
    setattr(model.net.get_submodule(parent), child, torch.nn.Identity())
    norm = next(m for m in reversed(list(model.modules())) if isinstance(m, torch.nn.BatchNorm2d))
    norm.weight.data.mul_(torch.logspace(-2, 2, norm.num_features))
    norm.bias.data.zero_()
    norm.running_mean.zero_()
    model.net.classifier.weight.data.div_(norm.weight.data)  # small channels say as much
    to_onnx(model, vgg.card, tmp_path / "float.onnx")
    to_int8(tmp_path / "float.onnx", images_of(vgg.card, 100), tmp_path / "int8.onnx")
    graph = onnx.load(tmp_path / "int8.onnx").graph
    (left,) = (node for node in graph.node if node.op_type == "BatchNormalization")
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    assert {types[name] for name in left.input[1:]} == {onnx.TensorProto.FLOAT}
    found = parity(model, OnnxModel(tmp_path / "int8.onnx"), images_of(vgg.card, 100, seed=8))
    assert found.same_predictions >= 0.8


def test_a_large_stem_is_int8(vgg, tmp_path):
    import onnx

    model = copy.deepcopy(vgg.model)
    stem = model.net.features[0]
    model.net.features[0] = torch.nn.Conv2d(3, stem.out_channels, 7, padding=3)
    to_onnx(model, vgg.card, tmp_path / "large.onnx")
    to_int8(tmp_path / "large.onnx", images_of(vgg.card, 40), tmp_path / "int8.onnx")
    graph = onnx.load(tmp_path / "int8.onnx").graph
    first = next(node for node in graph.node if node.op_type == "Conv")
    assert first.input[1] not in {tensor.name for tensor in graph.initializer}


def test_a_large_last_layer_is_int8(vgg, tmp_path):
    import onnx

    model = copy.deepcopy(vgg.model)
    model.net.classifier = torch.nn.Linear(model.net.classifier.in_features, 2000)
    to_onnx(model, vgg.card, tmp_path / "wide.onnx")
    to_int8(tmp_path / "wide.onnx", images_of(vgg.card, 40), tmp_path / "int8.onnx")
    graph = onnx.load(tmp_path / "int8.onnx").graph
    (last,) = (node for node in graph.node if node.op_type == "Gemm")
    assert last.input[1] not in {tensor.name for tensor in graph.initializer}


def test_equal_images_give_equal_bytes_in_silence(vgg, tmp_path, capfd, caplog):
    with caplog.at_level(logging.INFO):
        to_int8(vgg.onnx, images_of(vgg.card, 40, seed=500), tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == vgg.int8.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["again.onnx"]
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []


def test_ranges_come_from_all_images(vgg, tmp_path):
    images = images_of(vgg.card, 40, seed=500)
    images[-1] = 0  # in the second batch
    paths = [tmp_path / "all.onnx", tmp_path / "first.onnx"]
    to_int8(vgg.onnx, images, paths[0])
    to_int8(vgg.onnx, images[:39], paths[1])
    assert paths[0].read_bytes() != paths[1].read_bytes()


def test_another_calibration_works_in_silence(vgg, tmp_path, capfd):
    path = tmp_path / "other.onnx"
    to_int8(vgg.onnx, images_of(vgg.card, 40, seed=500), path, calibration="Percentile")
    assert path.read_bytes() != vgg.int8.read_bytes()
    assert capfd.readouterr() == ("", "")
    found = parity(vgg.model, OnnxModel(path), images_of(vgg.card, 50, seed=8))
    assert found.same_predictions >= 0.8


def test_what_cannot_be_quantized_is_an_error_and_leaves_no_file(vgg, tmp_path):
    torn = tmp_path / "torn.onnx"
    torn.write_bytes(vgg.onnx.read_bytes()[:5000])
    with pytest.raises(ExportError, match="cannot be quantized"):
        to_int8(torn, images_of(vgg.card, 2), tmp_path / "int8.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["torn.onnx"]


def test_a_missing_library_is_told(vgg, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime.quantization", None)
    with pytest.raises(MissingExtraError, match=r"pbkd\[export\]"):
        to_int8(vgg.onnx, images_of(vgg.card, 2), tmp_path / "int8.onnx")
