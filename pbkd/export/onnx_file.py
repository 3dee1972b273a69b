"""ONNX files: the whole model, its normalisation inside, for any batch size.

Input ``images``: (N, C, H, W) float32 in [0, 1]; output ``logits``: (N, K) float32. The metadata
hold the class names and the model's digest.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from pbkd._version import __version__
from pbkd.artifacts import atomic_path
from pbkd.errors import ExportError, MissingExtraError
from pbkd.export.tracing import dynamic_batch, example_images, traceable
from pbkd.models import Classifier, ModelCard

if TYPE_CHECKING:
    from onnx import ModelProto

INPUT = "images"
OUTPUT = "logits"
CLASS_NAMES = "pbkd.class_names"
DIGEST = "pbkd.digest"
_VERSION = "pbkd.version"
_MAX_BYTES = 2_000_000_000  # a message of protobuf ends at 2 GiB
_LIBRARIES = ("onnx", "onnxscript", "onnxruntime")


def onnx_is_installed() -> bool:
    """Whether the libraries of the extra `export` are there."""
    return all(importlib.util.find_spec(name) is not None for name in _LIBRARIES)


def to_onnx(model: Classifier, card: ModelCard, path: Path) -> None:
    """Write one file, whole or not at all; equal models give equal bytes.

    Args:
        model: stays as it is, on whatever device.
        card: of the model; it gives the size of the images, the class names and the digest.

    Raises:
        ExportError: the network cannot be traced, or is too large for one file.
        MissingExtraError: onnx or onnxscript is not installed.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401  torch asks for it, late and with another error
    except ImportError:
        raise MissingExtraError("onnx with onnxscript", "export", "ONNX") from None

    if sum(tensor.nbytes for tensor in model.state_dict().values()) > _MAX_BYTES:
        raise ExportError(
            f"{card.network.name} has more than {_MAX_BYTES / 1e9:g} GB of weights, which do not "
            "fit into one ONNX file; export it as pt2"
        )
    try:
        program = torch.onnx.export(
            traceable(model),
            (example_images(card),),
            dynamo=True,
            dynamic_shapes=dynamic_batch(),
            input_names=[INPUT],
            output_names=[OUTPUT],
            verbose=False,
        )
    except Exception as error:  # whatever a network of the user's does to a tracer
        raise ExportError(
            f"{card.network.name} cannot be traced for ONNX: {_first_line(error)}; its forward "
            "must not depend on the values or the number of the images"
        ) from error
    assert program is not None
    proto: ModelProto = program.model_proto
    _remove_traces(proto)
    _describe(proto, card)
    with atomic_path(path) as temporary:
        onnx.save_model(proto, temporary)


def _remove_traces(proto: ModelProto) -> None:
    """Take out lines of source with the paths of this machine, and notes of the tracer."""
    graph = proto.graph
    for part in (*graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        del part.metadata_props[:]
        part.doc_string = ""
    del graph.metadata_props[:]
    graph.doc_string = proto.doc_string = ""


def _describe(proto: ModelProto, card: ModelCard) -> None:
    entries = {
        CLASS_NAMES: json.dumps(card.class_names),
        DIGEST: card.digest,
        _VERSION: __version__,
    }
    del proto.metadata_props[:]
    for key, value in entries.items():
        proto.metadata_props.add(key=key, value=value)


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0].strip() if lines else ''}"
