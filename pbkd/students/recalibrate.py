"""Batch-norm statistics of a stitched student: estimated anew on its own activations."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from pbkd.data.batches import Stream


def recalibrate(
    model: nn.Module,
    train: Stream,
    *,
    num_batches: int,
    batch_size: int,
    after_batch: Callable[[], None] = lambda: None,
) -> None:
    """Estimate every batch norm's mean and variance anew on the model's own activations, in place.

    Plain averages over the given batches; weights do not change. Batches of large images are taken
    in parts.

    Args:
        after_batch: called after each batch, as a sign of life.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average over all batches
    model.eval()  # dropout would disturb what is measured
    for norm in norms:
        norm.train()
    parts = -(-batch_size // train.pass_size(batch_size))
    with torch.no_grad():
        for batch in itertools.islice(train.epoch(0, batch_size // parts), num_batches * parts):
            model(batch.images_nchw)
            after_batch()
    model.eval()
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
