"""The slots of this machine: a GPU, or a share of the cores, each with its machine-wide locks."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass

from pbkd.errors import ConfigError, MissingExtraError
from pbkd.settings import Settings

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Slot:
    """One place to run a job.

    Attributes:
        name: short name for logs and plans, "gpu-0" or "cpu-1".
        device: the torch device as the job sees it, "cpu" or "cuda".
        visible_devices: CUDA_VISIBLE_DEVICES of the job; "" hides every GPU, None leaves it.
        threads: CPU threads for torch, OpenMP and MKL, at least 1.
        locks: machine-wide device locks to hold while a job runs.
        machines: where it may be, if that is not this machine alone; for people and keys.
    """

    name: str
    device: str
    visible_devices: str | None
    threads: int
    locks: tuple[str, ...]
    machines: str = ""


def worker_slots(settings: Settings) -> list[Slot]:
    """List the slots of this machine: one per GPU, else the usable cores in equal shares.

    Raises:
        ConfigError: a GPU is asked for and none is there.
    """
    cores = sorted(os.sched_getaffinity(0))
    if gpus := _usable_gpus(settings):
        num_slots = min(settings.workers or len(gpus), len(gpus))
        if settings.workers > len(gpus):
            log.warning(
                "PBKD_WORKERS=%d: there are %d GPUs and a GPU takes one worker; using %d",
                settings.workers,
                len(gpus),
                num_slots,
            )
        threads = max(1, len(cores) // num_slots)
        named = list(gpus.items())[:num_slots]
        return [
            Slot(f"gpu-{i}", "cuda", visible, threads, (f"gpu-{uuid}",))
            for i, (visible, uuid) in enumerate(named)
        ]
    num_slots = settings.workers or len(cores)
    threads = max(1, len(cores) // num_slots)
    locks = _core_locks(cores, num_slots)
    return [
        Slot(f"cpu-{i}", "cpu", "", threads, tuple(locks[i * threads : (i + 1) * threads]))
        for i in range(num_slots)
    ]


def whole_machine_slot(settings: Settings) -> Slot:
    """Return the slot of a stage that is one job: the first GPU, or all usable cores.

    Where there is one worker, it is that worker's, so that they may share a process.

    Raises:
        ConfigError: a GPU is asked for and none is there.
    """
    if len(slots := worker_slots(settings)) == 1:
        return slots[0]
    cores = sorted(os.sched_getaffinity(0))
    for visible, uuid in _usable_gpus(settings).items():
        return Slot("gpu-0", "cuda", visible, len(cores), (f"gpu-{uuid}",))
    return Slot("cpu-all", "cpu", "", len(cores), tuple(_core_locks(cores, settings.workers)))


def _core_locks(cores: Sequence[int], num_slots: int) -> list[str]:
    # By core number, so that runs pinned to different cores do not wait for each other.
    # More workers than cores are the user's wish: those beyond get a lock of their own.
    extra = range(num_slots - len(cores))
    return [f"cpu-{core}" for core in cores] + [f"cpu-extra-{i}" for i in extra]


def _usable_gpus(settings: Settings) -> dict[str, str]:
    """Map each name that fits CUDA_VISIBLE_DEVICES to its GPU's UUID; empty: use the CPU."""
    if settings.device == "cpu":
        return {}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    uuids = _nvml_uuids(required=settings.device == "cuda")
    gpus = _select_gpus(uuids, visible)
    if not gpus and settings.device == "cuda":
        raise ConfigError(
            f"PBKD_DEVICE=cuda: got {len(uuids)} GPUs from the driver with CUDA_VISIBLE_DEVICES="
            f"{'(unset)' if visible is None else repr(visible)}, expected at least one usable; "
            "look at nvidia-smi, change CUDA_VISIBLE_DEVICES, or set PBKD_DEVICE=cpu"
        )
    return gpus


def _nvml_uuids(*, required: bool) -> list[str]:
    # NVML, because torch would make a CUDA context in the flow's process.
    try:
        import pynvml
    except ImportError:
        if required:
            raise MissingExtraError("nvidia-ml-py", "pipeline", "finding GPUs") from None
        log.warning("nvidia-ml-py is not installed: no GPU can be found, using the CPU")
        return []
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        log.debug("no GPU driver: %s", error)
        return []
    try:
        handles = map(pynvml.nvmlDeviceGetHandleByIndex, range(pynvml.nvmlDeviceGetCount()))
        return [pynvml.nvmlDeviceGetUUID(handle) for handle in handles]
    finally:
        pynvml.nvmlShutdown()


def _select_gpus(uuids: Sequence[str], visible: str | None) -> dict[str, str]:
    # Entries stay as the user wrote them: CUDA and NVML may count unequal GPUs differently.
    if visible is None:
        return {uuid: uuid for uuid in uuids}
    found: dict[str, str] = {}
    for entry in map(str.strip, visible.split(",")):
        same = [uuid for uuid in uuids if entry.startswith("GPU-") and uuid.startswith(entry)]
        if entry.isdigit() and int(entry) < len(uuids):
            found[entry] = uuids[int(entry)]
        elif same:
            found[entry] = same[0]
        elif entry.startswith("MIG-") and uuids:
            found[entry] = entry
        else:
            break  # as CUDA does: what follows a wrong entry is not visible
    return found
