"""`low_rank`: what the student has left of dense layers becomes products of smaller ones.

The factors are those of the candidate `low_rank`; a linear layer becomes two. Left alone are layers
that would not become smaller, parts of candidates, depthwise convolutions, layers that share their
weight (factors of its own for each would be more), and layers that `prune` has thinned out: their
factors would have no zeros.
"""

from __future__ import annotations

import copy
import logging
from dataclasses import replace

import torch
from torch import nn

from pbkd.blocks import parameter_uses, settle_candidate, swap
from pbkd.blocks.factors import pair_matrices, rank_of_energy
from pbkd.blocks.kinds.convs import Part
from pbkd.config import Factorized, LowRankConfig, LowRankStep
from pbkd.errors import ArtifactError, ShrinkError
from pbkd.shrink.masks import is_pruned
from pbkd.shrink.state import Shrunk
from pbkd.shrink.training import Trainer
from pbkd.students.edits import LinearPair, factorized

_log = logging.getLogger(__name__)


def apply(shrunk: Shrunk, step: LowRankStep, trainer: Trainer) -> Shrunk:
    """Factorize all dense layers that become smaller; they start as truncated decompositions.

    Returns:
        A student with one more edit, ``Factorized``; its configs are settled.

    Raises:
        ShrinkError: no layer would become smaller.
        TrainingError: a batch does not fit into memory.
    """
    model = copy.deepcopy(shrunk.model)
    configs: dict[str, LowRankConfig] = {}
    for path, layer in _dense_layers(model.net).items():
        config = _settled(step, layer)
        try:
            factors = factorized(config, layer, path)
        except ArtifactError:  # not smaller at such a rank
            continue
        factors.inherit(layer)  # type: ignore[operator]
        swap(model.net, {path: factors})
        configs[path] = config
    if not configs:
        rule = f"ratio {step.ratio}" if step.energy is None else f"energy {step.energy}"
        raise ShrinkError(
            f"low_rank, {rule}: no convolution or linear layer of {shrunk.card.network.name} that "
            "is left dense would become smaller; lower it, or leave the step out"
        )
    _log.info("low_rank: %d layers factorized", len(configs))
    if step.tune.epochs:
        trainer.fit(model, step.tune)
    edits = (*shrunk.card.edits, Factorized(layers=configs))
    card = shrunk.card.model_copy(update={"edits": edits})
    return replace(shrunk, model=model.eval(), card=card)


def _dense_layers(net: nn.Module) -> dict[str, nn.Conv2d | nn.Linear]:
    """Path to layer, in the network's order.

    Only PyTorch's own classes: what a subclass does with its weight is not known.
    """
    found: dict[str, nn.Conv2d | nn.Linear] = {}
    uses = parameter_uses(net)
    taken = [path for path, module in net.named_modules() if isinstance(module, Part | LinearPair)]
    for path, module in net.named_modules():
        if type(module) is not nn.Conv2d and type(module) is not nn.Linear:
            continue
        assert isinstance(module, nn.Conv2d | nn.Linear)
        is_shared = uses[id(module.weight)] > 1
        if is_shared or any(path.startswith(f"{o}.") for o in taken) or is_pruned(module.weight):
            continue
        if not (isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1):
            found[path] = module
    return found


def _settled(step: LowRankStep, layer: nn.Conv2d | nn.Linear) -> LowRankConfig:
    """The layer's config with its ranks; a matrix has no core, so that a pair stands for it."""
    is_matrix = isinstance(layer, nn.Linear) or max(layer.kernel_size) == 1
    config = LowRankConfig(
        form="pair" if is_matrix else step.form, ratio=step.ratio, energy=step.energy
    )
    if isinstance(layer, nn.Conv2d):
        settled = settle_candidate(config, layer, torch.empty(0))
        assert isinstance(settled, LowRankConfig)
        return settled
    if step.energy is None:
        return config
    matrices = pair_matrices(layer.weight[:, :, None, None], 1)
    ranks = ((rank_of_energy(matrices, step.energy),),)
    return config.model_copy(update={"ranks": ranks})
