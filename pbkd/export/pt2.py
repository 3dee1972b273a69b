"""torch.export archives (``.pt2``): PyTorch runs them without the network's code.

Input and output are those of the model: (N, C, H, W) float32 in [0, 1] to (N, K) logits. A small
JSON beside the graph holds the class names and the model's digest.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from pbkd.artifacts import atomic_path
from pbkd.errors import ArtifactError, ExportError
from pbkd.export.tracing import dynamic_batch, example_images, traceable
from pbkd.models import Classifier, ModelCard

_NOTES = "pbkd.json"


class Pt2Model(NamedTuple):
    """A loaded archive."""

    module: nn.Module
    class_names: tuple[str, ...]
    digest: str


def to_pt2(model: Classifier, card: ModelCard, path: Path) -> None:
    """Write an archive for ``torch.export.load``, whole or not at all; for any batch size.

    Args:
        model: stays as it is, on whatever device.
        card: of the model.

    Raises:
        ExportError: the network cannot be traced.
    """
    try:
        program = torch.export.export(
            traceable(model), (example_images(card),), dynamic_shapes=dynamic_batch()
        )
    except Exception as error:  # whatever a network of the user's does to a tracer
        raise ExportError(
            f"{card.network.name} cannot be traced by torch.export: {type(error).__name__}: "
            f"{str(error).strip().partition(chr(10))[0]}; its forward must not depend on the "
            "values or the number of the images"
        ) from error
    for node in program.graph.nodes:  # lines of source, with the paths of this machine
        node.meta.pop("stack_trace", None)
    notes = json.dumps({"class_names": card.class_names, "digest": card.digest})
    with atomic_path(path) as temporary, temporary.open("wb") as file, warnings.catch_warnings():
        # weights in channels-last layout are whole, and are restored as they were
        warnings.filterwarnings("ignore", "No complete tensor found", UserWarning)
        torch.export.save(program, file, extra_files={_NOTES: notes})


def load_pt2(path: Path) -> Pt2Model:
    """Read an archive of ``to_pt2``; ArtifactError where it is missing or something else."""
    extra = {_NOTES: ""}
    try:
        program = torch.export.load(path, extra_files=extra)
        notes = json.loads(extra[_NOTES])
    except Exception as error:  # noqa: BLE001  torch raises many kinds
        raise ArtifactError(
            f"{path} is no archive of `pbkd export --format pt2`: {error}"
        ) from None
    return Pt2Model(program.module(), tuple(notes["class_names"]), notes["digest"])
