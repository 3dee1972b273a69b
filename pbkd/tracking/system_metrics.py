"""How busy this machine is during a run: MLflow's own system metrics, in the parent run alone."""

from __future__ import annotations

import logging
from typing import Any


def watch_machine(run_id: str, uri: str) -> None:
    """Log processor, memory, disk, network and GPUs into a run every 10 s, from a thread.

    The thread ends by itself once the run has ended, and never outlives the process. MLflow's
    variables hold: ``MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING=false`` switches it off,
    ``MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL`` sets the seconds. Where there is no GPU, or its
    driver does not answer, there are no figures of GPUs.
    """
    from mlflow.environment_variables import MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING
    from mlflow.system_metrics import system_metrics_monitor as monitor

    enabled: Any = MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING
    if enabled.is_set() and not enabled.get():
        return
    logging.getLogger(monitor.__name__).setLevel(logging.WARNING)
    untyped: Any = monitor.SystemMetricsMonitor
    untyped(run_id, tracking_uri=uri).start()
