"""Put a model into eval mode for a measurement and leave no trace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Eval mode inside the block; afterwards every submodule is as it was, each by itself."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        # The attribute, not train(): that would reset a child shared with a part restored before.
        for part, training in modes.items():
            part.training = training
