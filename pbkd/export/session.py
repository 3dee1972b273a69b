"""ONNX files run by onnxruntime on the CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pbkd.errors import ArtifactError, MissingExtraError
from pbkd.export.onnx_file import CLASS_NAMES, DIGEST, INPUT, OUTPUT

_ERRORS_ONLY = 3


class OnnxModel:
    """An ONNX file as a function: (N, C, H, W) float32 in [0, 1] to (N, K) logits, on the CPU.

    Args:
        path: a file of ``to_onnx`` or ``to_int8``.
        threads: within an operation, at least 1; operations run one after the other. None: as many
            as there are cores.

    Attributes:
        class_names: of the K logits, in order.
        digest: of the model that was exported.

    Raises:
        ArtifactError: the file is missing, or onnxruntime cannot read it.
        MissingExtraError: onnxruntime is not installed.
    """

    def __init__(self, path: Path, *, threads: int | None = None) -> None:
        try:
            import onnxruntime
        except ImportError:
            raise MissingExtraError("onnxruntime", "export", "running ONNX files") from None

        if not path.is_file():
            raise ArtifactError(f"{path} is missing; expected a file of `pbkd export`")
        try:
            self._session: Any = onnxruntime.InferenceSession(
                path, _options(threads), providers=["CPUExecutionProvider"]
            )
            notes = self._session.get_modelmeta().custom_metadata_map
            self.class_names = tuple(json.loads(notes[CLASS_NAMES]))
            self.digest = str(notes[DIGEST])
        except Exception as error:  # noqa: BLE001  onnxruntime's errors have no common class
            raise ArtifactError(f"{path} is no ONNX file of `pbkd export`: {error}") from None

    def __call__(self, x_nchw: Tensor) -> Tensor:
        """(N, C, H, W) float32 on the CPU to (N, K) float32."""
        images = x_nchw.detach().contiguous().numpy()
        (logits,) = self._session.run([OUTPUT], {INPUT: images})
        return torch.from_numpy(logits)


def runtime_version() -> str | None:
    """Version of onnxruntime; None where it is not installed."""
    try:
        import onnxruntime
    except ImportError:
        return None
    return str(onnxruntime.__version__)


def _options(threads: int | None) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    options.inter_op_num_threads = 1
    if threads is not None:
        options.intra_op_num_threads = threads
    # idle threads would spin while another model is measured
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options
