"""Stage `prepare`: the source's images, decoded once into data/prepared/."""

from __future__ import annotations

import logging

from pbkd.config import PrepareConfig
from pbkd.data import prepare
from pbkd.models import pretrained_transforms
from pbkd.stages.context import StageContext

_log = logging.getLogger(__name__)


def run(context: StageContext) -> None:
    """Write ``data/prepared/``.

    Raises:
        DataError: the images cannot be read.
    """
    workspace = context.workspace
    prepared = prepare(
        _config(context.params.prepare, context.params.teacher.weights),
        context.params.seed,
        workspace.prepared,
        workspace.root,
        workspace.state / "downloads",
    )
    counts = ", ".join(f"{num:,} {name}" for name, num in prepared.meta.num_images.items())
    shape = "x".join(map(str, prepared.image_shape))
    _log.info("%d classes, %s images of %s", prepared.num_classes, counts, shape)


def _config(config: PrepareConfig, weights: str | None) -> PrepareConfig:
    """Sizes that are not set are those of the teacher's weights, if they are torchvision's."""
    transforms = pretrained_transforms(weights)
    if config.image_size is not None or transforms is None:
        return config
    return config.model_copy(
        update={
            "image_size": transforms.size,
            "resize": transforms.resize,
            "interpolation": transforms.interpolation,
        }
    )
