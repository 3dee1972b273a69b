"""Real images for calibration and comparison, and the accuracy of an exported model on a split."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from pbkd.config import AugmentConfig
from pbkd.data import Split, Stream

_BATCH = 64


def first_images(split: Split, num_images: int) -> Tensor:
    """(N, C, H, W) float32 in [0, 1]: the first N of a split, which `prepare` shuffled."""
    return torch.from_numpy(np.array(split.images[:num_images])).float().div_(255)


def accuracy_of(exported: Callable[[Tensor], Tensor], split: Split) -> float:
    """Share of a split's images whose largest logit is at the label, 0 to 1; on the CPU."""
    stream = Stream(split, seed=0, augment=AugmentConfig())
    correct = sum(
        int((exported(batch.images_nchw).argmax(1) == batch.labels_n).sum())
        for batch in stream.in_order(_BATCH)
    )
    return correct / len(split)
