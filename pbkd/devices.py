"""The device of this process, and what to say where its memory is too small."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from pbkd.errors import TrainingError


def best_device() -> torch.device:
    """The first visible GPU, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@contextmanager
def enough_memory(what: str, advice: str) -> Iterator[None]:
    """Turn a failed allocation into TrainingError: ``what`` did not fit, ``advice`` is what to do.

    Raises:
        TrainingError: the device or the machine has no memory left.
    """
    try:
        yield
    except MemoryError as error:
        raise TrainingError(f"no memory for {what}; {advice}") from error
    except RuntimeError as error:
        is_full = isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
        if not is_full:
            raise
        first_line = str(error).splitlines()[0]
        raise TrainingError(f"no memory for {what} ({first_line}); {advice}") from error
