"""Stage `blocks`: the teacher's blocks and their candidates, as facts equal on every machine."""

from __future__ import annotations

import torch

from pbkd.artifacts import Workspace, read_json, write_json
from pbkd.blocks import Discovery, find_blocks
from pbkd.config import BlocksConfig
from pbkd.data import load_prepared
from pbkd.models import build_classifier, check_network, load_teacher
from pbkd.stages.context import StageContext
from pbkd.stages.teacher import teacher_card


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


def preview(context: StageContext) -> Discovery:
    """The blocks of the network that params.yaml names, trained or not."""
    card = teacher_card(context.params.teacher, load_prepared(context.workspace.prepared))
    net = build_classifier(card, allow_code=True).net
    check_network(net, card.network, card.image_size)
    images = torch.zeros(1, card.network.in_channels, *card.image_size)
    return find_blocks(net, context.params.blocks, images)


def read_blocks(workspace: Workspace) -> Discovery:
    """What the stage wrote."""
    return Discovery.model_validate(read_json(workspace.artifacts("blocks") / "blocks.json"))
