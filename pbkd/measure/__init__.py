"""Reads devices and clocks: size, MACs, latency, energy. No policy."""

from pbkd.measure.counter import CounterError, EnergyCounter, PowerIntegral, Unwrapped
from pbkd.measure.energy import EnergyMeter, EnergyReading, EnergyWindow, job_energy_j
from pbkd.measure.eval_mode import eval_mode
from pbkd.measure.flops import FLOPS_PER_MAC, count_macs
from pbkd.measure.headline import headline
from pbkd.measure.latency import Latency, measure_interleaved, measure_latency
from pbkd.measure.machine import Machine, processor_name, this_machine, usable_cores
from pbkd.measure.memory import free_memory
from pbkd.measure.nvml import GpuInfo, device_info, device_is_shared, nvml_counters
from pbkd.measure.rapl import rapl_counters
from pbkd.measure.size import num_parameters, state_dict_bytes

__all__ = [
    "FLOPS_PER_MAC",
    "CounterError",
    "EnergyCounter",
    "EnergyMeter",
    "EnergyReading",
    "EnergyWindow",
    "GpuInfo",
    "Latency",
    "Machine",
    "PowerIntegral",
    "Unwrapped",
    "count_macs",
    "device_info",
    "device_is_shared",
    "eval_mode",
    "free_memory",
    "headline",
    "job_energy_j",
    "measure_interleaved",
    "measure_latency",
    "num_parameters",
    "nvml_counters",
    "processor_name",
    "rapl_counters",
    "state_dict_bytes",
    "this_machine",
    "usable_cores",
]
