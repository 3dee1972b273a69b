"""MLflow: one run per pipeline run, and the registry."""

from pbkd.tracking.mlflow_run import PipelineRun, prepare_store, tracking_uri
from pbkd.tracking.registry import Registered, register_models, still_registered

__all__ = [
    "PipelineRun",
    "Registered",
    "prepare_store",
    "register_models",
    "still_registered",
    "tracking_uri",
]
