"""How a network's structure was changed after stitching: what `shrink` writes into a model's card.

A student is built again from the teacher's structure, its replacements, and these, in their order.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from pbkd.config.candidates import LowRankConfig
from pbkd.config.section import Section

Size = Annotated[int, Field(ge=1)]


class Factorized(Section):
    """Convolutions or linear layers that became smaller ones of a lower rank.

    Attributes:
        layers: module path to its settled config.
    """

    kind: Literal["factorized"] = "factorized"
    layers: dict[str, LowRankConfig]


class Resized(Section):
    """Layers that lost channels.

    Attributes:
        layers: module path to its size now: (output channels, input channels, groups) of a
            convolution, (outputs, inputs) of a linear layer, (channels,) of a norm.
    """

    kind: Literal["resized"] = "resized"
    layers: dict[str, tuple[Size, ...]]


Edit = Annotated[Factorized | Resized, Field(discriminator="kind")]
