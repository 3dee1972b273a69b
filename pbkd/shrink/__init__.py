"""Make finished students smaller: in their weights, their structure, and their file."""

from pbkd.shrink.figures import StepFigures
from pbkd.shrink.recipe import (
    FILE,
    SHRUNK,
    ShrinkRecord,
    read_record,
    run_recipe,
    step_keys,
    structures,
)
from pbkd.shrink.state import Shrunk
from pbkd.shrink.training import Trainer

__all__ = [
    "FILE",
    "SHRUNK",
    "ShrinkRecord",
    "Shrunk",
    "StepFigures",
    "Trainer",
    "read_record",
    "run_recipe",
    "step_keys",
    "structures",
]
