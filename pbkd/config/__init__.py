"""params.yaml as typed sections: read once, at the edge."""

from pbkd.config.budgets import Figure, Limit, StudentConfig, SweepConfig, parse_limit
from pbkd.config.candidates import (
    BottleneckConfig,
    CandidateConfig,
    CustomConfig,
    GroupedConfig,
    IdentityConfig,
    LowRankConfig,
    NarrowConfig,
    SeparableConfig,
)
from pbkd.config.load import load_params
from pbkd.config.section import Fraction, Section
from pbkd.config.sections import (
    ActivationsConfig,
    AugmentConfig,
    BlocksConfig,
    DistillConfig,
    EvaluateConfig,
    FinetuneConfig,
    Params,
    PrepareConfig,
    RegisterConfig,
    RepairConfig,
    ShrinkConfig,
    StitchConfig,
    TeacherConfig,
)

__all__ = [
    "ActivationsConfig",
    "AugmentConfig",
    "BlocksConfig",
    "BottleneckConfig",
    "CandidateConfig",
    "CustomConfig",
    "DistillConfig",
    "EvaluateConfig",
    "Figure",
    "FinetuneConfig",
    "Fraction",
    "GroupedConfig",
    "IdentityConfig",
    "Limit",
    "LowRankConfig",
    "NarrowConfig",
    "Params",
    "PrepareConfig",
    "RegisterConfig",
    "RepairConfig",
    "Section",
    "SeparableConfig",
    "ShrinkConfig",
    "StitchConfig",
    "StudentConfig",
    "SweepConfig",
    "TeacherConfig",
    "load_params",
    "parse_limit",
]
