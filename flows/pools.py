"""The pools of a run. The command line opens them, so that they load while it imports Prefect."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from flows.pool import JobPool
from flows.ray_pool import RayCluster, RayPool, whole_node_slot, worker_slots_on
from flows.slot_pool import SlotPool
from flows.slots import Slot, whole_machine_slot, worker_slots
from pbkd.locks import device_lock_dir
from pbkd.settings import Settings


@dataclass(frozen=True)
class Pools:
    """Where stages run: those that are one job, and those that all workers share."""

    whole: JobPool[Any]
    workers: JobPool[Any]

    def close(self) -> None:
        """End all jobs and take no more."""
        self.whole.close()
        self.workers.close()


# a flow's parameters cannot hold them
_opened: ContextVar[Pools | None] = ContextVar("opened pools", default=None)


@contextmanager
def pools(settings: Settings) -> Iterator[Pools]:
    """The pools that a caller has opened by this function, or else new ones.

    They are two, or one where a worker has as much as a stage that is one job would get; processes
    start when needed.

    Raises:
        ConfigError: a GPU is asked for and none is there, or the Ray cluster cannot be used.
        MissingExtraError: PBKD_RUNNER=ray, and Ray is not installed.
    """
    if (opened := _opened.get()) is not None:
        yield opened
        return
    made = _on_ray(settings) if settings.runner == "ray" else _on_slots(settings)
    with ExitStack() as stack:
        stack.callback(made.close)
        token = _opened.set(made)
        stack.callback(_opened.reset, token)
        yield made


def _on_slots(settings: Settings) -> Pools:
    whole, slots = whole_machine_slot(settings), worker_slots(settings)

    def pool(slots: Sequence[Slot]) -> SlotPool:
        lock_dir = settings.lock_dir or device_lock_dir()
        return SlotPool(slots, lock_dir=lock_dir, **_limits(settings))

    one = pool([whole])
    return Pools(one, one if slots == [whole] else pool(slots))


def _on_ray(settings: Settings) -> Pools:
    cluster = RayCluster()
    try:
        nodes = cluster.nodes()
        slots = worker_slots_on(nodes, settings)
    except BaseException:
        cluster.leave()
        raise
    workers = RayPool(cluster, slots, **_limits(settings))
    if len(slots) == 1 or slots[0].device == "cuda":  # a GPU is the same for whatever runs there
        return Pools(workers, workers)
    return Pools(RayPool(cluster, [whole_node_slot(nodes)], **_limits(settings)), workers)


def _limits(settings: Settings) -> dict[str, float]:
    return {
        "job_timeout_s": settings.job_timeout_s,
        "hang_timeout_s": settings.hang_timeout_s,
    }
