"""Stage `blocks`: the teacher's blocks and their candidates, as facts equal on every machine."""

from __future__ import annotations

import torch

from pbkd.artifacts import Workspace, read_json, write_json
from pbkd.blocks import Discovery, find_blocks
from pbkd.config import BlocksConfig
from pbkd.models import load_teacher
from pbkd.stages.context import StageContext


def run(context: StageContext) -> None:
    """Write ``artifacts/blocks/blocks.json``.

    Raises:
        BlockError: a selector matches nothing, or no block can be replaced.
    """
    discovery = discover(context.workspace, context.params.blocks)
    write_json(context.workspace.artifacts("blocks") / "blocks.json", discovery)


def discover(workspace: Workspace, config: BlocksConfig) -> Discovery:
    """Look into the trained teacher; shapes do not depend on the pixels, so zeros will do."""
    teacher, card = load_teacher(workspace.artifacts("teacher"), allow_code=True)
    images = torch.zeros(1, card.network.in_channels, *card.image_size)
    return find_blocks(teacher.net, config, images)


def read_blocks(workspace: Workspace) -> Discovery:
    """What the stage wrote."""
    return Discovery.model_validate(read_json(workspace.artifacts("blocks") / "blocks.json"))
