"""A job's energy is known only where it had its device alone."""

from __future__ import annotations

import os

import pytest

from flows.distill import gpu_alone
from flows.slots import Slot
from pbkd.measure import EnergyMeter
from pbkd.settings import Settings
from pbkd.stages.context import energy_meter
from tests.measure.test_measure_nvml import Bindings, Gpu, install, machine_pids

__all__ = ["machine_pids"]  # a fixture

SECOND_GPU = Slot("gpu-0", "cuda", "1", 4, ("gpu-GPU-1",))


def bindings_with(pids: list[int]) -> Bindings:
    """Two GPUs, on the second of which these processes compute."""
    busy = Gpu()
    busy.pids = pids
    return Bindings([Gpu(), busy])


@pytest.mark.parametrize(
    ("pids", "counter"), [([os.getpid()], "gpu-1"), ([], "gpu-1"), ([os.getpid(), -9], None)]
)
def test_a_gpu_counts_unless_somebody_else_computes_there(
    monkeypatch: pytest.MonkeyPatch, machine_pids: None, pids: list[int], counter: str | None
) -> None:
    install(monkeypatch, bindings_with(pids))
    assert gpu_alone(SECOND_GPU) == counter


def test_a_lost_gpu_before_it_does_not_shift_the_question(
    monkeypatch: pytest.MonkeyPatch, machine_pids: None
) -> None:
    bindings = Bindings([Gpu(), Gpu(), Gpu()])
    bindings.gpus[0].lost = True
    bindings.gpus[2].pids = [-9]
    install(monkeypatch, bindings)
    assert gpu_alone(Slot("gpu-0", "cuda", "2", 4, ("gpu-GPU-2",))) is None


def test_a_share_of_the_cores_is_never_alone(
    monkeypatch: pytest.MonkeyPatch, machine_pids: None
) -> None:
    install(monkeypatch, bindings_with([]))
    assert gpu_alone(Slot("cpu-0", "cpu", "", 1, ("cpu-0",))) is None


def test_without_a_driver_nothing_is_known() -> None:
    assert gpu_alone(SECOND_GPU) is None


def test_where_other_machines_may_work_no_energy_is_measured() -> None:
    assert energy_meter(Settings(runner="ray")).devices == ()
    assert energy_meter(Settings()).devices == EnergyMeter.of_this_machine().devices
