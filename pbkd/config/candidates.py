"""The kinds of candidates, as ``blocks.candidates`` of params.yaml lists them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from pbkd.config.section import Section


class SeparableConfig(Section):
    """A k x k convolution as depthwise and pointwise convolutions (MobileNet, arXiv 1704.04861)."""

    kind: Literal["separable"] = "separable"
    depth: Literal[1, 2] = Field(
        1, description="1: one separable convolution; 2: two, with a ReLU between"
    )
    batch_norm: bool = Field(False, description="batch norm after each depthwise convolution")
    init: Literal["inherit", "random"] = Field(
        "inherit", description="weights from the teacher's kernel (rank 1 per input channel)"
    )


class LowRankConfig(Section):
    """A k x k convolution as smaller ones of a lower rank, by SVD or Tucker decomposition.

    ``pair``: k x 1, then 1 x k (Tai et al., arXiv 1511.06067). ``tucker``: 1 x 1, k x k, 1 x 1 (Kim
    et al., arXiv 1511.06530).
    """

    kind: Literal["low_rank"] = "low_rank"
    form: Literal["pair", "tucker"] = "pair"
    ratio: float | None = Field(
        None, gt=0, lt=1, description="parameters, as a share of the convolution's"
    )
    energy: float | None = Field(
        None, gt=0, lt=1, description="share of the squared singular values that the rank keeps"
    )
    init: Literal["inherit", "random"] = Field(
        "inherit", description="inherit: the factors of the teacher's kernel"
    )

    @model_validator(mode="after")
    def _one_rule(self) -> LowRankConfig:
        if (self.ratio is None) == (self.energy is None):
            raise ValueError("set one of `ratio` and `energy`")
        return self


class NarrowConfig(Section):
    """The same structure with fewer inner channels: those of least importance are left out."""

    kind: Literal["narrow"] = "narrow"
    ratio: float = Field(0.5, gt=0, lt=1, description="share of the inner channels that stays")


class BottleneckConfig(Section):
    """A k x k convolution as 1 x 1 to fewer channels, k x k among them, 1 x 1 back."""

    kind: Literal["bottleneck"] = "bottleneck"
    ratio: float = Field(
        0.25, gt=0, lt=1, description="inner channels, as a share of the smaller side"
    )
    batch_norm: bool = Field(False, description="batch norm and ReLU between the convolutions")


class GroupedConfig(Section):
    """A k x k convolution in groups, then 1 x 1 over all channels."""

    kind: Literal["grouped"] = "grouped"
    groups: int = Field(8, ge=2, description="must divide the channels")


class IdentityConfig(Section):
    """The block is dropped; where shapes differ, a 1 x 1 convolution takes its place."""

    kind: Literal["identity"] = "identity"
    adapter: Literal["auto", "always", "never"] = Field(
        "auto", description="the 1 x 1 convolution: where shapes differ, always, or never"
    )


class CustomConfig(Section):
    """A kind of the user's own: ``package.module:function``; see docs/adding_a_candidate.md."""

    kind: str = Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")
    settings: dict[str, str | int | float | bool] = Field(
        default_factory=dict, description="keyword arguments of the function"
    )


_KINDS = ("separable", "low_rank", "narrow", "bottleneck", "grouped", "identity")


def _tag(value: Any) -> str:
    kind = value.get("kind", "separable") if isinstance(value, dict) else getattr(value, "kind", "")
    return "custom" if ":" in str(kind) else str(kind)


CandidateConfig = Annotated[
    Annotated[SeparableConfig, Tag("separable")]
    | Annotated[LowRankConfig, Tag("low_rank")]
    | Annotated[NarrowConfig, Tag("narrow")]
    | Annotated[BottleneckConfig, Tag("bottleneck")]
    | Annotated[GroupedConfig, Tag("grouped")]
    | Annotated[IdentityConfig, Tag("identity")]
    | Annotated[CustomConfig, Tag("custom")],
    Discriminator(
        _tag,
        custom_error_type="unknown_kind",
        custom_error_message=f"known kinds are {', '.join(_KINDS)}, or package.module:function",
    ),
]
"""Any of them, told apart by ``kind``."""
