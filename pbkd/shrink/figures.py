"""How large a student is after a step: in its real file, and in what it holds."""

from __future__ import annotations

import torch
from pydantic import BaseModel, ConfigDict
from torch import nn

from pbkd.measure import count_macs, num_parameters
from pbkd.models import ModelCard


class StepFigures(BaseModel):
    """A student after a step; a line of ``shrink.json``.

    Attributes:
        method: of the step; ``start`` before the first one.
        settings: of the step, in words.
        file_bytes: of the `.pbkd` file of the student as it is now.
        num_nonzero: parameters that are not exactly 0.
        bits_per_weight: of the file, by parameter, zeros counted.
        macs: of one image (1 MAC = 2 FLOPs), zeros counted.
        val_accuracy: 0 to 1.
        epochs: of training in this step.
        duration_s: of the step; no part of any key.
    """

    model_config = ConfigDict(frozen=True)

    method: str
    settings: str
    file_bytes: int
    num_parameters: int
    num_nonzero: int
    bits_per_weight: float
    macs: int
    val_accuracy: float
    epochs: int
    duration_s: float


def num_nonzero(model: nn.Module) -> int:
    """Number of parameters that are not exactly 0."""
    return sum(int(parameter.count_nonzero()) for parameter in model.parameters())


def sizes(model: nn.Module, card: ModelCard, file_bytes: int) -> dict[str, float]:
    """The figures of a model that need no data, by their names in ``StepFigures``."""
    image = torch.zeros(1, card.network.in_channels, *card.image_size)
    parameters = num_parameters(model)
    return {
        "file_bytes": file_bytes,
        "num_parameters": parameters,
        "num_nonzero": num_nonzero(model),
        "bits_per_weight": 8 * file_bytes / parameters,
        "macs": count_macs(model, image),
    }
