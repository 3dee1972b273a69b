"""What this machine is, for figures that hold on it alone."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from pbkd.artifacts import digest_of


@dataclass(frozen=True)
class Machine:
    """Processor, cores this process may use, GPUs by name, and the versions that matter."""

    processor: str
    cores: int
    gpus: tuple[str, ...]
    python: str
    torch: str

    @property
    def machine_id(self) -> str:
        """Short digest of all of it."""
        return digest_of(asdict(self))[:12]


def this_machine() -> Machine:
    """Describe the machine that this process runs on."""
    return Machine(
        processor=processor_name(),
        cores=usable_cores(),
        gpus=tuple(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())),
        python=platform.python_version(),
        torch=torch.__version__,
    )


def usable_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def processor_name() -> str:
    """The processor's model name, or its architecture where that is unknown."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
