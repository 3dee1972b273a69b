"""Cheaper modules for a block, by kind: the registry.

``settle_candidate`` writes into a config what follows from the block's weights and shapes,
``build_candidate`` makes the module from config and structure alone, and ``init_candidate`` gives
it the weights with which training starts. The kinds are in ``pbkd.blocks.kinds``.
"""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor, nn

from pbkd.artifacts import digest_of
from pbkd.blocks.kinds import bottleneck, custom, grouped, identity, low_rank, narrow, separable
from pbkd.blocks.kinds.convs import replaceable_convs
from pbkd.blocks.kinds.kind import Kind
from pbkd.blocks.kinds.separable import Separable
from pbkd.config import CandidateConfig, CustomConfig
from pbkd.devices import channels_last

__all__ = [
    "Separable",
    "build_candidate",
    "candidate_name",
    "init_candidate",
    "replaceable_convs",
    "settle_candidate",
]

_KINDS: dict[str, Kind[Any]] = {
    "separable": separable.KIND,
    "low_rank": low_rank.KIND,
    "narrow": narrow.KIND,
    "bottleneck": bottleneck.KIND,
    "grouped": grouped.KIND,
    "identity": identity.KIND,
}

_WORD = re.compile(r"(?!(true|false)$)[a-z_][a-z0-9_]*")
_LONGEST_NAME = 100
"""Characters; file systems allow 255, with room for what others put around it."""


def candidate_name(config: CandidateConfig) -> str:
    """A readable name, also of a folder: the kind and the settings that are not the default.

    Where another character than letters, digits, ``_``, ``.`` and ``-`` has to go, a digest tells
    names apart that would be the same without it.
    """
    settings = config.model_dump(exclude_defaults=True, exclude={"kind", *config.settled})
    is_exact = True
    if isinstance(config, CustomConfig):
        settings = dict(sorted(config.settings.items()))
        # words that are no number, and no dot or dash that could be one of the name's own
        words = [value for value in settings.values() if isinstance(value, str)]
        is_exact = all(_WORD.fullmatch(word) for word in words)
        # upper and lower case are one on some file systems
        is_exact &= all(text == text.lower() for text in (config.kind, *settings))
    # a dot, because MLflow's metric names allow few other characters
    parts = [f"{name}.{_text(value)}" for name, value in settings.items()]
    plain = "-".join([config.kind.replace(":", "."), *parts])
    legal = re.sub(r"[^\w.-]", "_", plain, flags=re.ASCII)[:_LONGEST_NAME]
    if is_exact and legal == plain:
        return legal
    return f"{legal}-{digest_of([config.kind, settings])[:8]}"


def settle_candidate(config: CandidateConfig, block: nn.Module, x_nchw: Tensor) -> CandidateConfig:
    """The config with all that ``build_candidate`` needs to know of weights and shapes.

    Args:
        x_nchw: an input of the block; only its shape counts.

    Raises:
        CandidateError: the kind does not fit the block.
        ConfigError: the kind is the user's own, and missing or faulty.
    """
    settled: CandidateConfig = _kind(config).settle(config, block, x_nchw)
    return settled


def build_candidate(config: CandidateConfig, block: nn.Module) -> nn.Module:
    """The candidate's structure for a block, with the constructors' random weights.

    It depends on the settled config and the block's structure, not on its weights. Most kinds
    stand for a convolution; of any other block, they replace the convolutions in a copy, so that
    skips and norms stay as the teacher has them. A user's own kind is imported.

    Raises:
        CandidateError: the kind does not fit the block, or the config is not settled.
        ConfigError: the kind is the user's own, and missing or faulty.
    """
    return channels_last(_kind(config).build(config, block))


def init_candidate(
    config: CandidateConfig, candidate: nn.Module, block: nn.Module, x_nchw: Tensor
) -> None:
    """Give a built candidate the weights with which it starts, in place.

    Args:
        x_nchw: some inputs of the block; with the block's own outputs, all that a kind may see of
            the data. They set batch norms, least squares and the importance of channels.
    """
    _kind(config).init(config, candidate, block, x_nchw)


def _kind(config: CandidateConfig) -> Kind[Any]:
    return custom.KIND if isinstance(config, CustomConfig) else _KINDS[config.kind]


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
