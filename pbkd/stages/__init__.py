"""The ten stages: read, call the library, write. Each is ``run(context)`` in a file of its name."""

from pbkd.stages.context import STAGES, StageContext, run_stage

__all__ = ["STAGES", "StageContext", "run_stage"]
