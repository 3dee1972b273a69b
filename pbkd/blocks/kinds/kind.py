"""What a kind is: three functions of its config and the block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from torch import Tensor, nn

from pbkd.config.candidates import KindConfig

C = TypeVar("C", bound=KindConfig)


def _as_it_is(config: C, block: nn.Module, x_nchw: Tensor) -> C:
    return config


@dataclass(frozen=True)
class Kind(Generic[C]):
    """How candidates of one kind come into being. None of the functions may change the block.

    Attributes:
        build: (config, block) to a module with the block's shapes and the constructors' random
            weights. It may depend on the block's structure, never on its weights: a student is
            built again around random ones.
        init: (config, candidate, block, some inputs (N, C, H, W)) sets the weights with which
            training starts, in place.
        settle: (config, block, an input (N, C, H, W)) to a config that holds all that ``build``
            needs to know of weights and shapes.
    """

    build: Callable[[C, nn.Module], nn.Module]
    init: Callable[[C, nn.Module, nn.Module, Tensor], None]
    settle: Callable[[C, nn.Module, Tensor], C] = _as_it_is
