"""NVIDIA GPUs: energy, power limit, tenants. The one file that talks to NVML; SI units leave it.

Devices have NVML's index, in PCI order; CUDA_VISIBLE_DEVICES changes torch's index, not this one.
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pbkd.measure.counter import CounterError, EnergyCounter, PowerIntegral, Unwrapped

SAMPLE_INTERVAL_S = 0.1
# A sample can be late while another thread holds the interpreter; later than this, it is lost.
_MAX_GAP_S = 20 * SAMPLE_INTERVAL_S
# Often enough to notice most resets of a counter within a long window.
_COUNTER_INTERVAL_S = 10.0
_UNITS_PER_MILLI = 1e-3
# PROC_PID_INIT_INO of Linux's include/linux/proc_ns.h: the machine's own process ids.
_MACHINE_PID_NAMESPACE = "pid:[4026531836]"


@dataclass(frozen=True)
class GpuInfo:
    """A GPU: counter name, UUID, model, power limit in watts (None: not told), driver version."""

    name: str
    uuid: str
    model: str
    power_limit_w: float | None
    driver_version: str


class NvmlEnergyCounter:
    """The GPU's own energy counter (Volta and newer), since the driver was loaded."""

    source = "NVML total energy counter"
    poll_interval_s = _COUNTER_INTERVAL_S

    def __init__(self, nvml: Any, handle: Any, name: str) -> None:
        self.name = name
        self._nvml = nvml
        self._handle = handle
        self._unwrapped = Unwrapped(range_j=None)

    def read_j(self) -> float:
        """Joules since the first reading; CounterError where NVML fails or was reset."""
        try:
            energy_mj = self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)
        except self._nvml.NVMLError as error:
            raise CounterError(f"{self.name}: {error}") from error
        return self._unwrapped.update(energy_mj * _UNITS_PER_MILLI)


class NvmlPowerCounter:
    """Power samples integrated by trapezoids, for a GPU without an energy counter.

    NVML's power is itself a mean over up to 1 s, by GPU generation: short windows are blurred.
    """

    source = f"NVML power, trapezoids of {SAMPLE_INTERVAL_S:g} s"
    poll_interval_s = SAMPLE_INTERVAL_S

    def __init__(self, nvml: Any, handle: Any, name: str) -> None:
        self.name = name
        self._nvml = nvml
        self._handle = handle
        self._integral = PowerIntegral(_MAX_GAP_S)

    def read_j(self) -> float:
        """Joules since the first reading; CounterError where NVML fails or samples are missing."""
        try:
            power_mw = self._nvml.nvmlDeviceGetPowerUsage(self._handle)
        except self._nvml.NVMLError as error:
            raise CounterError(f"{self.name}: {error}") from error
        return self._integral.update(time.perf_counter(), power_mw * _UNITS_PER_MILLI)


def nvml_counters() -> list[EnergyCounter]:
    """A counter ``gpu-<NVML index>`` per GPU of the machine that tells its energy or power.

    Empty where there is no NVML, no driver or no ``pynvml``. A counter covers its whole GPU,
    whoever uses it.
    """
    nvml = _nvml()
    if nvml is None:
        return []
    counters = (_counter(nvml, handle, f"gpu-{index}") for index, handle in _handles(nvml))
    return [counter for counter in counters if counter is not None]


def device_info() -> list[GpuInfo]:
    """The machine's GPUs; empty where there is no NVML, no driver or no ``pynvml``."""
    nvml = _nvml()
    if nvml is None:
        return []
    driver_version = str(nvml.nvmlSystemGetDriverVersion())
    return [
        GpuInfo(
            name=f"gpu-{index}",
            uuid=str(nvml.nvmlDeviceGetUUID(handle)),
            model=str(nvml.nvmlDeviceGetName(handle)),
            power_limit_w=_power_limit_w(nvml, handle),
            driver_version=driver_version,
        )
        for index, handle in _handles(nvml)
    ]


def device_is_shared(index: int, own_pids: Collection[int] = ()) -> bool | None:
    """Whether another process has a compute context on the GPU now; None where unknown.

    Unknown are: no NVML, a GPU that does not tell, a GPU split by MIG, and a container with process
    ids of its own, as NVML gives the machine's.

    Args:
        index: NVML's index of the GPU.
        own_pids: further processes that count as ours; this one always does.
    """
    nvml = _nvml()
    if nvml is None or not _sees_machine_pids():
        return None
    try:
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        if _is_split(nvml, handle):
            return None
        processes = nvml.nvmlDeviceGetComputeRunningProcesses(handle)
    except nvml.NVMLError:
        return None
    return not {process.pid for process in processes} <= {os.getpid(), *own_pids}


def _nvml() -> Any | None:
    """The initialised library, or None. It stays initialised: counters keep its handles."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    return pynvml


def _handles(nvml: Any) -> Iterator[tuple[int, Any]]:
    """Index and handle of each GPU that can be opened."""
    for index in range(nvml.nvmlDeviceGetCount()):
        try:
            yield index, nvml.nvmlDeviceGetHandleByIndex(index)
        except nvml.NVMLError:
            continue  # not ours, or lost: the others still count


def _counter(nvml: Any, handle: Any, name: str) -> EnergyCounter | None:
    for kind in (NvmlEnergyCounter, NvmlPowerCounter):
        counter: EnergyCounter = kind(nvml, handle, name)
        try:
            counter.read_j()
        except CounterError:
            continue
        return counter
    return None


def _power_limit_w(nvml: Any, handle: Any) -> float | None:
    try:
        return float(nvml.nvmlDeviceGetEnforcedPowerLimit(handle)) * _UNITS_PER_MILLI
    except nvml.NVMLError:
        return None


def _is_split(nvml: Any, handle: Any) -> bool:
    try:
        current, _ = nvml.nvmlDeviceGetMigMode(handle)
    except nvml.NVMLError:
        return False  # a GPU without MIG refuses the question
    return bool(current)


def _sees_machine_pids() -> bool:
    try:
        return str(Path("/proc/self/ns/pid").readlink()) == _MACHINE_PID_NAMESPACE
    except OSError:
        return False
