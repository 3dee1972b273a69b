"""Stage `prepare`: the source's images, decoded once into data/prepared/."""

from __future__ import annotations

from pbkd.data import prepare
from pbkd.stages.context import StageContext


def run(context: StageContext) -> None:
    """Write ``data/prepared/``."""
    prepare(context.params.prepare, context.params.seed, context.workspace.prepared)
