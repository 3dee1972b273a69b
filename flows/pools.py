"""The pools of a run. The command line opens them, so that they load while it imports Prefect."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from flows.pool import SlotPool, make_pool
from flows.slots import whole_machine_slot, worker_slots
from pbkd.settings import Settings


@dataclass(frozen=True)
class Pools:
    """Where stages run: those that are one job, and those that all workers share."""

    whole: SlotPool
    workers: SlotPool

    def close(self) -> None:
        """End all jobs and take no more."""
        self.whole.close()
        self.workers.close()


# a flow's parameters cannot hold them
_opened: ContextVar[Pools | None] = ContextVar("opened pools", default=None)


@contextmanager
def pools(settings: Settings) -> Iterator[Pools]:
    """The pools that a caller has opened by this function, or else new ones.

    They are two, or one where the only worker is the whole machine; processes start when needed.

    Raises:
        ConfigError: a GPU is asked for and none is there.
    """
    if (opened := _opened.get()) is not None:
        yield opened
        return
    whole, slots = whole_machine_slot(settings), worker_slots(settings)
    with ExitStack() as stack:
        one = stack.enter_context(make_pool([whole], settings))
        many = one if slots == [whole] else stack.enter_context(make_pool(slots, settings))
        token = _opened.set(Pools(one, many))
        stack.callback(_opened.reset, token)
        yield Pools(one, many)
