"""The kinds of candidates, as ``blocks.candidates`` of params.yaml lists them.

A student is built again from its candidates' configs and the teacher's structure alone. What
depends on weights or shapes is therefore settled once, by the stage ``blocks``, and kept in the
config: the fields in ``settled``, which params.yaml leaves out.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from pbkd.config.section import Section

_SETTLED = "settled by `blocks`; leave it out"


class KindConfig(Section):
    """Base of all kinds."""

    settled: ClassVar[frozenset[str]] = frozenset()
    """Fields that the stage ``blocks`` fills, and that are in no name."""

    kind: str


class SeparableConfig(KindConfig):
    """A k x k convolution as depthwise and pointwise convolutions (MobileNet, arXiv 1704.04861)."""

    kind: Literal["separable"] = "separable"
    depth: Literal[1, 2] = Field(
        1, description="1: one separable convolution; 2: two, with a ReLU between"
    )
    batch_norm: bool = Field(False, description="batch norm after each depthwise convolution")
    init: Literal["inherit", "random"] = Field(
        "inherit", description="weights from the teacher's kernel (rank 1 per input channel)"
    )


class LowRankConfig(KindConfig):
    """A convolution as smaller ones of a lower rank, by SVD or Tucker decomposition.

    ``pair``: k x 1, then 1 x k (Tai et al., arXiv 1511.06067); for a 1 x 1 convolution, two of
    them. ``tucker``: 1 x 1, k x k, 1 x 1 (Kim et al., arXiv 1511.06530).
    """

    settled: ClassVar[frozenset[str]] = frozenset({"ranks"})

    kind: Literal["low_rank"] = "low_rank"
    form: Literal["pair", "tucker"] = "pair"
    ratio: float | None = Field(
        None, gt=0, lt=1, description="weights, as a share of the convolution's"
    )
    energy: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="share of the squared singular values that the rank keeps; of each side for "
        "tucker",
    )
    init: Literal["inherit", "random"] = Field(
        "inherit", description="inherit: the factors of the teacher's kernel"
    )
    ranks: tuple[tuple[Annotated[int, Field(ge=1)], ...], ...] = Field(
        (), description=f"per convolution, one for pair, input and output for tucker; {_SETTLED}"
    )

    @model_validator(mode="after")
    def _one_rule(self) -> LowRankConfig:
        if (self.ratio is None) == (self.energy is None):
            raise ValueError("set one of `ratio` and `energy`")
        return self


class InnerChannels(Section):
    """Channels that live inside a block only: paths of the modules that share them.

    Attributes:
        producers: convolutions whose outputs they are.
        between: batch norms and depthwise convolutions that they pass.
        consumers: convolutions that take them.
    """

    producers: tuple[str, ...]
    between: tuple[str, ...]
    consumers: tuple[str, ...]


class NarrowConfig(KindConfig):
    """The same structure with fewer inner channels: those of least importance are left out."""

    settled: ClassVar[frozenset[str]] = frozenset({"inner"})

    kind: Literal["narrow"] = "narrow"
    ratio: float = Field(0.5, gt=0, lt=1, description="share of the inner channels that stays")
    inner: tuple[InnerChannels, ...] = Field((), description=_SETTLED)


class BottleneckConfig(KindConfig):
    """A k x k convolution as 1 x 1 to fewer channels, k x k among them, 1 x 1 back."""

    kind: Literal["bottleneck"] = "bottleneck"
    ratio: float = Field(
        0.25, gt=0, lt=1, description="inner channels, as a share of the smaller side"
    )
    batch_norm: bool = Field(False, description="batch norm and ReLU between the convolutions")


class GroupedConfig(KindConfig):
    """A k x k convolution in groups, then 1 x 1 over all channels."""

    kind: Literal["grouped"] = "grouped"
    groups: int = Field(8, ge=2, description="must divide the input channels")


class Place(Section):
    """Where an identity stands.

    Attributes:
        channels: input and output.
        groups: of the 1 x 1 convolution.
        stride: vertical, horizontal.
        crop: pixels cut off at the left, right, top and bottom; negative ones are added as zeros.
        relu: whether the block's outputs are never negative.
        skip: path of the block's own skip that has parameters; empty for none.
    """

    channels: tuple[int, int]
    groups: int
    stride: tuple[int, int]
    crop: tuple[int, int, int, int]
    relu: bool
    skip: str

    @property
    def keeps_shape(self) -> bool:
        """Whether an output has its input's shape."""
        same = self.channels[0] == self.channels[1]
        return same and self.stride == (1, 1) and not any(self.crop)


class IdentityConfig(KindConfig):
    """The block is dropped: its skip stays, or, where shapes differ, a 1 x 1 convolution comes."""

    settled: ClassVar[frozenset[str]] = frozenset({"place"})

    kind: Literal["identity"] = "identity"
    adapter: Literal["auto", "always", "never"] = Field(
        "auto",
        description="the 1 x 1 convolution: where shapes differ and there is no skip; always "
        "instead of the block; or never",
    )
    place: Place | None = Field(None, description=_SETTLED)


class CustomConfig(KindConfig):
    """A kind of the user's own: ``package.module:function``; see docs/adding_a_candidate.md."""

    settled: ClassVar[frozenset[str]] = frozenset({"code"})

    kind: str = Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")
    settings: dict[str, str | int | float | bool] = Field(
        default_factory=dict, description="keyword arguments of the function"
    )
    code: str = Field("", description=f"digest of the function's file; {_SETTLED}")

    def __hash__(self) -> int:  # a dict has none
        return hash((self.kind, tuple(sorted(self.settings.items())), self.code))


KINDS = ("separable", "low_rank", "narrow", "bottleneck", "grouped", "identity")
"""Those that pbkd has."""


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
        custom_error_message=f"known kinds are {', '.join(KINDS)}, and package.module:function",
    ),
]
"""Any of them, told apart by ``kind``."""
