"""The device of this process: what the worker pool left visible."""

from __future__ import annotations

import torch


def best_device() -> torch.device:
    """The first visible GPU, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
