"""Which failed tasks are tried again."""

from __future__ import annotations

from typing import Any

from pbkd.errors import JobError, JobFailedError, PoolClosedError


def is_worth_a_retry(task: Any, task_run: Any, state: Any) -> bool:
    """A crashed or hung worker is; a user's mistake will not go away."""
    error = state.result(raise_on_failure=False)
    return isinstance(error, JobError) and not isinstance(error, JobFailedError | PoolClosedError)
