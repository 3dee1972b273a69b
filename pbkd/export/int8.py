"""ONNX files in int8: weights and activations, by onnxruntime's static quantization.

Activations have 8 bits without sign, their ranges are those seen on calibration images. Weights
have a scale per output channel and take 7 of int8's bits: x86 without VNNI adds pairs of products
in 16 bits, which 8 bits overflow, and the same file would answer worse there. Batch norm is folded
into the convolutions first. The layer that gives the logits stays in float32 where it is small: it
costs no time, and the logits are several times closer. So does a batch norm that no convolution
takes up, and a convolution on the images that adds up few products: it is faster so. Depthwise
convolutions are int8 like others: in float32 they are slower. docs/export.md has the figures.
"""

from __future__ import annotations

import io
import logging
import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from pbkd.artifacts import atomic_path
from pbkd.errors import ExportError, MissingExtraError
from pbkd.export.onnx_file import INPUT, OUTPUT

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from onnx import ModelProto

Calibration = Literal["MinMax", "Entropy", "Percentile"]

_BATCH = 32
_SMALL = 0.05
"""Up to this share of the weights, the last layer stays in float32."""
_FEW = 32
"""Up to so many products per output, 3x3 of RGB being 27, so do convolutions on the images."""


def to_int8(
    source: Path, images_nchw: Tensor, path: Path, *, calibration: Calibration = "MinMax"
) -> None:
    """Write an int8 version of an ONNX file, whole or not at all.

    Args:
        source: a float32 file of ``to_onnx``; its metadata are kept.
        images_nchw: (N, C, H, W) float32 in [0, 1], N >= 1: calibration images, not augmented.
        calibration: how the range of an activation is found; docs/export.md compares them.

    Raises:
        ExportError: onnxruntime cannot quantize the file.
        MissingExtraError: onnx or onnxruntime is not installed.
    """
    try:
        import onnx
        from onnxruntime.quantization import (
            CalibrationMethod,
            QuantFormat,
            QuantType,
            quantize_static,
        )
        from onnxruntime.quantization.shape_inference import quant_pre_process
    except ImportError:
        raise MissingExtraError("onnx with onnxruntime", "export", "int8") from None

    assert len(images_nchw) >= 1
    with (
        tempfile.TemporaryDirectory(prefix="pbkd-") as temporary,
        atomic_path(path) as target,
        _quiet(),
    ):
        folded = Path(temporary) / "folded.onnx"
        try:
            quant_pre_process(source, folded)
            quantize_static(
                folded,
                target,
                _reader(images_nchw),
                quant_format=QuantFormat.QDQ,
                nodes_to_exclude=_kept_in_float(onnx.load(folded)),
                per_channel=True,
                reduce_range=True,  # 7 bits: 2 * 255 * 64 < 2**15
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                calibrate_method=CalibrationMethod[calibration],
                # a batch at a time: the activations of all would not fit into memory
                extra_options={"CalibStridedMinMax": 1, "CalibTensorRangeSymmetric": False},
            )
        except Exception as error:  # onnxruntime's errors have no common class of their own
            raise ExportError(
                f"{source} cannot be quantized by onnxruntime: {type(error).__name__}: {error}; "
                "export it without --int8"
            ) from error
        _copy_metadata(onnx.load(source, load_external_data=False), target)


def _reader(images_nchw: Tensor) -> Any:
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        """Gives batches of a range that the calibrator sets, a batch at a time."""

        def __init__(self) -> None:
            self._batches = [batch.numpy() for batch in torch.split(images_nchw, _BATCH)]
            self._range = iter(range(len(self._batches)))

        def __len__(self) -> int:
            return len(self._batches)

        def set_range(self, start_index: int, end_index: int) -> None:
            self._range = iter(range(start_index, end_index))

        def get_next(self) -> dict[str, NDArray[np.float32]] | None:
            index = next(self._range, None)
            return None if index is None else {INPUT: self._batches[index]}

    return Reader()


def _kept_in_float(model: ModelProto) -> list[str]:
    """Names of nodes: what gives the logits, where it holds few of the weights, batch norms, stems.

    A batch norm that could not be folded (its convolution was replaced by nothing) scales channels
    by very different factors; a range per tensor would round the small ones away.
    """
    sizes = {tensor.name: math.prod(tensor.dims) for tensor in model.graph.initializer}
    limit = _SMALL * sum(sizes.values())
    return [
        node.name
        for node in model.graph.node
        if node.op_type == "BatchNormalization"
        or (OUTPUT in node.output and sum(sizes.get(name, 0) for name in node.input) <= limit)
    ] + _stems(model)


def _stems(model: ModelProto) -> list[str]:
    """Names of convolutions on the normalised images that add up few products per output."""
    weights = {tensor.name: tensor.dims for tensor in model.graph.initializer}
    images = {INPUT}
    found = []
    for node in model.graph.node:
        if node.op_type in ("Sub", "Div") and node.input[0] in images:
            images.update(node.output)
        elif node.op_type == "Conv" and node.input[0] in images and node.input[1] in weights:
            _, *window = weights[node.input[1]]
            if math.prod(window) <= _FEW:
                found.append(node.name)
    return found


def _copy_metadata(source: ModelProto, path: Path) -> None:
    import onnx

    quantized = onnx.load(path)
    del quantized.metadata_props[:]
    quantized.metadata_props.extend(source.metadata_props)
    onnx.save_model(quantized, path)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what onnxruntime prints, and logs to the root logger, of each tensor."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        root.setLevel(level)
