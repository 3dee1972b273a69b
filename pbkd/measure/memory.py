"""Memory that programs can still take: of a GPU, of the machine, of a container."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch

_GROUPS = Path("/sys/fs/cgroup")
# limit, what is taken, and pages of files that the kernel gives back, of versions 1 and 2
_VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
_VERSION_2 = ("memory.max", "memory.current", "")


def free_memory(device: torch.device) -> int:
    """Bytes that programs can still take."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    left = math.inf
    with suppress(OSError):
        left = left_in_groups(Path("/proc/self/cgroup").read_text(), _GROUPS)
    return int(min(left, _left_on_machine()))


def _left_on_machine() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def left_in_groups(membership: str, root: Path) -> float:
    """Bytes left in a process's control groups, as a container is one; infinite without a limit.

    Args:
        membership: content of /proc/PID/cgroup.
        root: where the control groups lie.
    """
    left = math.inf
    for line in membership.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "memory":
            left = min(left, *_left_on_the_way(root / "memory", path, *_VERSION_1))
        elif not controllers:
            left = min(left, *_left_on_the_way(root, path, *_VERSION_2))
    return left


def _left_on_the_way(root: Path, path: str, limit: str, taken: str, prefix: str) -> Iterator[float]:
    """In the group and those around it; in a container all but the root may be out of sight."""
    yield math.inf
    group = root / path.strip("/")
    for folder in (group, *group.parents):
        if not folder.is_relative_to(root):
            return
        with suppress(OSError, ValueError):  # "max" is no number: no limit
            allowed = int((folder / limit).read_text())
            stat = dict(s.split() for s in (folder / "memory.stat").read_text().splitlines())
            files = sum(int(stat.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
            yield max(0, allowed - int((folder / taken).read_text()) + files)
