"""What every end-to-end distillation is told, by whichever stage."""

from __future__ import annotations

from pydantic import Field

from pbkd.config.section import Fraction, MixedPrecision, Section


class DistillationConfig(Section):
    """End-to-end distillation of a whole student (Hinton et al., arXiv 1503.02531)."""

    epochs: int = Field(8, ge=0, description="passes over the training split, at most")
    patience: int = Field(
        8,
        ge=1,
        description="epochs without a better validation accuracy before training stops, counted "
        "once the schedule has risen",
    )
    batch_size: int = Field(64, ge=2, description="images per step")
    lr: float = Field(0.05, gt=0, description="peak of the one-cycle schedule (SGD with Nesterov)")
    weight_decay: float = Field(5e-4, ge=0)
    mixed_precision: MixedPrecision = True
    temperature: float = Field(4.0, gt=0, description="softens both distributions")
    label_weight: Fraction = Field(
        0.1, description="share of the cross-entropy with labels; the rest is distillation"
    )
    restarts: int = Field(
        2, ge=0, description="a diverging training begins again, at a quarter of `lr`, so often"
    )
