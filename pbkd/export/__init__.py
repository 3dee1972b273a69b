"""Finished models as files for other programs: ONNX, ONNX in int8, torch.export; run and timed."""

from pbkd.export.images import accuracy_of, first_images
from pbkd.export.int8 import to_int8
from pbkd.export.latencies import Runtime, RuntimeLatency, TimedModel, runtime_latencies
from pbkd.export.onnx_file import onnx_is_installed, to_onnx
from pbkd.export.parity import TOLERANCE, Parity, check_parity, parity
from pbkd.export.pt2 import load_pt2, to_pt2
from pbkd.export.session import OnnxModel, runtime_version

__all__ = [
    "TOLERANCE",
    "OnnxModel",
    "Parity",
    "Runtime",
    "RuntimeLatency",
    "TimedModel",
    "accuracy_of",
    "check_parity",
    "first_images",
    "load_pt2",
    "onnx_is_installed",
    "parity",
    "runtime_latencies",
    "runtime_version",
    "to_int8",
    "to_onnx",
    "to_pt2",
]
