"""The blocks of a network that need not be trained yet: what `pbkd inspect` shows."""

from __future__ import annotations

import torch

from pbkd.blocks import Discovery, find_blocks
from pbkd.data import load_prepared
from pbkd.models import build_classifier, check_network
from pbkd.stages.context import StageContext
from pbkd.stages.teacher import teacher_card


def preview(context: StageContext) -> Discovery:
    """The blocks of the network that params.yaml names, trained or not."""
    card = teacher_card(context.params.teacher, load_prepared(context.workspace.prepared))
    net = build_classifier(card, allow_code=True).net
    check_network(net, card.network, card.image_size)
    images = torch.zeros(1, card.network.in_channels, *card.image_size)
    return find_blocks(net, context.params.blocks, images)
