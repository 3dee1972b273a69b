"""A process that ends once its parent is gone."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

_LOOK_S = 0.5


def end_with_parent(parent_pid: int, end: Callable[[], object] = lambda: os._exit(1)) -> None:
    """Start a thread that calls ``end`` once another process is this one's parent.

    PR_SET_PDEATHSIG would not do: it follows the thread that made the child.
    """

    def watch() -> None:
        while os.getppid() == parent_pid:
            time.sleep(_LOOK_S)
        end()

    threading.Thread(target=watch, daemon=True).start()
