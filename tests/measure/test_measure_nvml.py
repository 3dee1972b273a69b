"""NVML by a stand-in for its bindings; what it answers on a machine without GPUs, and with."""

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from pbkd.measure import CounterError, EnergyMeter, device_info, device_is_shared, nvml_counters
from pbkd.measure import nvml as nvml_file


class NVMLError(Exception):
    pass


class Gpu:
    """One GPU, in NVML's units; a figure of None is not supported."""

    def __init__(self, energy_mj: int | None = 0, power_mw: int | None = 0) -> None:
        self.energy_mj, self.power_mw = energy_mj, power_mw
        self.limit_mw: int | None = 700_000
        self.mig: list[int] | None = None
        self.pids: list[int] | None = []
        self.lost = False

    def tell(self, figure: object) -> object:
        if figure is None or self.lost:
            raise NVMLError("not supported")
        return figure


class Bindings:
    """The part of pynvml that is used, for a list of GPUs."""

    NVMLError = NVMLError

    def __init__(self, gpus: list[Gpu], driver: bool = True) -> None:
        self.gpus, self.driver = gpus, driver

    def nvmlInit(self) -> None:  # noqa: N802
        if not self.driver:
            raise NVMLError("driver not loaded")

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return len(self.gpus)

    def nvmlSystemGetDriverVersion(self) -> str:  # noqa: N802
        return "570.1"

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Gpu:  # noqa: N802
        gpu = self.gpus[index]
        gpu.tell(0)
        return gpu

    def nvmlDeviceGetName(self, gpu: Gpu) -> str:  # noqa: N802
        return "NVIDIA Test"

    def nvmlDeviceGetUUID(self, gpu: Gpu) -> str:  # noqa: N802
        return f"GPU-{self.gpus.index(gpu)}"

    def nvmlDeviceGetTotalEnergyConsumption(self, gpu: Gpu) -> object:  # noqa: N802
        return gpu.tell(gpu.energy_mj)

    def nvmlDeviceGetPowerUsage(self, gpu: Gpu) -> object:  # noqa: N802
        return gpu.tell(gpu.power_mw)

    def nvmlDeviceGetEnforcedPowerLimit(self, gpu: Gpu) -> object:  # noqa: N802
        return gpu.tell(gpu.limit_mw)

    def nvmlDeviceGetMigMode(self, gpu: Gpu) -> object:  # noqa: N802
        return gpu.tell(gpu.mig)

    def nvmlDeviceGetComputeRunningProcesses(self, gpu: Gpu) -> object:  # noqa: N802
        gpu.tell(gpu.pids)
        return [SimpleNamespace(pid=pid) for pid in gpu.pids or []]


def install(monkeypatch: pytest.MonkeyPatch, bindings: Bindings | None) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", bindings)


@pytest.fixture
def machine_pids(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without containers."""
    monkeypatch.setattr(
        nvml_file, "_MACHINE_PID_NAMESPACE", str(Path("/proc/self/ns/pid").readlink())
    )


@pytest.mark.parametrize("bindings", [None, Bindings([Gpu()], driver=False)])
def test_without_bindings_or_driver_all_is_absent(
    monkeypatch: pytest.MonkeyPatch, bindings: Bindings | None, machine_pids: None
) -> None:
    install(monkeypatch, bindings)
    assert nvml_counters() == []
    assert device_info() == []
    assert device_is_shared(0) is None


def test_the_real_bindings_never_raise() -> None:
    assert len(nvml_counters()) <= len(device_info())


def test_millijoules_become_joules(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = [Gpu(energy_mj=5_000_000), Gpu(energy_mj=7)]
    install(monkeypatch, Bindings(gpus))
    counters = nvml_counters()
    assert [counter.name for counter in counters] == ["gpu-0", "gpu-1"]
    start_j = counters[0].read_j()
    gpus[0].energy_mj = 5_002_500
    assert counters[0].read_j() - start_j == pytest.approx(2.5)
    assert "energy counter" in counters[0].source


def test_a_reset_and_a_lost_gpu_are_errors_of_the_counter(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(energy_mj=5_000)
    install(monkeypatch, Bindings([gpu]))
    (counter,) = nvml_counters()
    gpu.energy_mj = 10
    with pytest.raises(CounterError, match="reset"):
        counter.read_j()
    gpu.lost = True
    with pytest.raises(CounterError, match="gpu-0"):
        counter.read_j()


def test_without_an_energy_counter_power_is_integrated(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(energy_mj=None, power_mw=200_000)
    install(monkeypatch, Bindings([gpu]))
    counters = nvml_counters()
    meter = EnergyMeter(counters)
    with meter.window("w") as window:
        # Longer than a poll, so that samples are taken between the edges as well.
        nvml_file.time.sleep(0.25)
    result = window.result
    assert result.energy_j["gpu-0"] == pytest.approx(200 * result.duration_s, rel=0.05)
    assert result.source["gpu-0"] == "NVML power, trapezoids of 0.1 s"


def test_gpus_that_tell_nothing_are_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    lost = Gpu()
    lost.lost = True
    install(monkeypatch, Bindings([lost, Gpu(energy_mj=None, power_mw=None), Gpu()]))
    assert [counter.name for counter in nvml_counters()] == ["gpu-2"]
    assert [info.name for info in device_info()] == ["gpu-1", "gpu-2"]
    assert [info.uuid for info in device_info()] == ["GPU-1", "GPU-2"]


def test_device_info_is_in_watts(monkeypatch: pytest.MonkeyPatch) -> None:
    unlimited = Gpu()
    unlimited.limit_mw = None
    install(monkeypatch, Bindings([Gpu(), unlimited]))
    first, second = device_info()
    assert first.power_limit_w == pytest.approx(700)
    assert (first.model, first.driver_version) == ("NVIDIA Test", "570.1")
    assert second.power_limit_w is None


@pytest.mark.parametrize(
    ("pids", "shared"),
    [([], False), ([os.getpid()], False), ([os.getpid(), -5], False), ([-9], True), (None, None)],
)
def test_other_processes_make_a_device_shared(
    monkeypatch: pytest.MonkeyPatch, machine_pids: None, pids: list[int] | None, shared: bool | None
) -> None:
    gpu = Gpu()
    gpu.pids = pids
    install(monkeypatch, Bindings([gpu]))
    assert device_is_shared(0, own_pids=[-5]) is shared


def test_a_split_gpu_is_of_unknown_use(monkeypatch: pytest.MonkeyPatch, machine_pids: None) -> None:
    gpu = Gpu()
    install(monkeypatch, Bindings([gpu]))
    gpu.mig = [0, 0]
    assert device_is_shared(0) is False
    gpu.mig = [1, 1]
    assert device_is_shared(0) is None


def test_in_a_container_the_use_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, Bindings([Gpu()]))
    monkeypatch.setattr(nvml_file, "_MACHINE_PID_NAMESPACE", "pid:[1]")
    assert device_is_shared(0) is None
