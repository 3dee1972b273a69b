"""Budgets that no choice keeps to are refused before the long work begins."""

from __future__ import annotations

import torch

from pbkd.blocks import Discovery, find_blocks
from pbkd.config import BlocksConfig, LowRankConfig
from pbkd.models import Classifier, load_teacher
from pbkd.stages.blocks import read_blocks
from pbkd.stages.context import StageContext
from pbkd.students import Subject
from pbkd.students import check_budgets as check


def check_budgets(context: StageContext) -> None:
    """Refuse budgets that no choice keeps to, however well the candidates train.

    Needs the stages `teacher` and `blocks` alone. Limits on latency are looked at by `stitch`.

    Raises:
        BudgetError: names every such student.
    """
    teacher, _ = load_teacher(context.workspace.artifacts("teacher"), allow_code=True)
    _check(context, teacher, read_blocks(context.workspace))


def check_untrained(context: StageContext, teacher: Classifier, image: torch.Tensor) -> None:
    """The same, and the selection of blocks, before the teacher is trained.

    Ranks that are chosen by energy depend on the weights: with such candidates only the blocks are
    looked for.

    Args:
        image: (1, C, H, W); its values do not matter.

    Raises:
        BlockError: a selector matches nothing, or no block can be replaced.
        BudgetError: names every student whose limits no choice keeps to.
    """
    discovery = find_blocks(teacher.net, context.params.blocks, image)
    if not _depends_on_weights(context.params.blocks):
        _check(context, teacher, discovery)


def _check(context: StageContext, teacher: Classifier, discovery: Discovery) -> None:
    subject = Subject.of(teacher, discovery)
    check(subject.blocks, subject.rest, context.params.stitch)


def _depends_on_weights(config: BlocksConfig) -> bool:
    configs = [*config.candidates, *(c for some in config.overrides.values() for c in some)]
    return any(isinstance(c, LowRankConfig) and c.energy is not None for c in configs)
