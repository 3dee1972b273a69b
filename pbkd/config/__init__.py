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
from pbkd.config.distillation import DistillationConfig
from pbkd.config.edits import Edit, Factorized, Resized
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
    StitchConfig,
    TeacherConfig,
)
from pbkd.config.shrink import (
    CodeStep,
    LowRankStep,
    PruneChannelsStep,
    PruneStep,
    QuantizeStep,
    ShrinkConfig,
    StepConfig,
    TuneConfig,
)

__all__ = [
    "ActivationsConfig",
    "AugmentConfig",
    "BlocksConfig",
    "BottleneckConfig",
    "CandidateConfig",
    "CodeStep",
    "CustomConfig",
    "DistillConfig",
    "DistillationConfig",
    "Edit",
    "EvaluateConfig",
    "Factorized",
    "Figure",
    "FinetuneConfig",
    "Fraction",
    "GroupedConfig",
    "IdentityConfig",
    "Limit",
    "LowRankConfig",
    "LowRankStep",
    "NarrowConfig",
    "Params",
    "PrepareConfig",
    "PruneChannelsStep",
    "PruneStep",
    "QuantizeStep",
    "RegisterConfig",
    "RepairConfig",
    "Resized",
    "Section",
    "SeparableConfig",
    "ShrinkConfig",
    "StepConfig",
    "StitchConfig",
    "StudentConfig",
    "SweepConfig",
    "TeacherConfig",
    "TuneConfig",
    "load_params",
    "parse_limit",
]
