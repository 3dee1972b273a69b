"""``pbkd export``: a finished model as files for other programs, checked against the model.

A folder with ``model.onnx`` or ``model.pt2``, ``model-int8.onnx`` where it is asked for,
``model.json``, ``class_names.json`` and a README.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from pbkd.artifacts import Workspace, atomic_dir, write_json
from pbkd.config import AugmentConfig
from pbkd.data import Prepared, Stream, load_prepared
from pbkd.errors import ArtifactError, ConfigError, DataError
from pbkd.export import (
    OnnxModel,
    Parity,
    accuracy_of,
    check_parity,
    first_images,
    load_pt2,
    parity,
    to_int8,
    to_onnx,
    to_pt2,
)
from pbkd.export.onnx_file import CLASS_NAMES as METADATA_CLASS_NAMES
from pbkd.export.onnx_file import INPUT, OUTPUT
from pbkd.exporting import README, check_free
from pbkd.loading import Model
from pbkd.models import predict
from pbkd.models.checkpoint import CARD
from pbkd.report.numbers import size_text

Format = Literal["onnx", "pt2"]

PARITY_IMAGES = 256
"""Validation images, at most, on which a file is compared with its model."""

CALIBRATION_IMAGES = 256
"""Training images, at most, from which int8 takes its ranges."""

CLASS_NAMES = "class_names.json"
_FILES: dict[Format, str] = {"onnx": "model.onnx", "pt2": "model.pt2"}
_INT8 = "model-int8.onnx"
_BATCH = 256


@dataclass(frozen=True)
class ExportedFile:
    """A file, and how it compares with its model.

    Attributes:
        val_accuracy: 0 to 1; None where it was not asked for.
    """

    name: str
    size_bytes: int
    parity: Parity
    val_accuracy: float | None = None


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        on_real_images: whether the files were compared on validation images, not on noise.
        val_accuracy: the model's own, 0 to 1; None where int8 was not asked for.
    """

    folder: Path
    files: tuple[ExportedFile, ...]
    on_real_images: bool
    val_accuracy: float | None = None

    @property
    def sentences(self) -> list[str]:
        """What a user wants to know, a line per file."""
        images = "validation images" if self.on_real_images else "random images"
        lines = []
        for file in self.files:
            found = file.parity
            lines.append(
                f"{file.name}: {size_text(file.size_bytes)}; logits differ by up to "
                f"{found.max_difference:.2g} (the largest is {found.max_logit:.3g}), "
                f"{found.same_predictions:.1%} of the answers are the same "
                f"({found.num_images} {images})"
            )
            if file.val_accuracy is not None and self.val_accuracy is not None:
                points = 100 * (file.val_accuracy - self.val_accuracy)
                lines.append(
                    f"  accuracy on the validation split: {file.val_accuracy:.2%}, float32 "
                    f"{self.val_accuracy:.2%} ({points:+.2f} points)"
                )
        if not self.on_real_images:
            lines.append(
                "There are no prepared images of this model here, so it was compared on noise; "
                "export it in its workspace to compare it on real images."
            )
        return lines


def format_of(text: str, *, int8: bool) -> Format:
    """The format that a user names; ConfigError where it is none, or not one of int8."""
    if text not in _FILES:
        raise ConfigError(f"--format: got `{text}`, expected {' or '.join(_FILES)}")
    if int8 and text != "onnx":
        raise ConfigError(f"--int8 writes ONNX; leave it out, or --format {text}")
    return text


def default_folder(name: str) -> Path:
    """Where a model goes that is exported without a folder: `exported/NAME`."""
    return Path("exported") / name.removeprefix("models:").strip("/").replace("/", "-")


def export_model(
    workspace: Workspace,
    model: Model,
    folder: Path,
    format_: Format = "onnx",
    *,
    int8: bool = False,
) -> Exported:
    """Write a model into a new folder, all of it or nothing.

    Args:
        workspace: whose prepared images the files are compared on, if they are of the model's data.
        format_: onnx, or pt2 (torch.export).
        int8: whether an int8 file is written, too; with onnx alone.

    Raises:
        ArtifactError: the folder is not empty.
        DataError: int8 is asked for, and the workspace has no images for it.
        ExportError: the model cannot be exported, or a file computes something else.
        MissingExtraError: onnx, onnxscript or onnxruntime is not installed.
    """
    check_free(folder)
    assert format_ == "onnx" or not int8
    prepared = _images_of(workspace, model)
    if int8 and prepared is None:
        raise DataError(
            f"int8 takes its ranges from training images, and {workspace.prepared} has none of "
            "this model's data; run this in the model's workspace, after: pbkd prepare"
        )
    images = (
        first_images(prepared.split("val"), PARITY_IMAGES)
        if prepared is not None
        else torch.rand(PARITY_IMAGES, model.card.network.in_channels, *model.card.image_size)
    )
    with atomic_dir(folder.absolute()) as temporary:
        path = temporary / _FILES[format_]
        if format_ == "onnx":
            to_onnx(model, model.card, path)
            found = parity(model, OnnxModel(path), images)
        else:
            to_pt2(model, model.card, path)
            found = parity(model, load_pt2(path).module, images)
        check_parity(found, path.name)
        files = [ExportedFile(path.name, path.stat().st_size, found)]
        val_accuracy = None
        if int8:
            assert prepared is not None
            files.append(_int8_file(model, prepared, path, images))
            val_accuracy = _own_accuracy(model, prepared)
        exported = Exported(folder, tuple(files), prepared is not None, val_accuracy)
        write_json(temporary / CARD, model.card)
        write_json(temporary / CLASS_NAMES, list(model.class_names))
        (temporary / README).write_text(_readme(model, exported, format_))
    return exported


def _images_of(workspace: Workspace, model: Model) -> Prepared | None:
    """The workspace's prepared data, where they are those of the model."""
    try:
        prepared = load_prepared(workspace.prepared)
    except ArtifactError:
        return None
    return prepared if prepared.meta.digest == model.card.data_digest else None


def _int8_file(
    model: Model, prepared: Prepared, source: Path, images: torch.Tensor
) -> ExportedFile:
    path = source.with_name(_INT8)
    to_int8(source, first_images(prepared.split("train"), CALIBRATION_IMAGES), path)
    session = OnnxModel(path)
    return ExportedFile(
        path.name,
        path.stat().st_size,
        parity(model, session, images),
        accuracy_of(session, prepared.split("val")),
    )


def _own_accuracy(model: Model, prepared: Prepared) -> float:
    stream = Stream(prepared.split("val"), seed=0, augment=AugmentConfig())
    return predict(model, stream, batch_size=_BATCH).accuracy


def _readme(model: Model, exported: Exported, format_: Format) -> str:
    card = model.card
    channels, (height, width) = card.network.in_channels, card.image_size
    replaced = f", {len(card.replacements)} blocks replaced" if card.replacements else ""
    size = (channels, height, width)
    usage = _onnx_usage(size) if format_ == "onnx" else _pt2_usage(size)
    files = "\n".join(f"- {line}" for line in exported.sentences)
    return f"""# {card.network.name}, compressed by pbkd{replaced}

{usage}
It takes float32 NCHW in [0, 1], any number of images at once, {channels} channels,
{height} x {width} pixels; the normalisation is inside. It tells {len(card.class_names)} classes
apart: `{CLASS_NAMES}` names them in the order of the logits, and they are in the file as well.
`{CARD}` says how the network was made.

{files}

Model `{card.digest}`, data `{card.data_digest}`.
"""


def _onnx_usage(size: tuple[int, int, int]) -> str:
    shape = ", ".join(map(str, size))
    return f"""```python
import json, numpy, onnxruntime

session = onnxruntime.InferenceSession("{_FILES["onnx"]}")
images = numpy.random.rand(1, {shape}).astype("float32")
(logits,) = session.run(["{OUTPUT}"], {{"{INPUT}": images}})
names = json.loads(session.get_modelmeta().custom_metadata_map["{METADATA_CLASS_NAMES}"])
print(names[logits[0].argmax()])
```
"""


def _pt2_usage(size: tuple[int, int, int]) -> str:
    shape = ", ".join(map(str, size))
    return f"""```python
import json, pathlib, torch

model = torch.export.load("{_FILES["pt2"]}").module()
logits = model(torch.rand(1, {shape}))
names = json.loads(pathlib.Path("{CLASS_NAMES}").read_text())
print(names[logits[0].argmax()])
```
"""
