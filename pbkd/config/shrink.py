"""The steps of ``shrink.recipe``: a method with its settings, and how it is trained."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from pbkd.config.budgets import LatencyLimit, MacsLimit
from pbkd.config.distillation import DistillationConfig
from pbkd.config.section import Fraction, Section


class TuneConfig(DistillationConfig):
    """The training after, or while, a step changes the weights: distillation from the teacher."""

    epochs: int = Field(1, ge=0, description="passes over the training split; 0: none")
    lr: float = Field(0.01, gt=0, description="peak of the one-cycle schedule (SGD with Nesterov)")


def _epochs_unless_given(epochs: int) -> BeforeValidator:
    """A step's own default holds also where other keys of its `tune` are given."""

    def fill(tune: Any) -> Any:
        return {"epochs": epochs} | tune if isinstance(tune, dict) else tune

    return BeforeValidator(fill)


class PruneStep(Section):
    """Weights of least magnitude become 0, and stay 0 in later steps.

    The share rises with the cube of the time (Zhu and Gupta, arXiv 1710.01878, equation 1) while
    the student learns; then it learns on with what is left.
    """

    method: Literal["prune"] = "prune"
    sparsity: float = Field(gt=0, lt=1, description="share of the weights that are 0 in the end")
    scope: Literal["global", "layer"] = Field(
        "global",
        description="all weights compete, by their LAMP scores (Lee et al., arXiv 2010.07611): "
        "magnitudes that compare across layers; or each layer loses the same share",
    )
    ramp: Fraction = Field(0.5, description="share of the epochs in which the share rises")
    tune: Annotated[TuneConfig, _epochs_unless_given(4)] = TuneConfig(epochs=4)


class PruneChannelsStep(Section):
    """Whole channels go, and the layers become narrower (DepGraph, Fang et al., arXiv 2301.12900).

    One of the limits says how far.
    """

    method: Literal["prune_channels"] = "prune_channels"
    ratio: float | None = Field(None, gt=0, lt=1, description="share of the channels that go")
    max_macs: MacsLimit = Field(None, description="0.5: of the student's; or a figure: 40M")
    max_latency: LatencyLimit = Field(
        None,
        description="0.5: of the student's, or 2ms; batch 1, one CPU thread, measured on this "
        "machine: the step's result then depends on the machine",
    )
    scope: Literal["global", "layer"] = Field(
        "global", description="channels compete across layers, or each layer loses the same share"
    )
    tune: Annotated[TuneConfig, _epochs_unless_given(4)] = TuneConfig(epochs=4)

    @model_validator(mode="after")
    def _one_limit(self) -> PruneChannelsStep:
        limits = (self.ratio, self.max_macs, self.max_latency)
        if sum(limit is not None for limit in limits) != 1:
            raise ValueError("set one of `ratio`, `max_macs` and `max_latency`")
        return self


class LowRankStep(Section):
    """Convolutions and linear layers that are left dense become products of smaller ones.

    Layers that would not become smaller stay.
    """

    method: Literal["low_rank"] = "low_rank"
    form: Literal["pair", "tucker"] = Field("pair", description="as the candidate `low_rank`")
    ratio: float | None = Field(None, gt=0, lt=1, description="weights, as a share of the layer's")
    energy: float | None = Field(
        None, gt=0, lt=1, description="share of the squared singular values that the rank keeps"
    )
    tune: Annotated[TuneConfig, _epochs_unless_given(2)] = TuneConfig(epochs=2)

    @model_validator(mode="after")
    def _one_rule(self) -> LowRankStep:
        if (self.ratio is None) == (self.energy is None):
            raise ValueError("set one of `ratio` and `energy`")
        return self


class QuantizeStep(Section):
    """Weights take few values: a grid with a step per output channel, or a codebook per layer.

    With ``tune.epochs`` the student learns with the values that it will have: a grid whose steps
    learn, too (LSQ, Esser et al., arXiv 1902.08153), or a codebook whose entries learn (Han et al.,
    arXiv 1510.00149).
    """

    method: Literal["quantize"] = "quantize"
    form: Literal["grid", "codebook"] = "grid"
    bits: int = Field(8, ge=2, le=8, description="2 ** bits values at most")
    sensitive_bits: int = Field(
        8,
        ge=2,
        le=8,
        description="of the first layer, the last one, and depthwise convolutions, where `bits` "
        "are fewer",
    )
    rest: Literal["float16", "float32"] = Field(
        "float16", description="biases, norms and the grid's steps are rounded to this"
    )
    tune: TuneConfig = TuneConfig(epochs=1)


class CodeStep(Section):
    """The file `model.pbkd`: entropy-coded, exact; docs/format.md."""

    method: Literal["code"] = "code"


StepConfig = Annotated[
    PruneStep | PruneChannelsStep | LowRankStep | QuantizeStep | CodeStep,
    Field(discriminator="method"),
]
Recipe = tuple[StepConfig, ...]

_ORDER = {"quantize": 1, "code": 2}


class ShrinkConfig(Section):
    """Steps that make a finished student smaller; an empty recipe passes it through."""

    recipe: Recipe = Field((), description="steps, in order; `quantize` and `code` come last")
    overrides: dict[str, Recipe] = Field(
        default_factory=dict,
        description="glob over students' names: steps instead of `recipe`; last match wins",
    )

    def recipe_of(self, student: str) -> Recipe:
        """The steps for a student."""
        matching = [steps for glob, steps in self.overrides.items() if fnmatchcase(student, glob)]
        return matching[-1] if matching else self.recipe

    @model_validator(mode="after")
    def _in_order(self) -> ShrinkConfig:
        for recipe in (self.recipe, *self.overrides.values()):
            methods: list[str] = [step.method for step in recipe]
            ranks = [_ORDER.get(method, 0) for method in methods]
            if ranks != sorted(ranks):
                raise ValueError(
                    f"got {', '.join(methods)}: `quantize` and then `code` come last, because "
                    "what follows would undo them"
                )
            for method in _ORDER:
                if methods.count(method) > 1:
                    raise ValueError(f"`{method}` stands twice in a recipe")
        return self
