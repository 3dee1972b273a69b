"""The pool of a Ray cluster: one actor per slot, on whichever node has room; PBKD_RUNNER=ray.

An actor stays alive between jobs, so that torch stays loaded. Ray starts none of them again and
repeats no call: a lost actor is a ``JobError``, whose job Prefect tries again, and the slot gets a
fresh actor, on another node if its own is gone.
"""

from __future__ import annotations

import functools
import logging
import os
import queue
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from flows.pool import JobPool
from flows.slots import Slot
from flows.worker import call, import_libraries, prepare
from pbkd.errors import ConfigError, JobError, MissingExtraError
from pbkd.orphans import end_with_parent
from pbkd.settings import Settings

log = logging.getLogger(__name__)

_WORK = b"W"  # first byte of an actor's message, like those of flows.worker: processor seconds
_WORK_S = 1.0  # how often a silent job's actor sends it
_PING_S = 0.02  # how long an idle actor may take to say that it is there
_CONNECT_S = 10.0  # Ray itself would try for minutes
_BUSY_S = 30.0
"""How long a slot waits for room before it says so, or, where there is none, gives up."""
_LOOK_S = 5.0  # how often it then looks again
_REASON_CHARS = 500  # the end of a text that is not known here: of a traceback it names the error
_OBJECT_STORE_BYTES = 100 << 20  # of a local Ray; the least is 75 MiB, and nothing large goes there


@dataclass(frozen=True)
class Node:
    """What one machine of the cluster lends to Ray.

    Attributes:
        cpus: CPUs as Ray counts them.
        gpus: GPUs.
        accelerator: the GPU's type as Ray names it, or "".
    """

    cpus: int
    gpus: int
    accelerator: str = ""

    def fits(self, slot: Slot) -> bool:
        """Whether it could take a slot's actor, were it idle."""
        return self.gpus > 0 if slot.device == "cuda" else self.cpus >= slot.threads

    def __str__(self) -> str:
        gpus = f" + {self.gpus} GPU {self.accelerator}".rstrip() if self.gpus else ""
        return f"{self.cpus} CPU{gpus}"


def worker_slots_on(nodes: Sequence[Node], settings: Settings) -> list[Slot]:
    """List the slots of a cluster: one per GPU, else the CPUs in equal shares that fit the nodes.

    Raises:
        ConfigError: a GPU is asked for and none is there, or there is no CPU either.
    """
    machines = _described(nodes)
    num_gpus = sum(node.gpus for node in nodes) if settings.device != "cpu" else 0
    if settings.device == "cuda" and not num_gpus:
        raise ConfigError(
            f"PBKD_DEVICE=cuda: the Ray cluster has no GPU ({machines}); add a node with one, or "
            "set PBKD_DEVICE=cpu"
        )
    what, most = ("GPU", num_gpus) if num_gpus else ("CPU", sum(node.cpus for node in nodes))
    if not most:
        raise ConfigError(f"the Ray cluster has no CPU to work on ({machines}); add a node")
    if settings.workers > most:
        log.warning(
            "PBKD_WORKERS=%d: the Ray cluster has %d %ss; using %d workers",
            settings.workers,
            most,
            what,
            most,
        )
    num_slots = min(settings.workers or most, most)
    if num_gpus:
        threads = max(1, min(node.cpus // node.gpus for node in nodes if node.gpus))
        return [Slot(f"gpu-{i}", "cuda", None, threads, (), machines) for i in range(num_slots)]
    sizes = range(max(node.cpus for node in nodes), 0, -1)
    threads = next(n for n in sizes if sum(node.cpus // n for node in nodes) >= num_slots)
    return [Slot(f"cpu-{i}", "cpu", "", threads, (), machines) for i in range(num_slots)]


def whole_node_slot(nodes: Sequence[Node]) -> Slot:
    """Return the slot of a stage that is one job: all CPUs of the largest node."""
    cpus = max(node.cpus for node in nodes)
    return Slot("cpu-all", "cpu", "", cpus, (), _described(nodes))


def _described(nodes: Sequence[Node]) -> str:
    counts = Counter(map(str, nodes))
    return "Ray: " + ", ".join(f"{count} x ({node})" for node, count in sorted(counts.items()))


class RayCluster:
    """This process's connection to Ray; its pools share the cluster's resources.

    It joins the cluster that RAY_ADDRESS names, or that this process has joined already, else it
    starts Ray on this machine alone. What it has joined or started it leaves when its last pool is
    closed and no thread works with it any more.

    Raises:
        MissingExtraError: Ray is not installed.
        ConfigError: there is no such cluster, or it cannot be joined.
    """

    def __init__(self) -> None:
        ray = _ray("PBKD_RUNNER=ray")
        self._is_ours = not ray.is_initialized()
        if self._is_ours:
            _join(ray)
        self.condition = threading.Condition()
        self.pools: list[RayPool] = []

    def nodes(self) -> list[Node]:
        """The living nodes."""
        lent = [node["Resources"] for node in _ray().nodes() if node["Alive"]]
        return [_node(resources) for resources in lent]

    def make_room(self, pool: RayPool) -> None:
        """Take resources from idle actors of the other pools; called with the lock held."""
        for other in self.pools:
            if other is not pool:
                other.give_way()

    def leave(self) -> None:
        """Leave Ray if this process has joined it here and no pool uses it any more."""
        with self.condition:
            if self._is_ours and all(pool.is_over for pool in self.pools):
                self._is_ours = False
                _ray().shutdown()


class RayPool(JobPool["_Actor"]):
    """A ``JobPool`` of Ray actors.

    Args:
        slots: where to run; names are unique. Ray owns the devices, so that none has locks.
        job_timeout_s: a job that runs longer is killed, in seconds.
        hang_timeout_s: see ``JobPool``; actors report their processor time every second.
    """

    def __init__(
        self,
        cluster: RayCluster,
        slots: Sequence[Slot],
        *,
        job_timeout_s: float,
        hang_timeout_s: float,
    ) -> None:
        super().__init__(
            slots,
            job_timeout_s=job_timeout_s,
            hang_timeout_s=hang_timeout_s,
            condition=cluster.condition,
        )
        self._cluster = cluster
        self._failing_since = 0.0
        self._look_at = 0.0
        self._told = False
        cluster.pools.append(self)

    @property
    def is_over(self) -> bool:
        """Whether it is closed and no thread is in ``run``."""
        return self._closed and not self._num_inside

    def leave_room(self, cpus: int) -> int:
        """See ``WorkerPool``; for teachers of this run, which take CPUs of the same cluster."""
        slot, nodes = self.slots[0], self._cluster.nodes()
        if slot.device == "cuda":  # takes no CPU of Ray's
            return len(self.slots)
        total = sum(node.cpus for node in nodes)
        if total < slot.threads + cpus:
            raise ConfigError(
                f"finetune.teachers: elastic: a worker takes {slot.threads} CPUs and the teachers "
                f"{cpus}, the cluster has {total} ({_described(nodes)}); set PBKD_WORKERS to a "
                "higher number, so that each takes fewer, or add a node"
            )
        with self._condition:
            for pool in self._cluster.pools:
                pool.give_way()
        return min(len(self.slots), (total - cpus) // slot.threads)

    def give_way(self) -> None:
        """Kill actors that have nothing to do; called with the lock held."""
        if not self._waiting:
            for slot in self._free:
                self._drop(slot)

    def _start(self, slot: Slot, *, preload: bool) -> _Actor:
        self._cluster.make_room(self)
        return _Actor(slot, preload=preload)

    def _left(self) -> None:
        self._cluster.leave()

    def _pick(self) -> Slot | None:
        # Not every slot has room on the cluster at any time: a job takes one whose actor answers.
        pings = {self._workers[slot].ping(): slot for slot in self._free if slot in self._workers}
        if pings:
            for answer in _ray().wait(list(pings), num_returns=1, timeout=_PING_S)[0]:
                if self._is_ready(pings[answer]):
                    return pings[answer]
        self._cluster.make_room(self)
        missing = [slot for slot in self._free if slot not in self._workers]
        num_coming = len(self._free) - len(missing)
        for slot in missing[: max(0, len(self._waiting) - num_coming)]:
            self._begin(slot, preload=False)
        self._check_room()
        return None

    def _is_ready(self, slot: Slot) -> bool:
        actor = self._workers[slot]
        try:
            actor.answer()
        except _ray().exceptions.RayError as error:
            self._drop(slot)
            if actor.place:  # an idle death costs nothing
                return False
            # Ray may place it on a dead node, of which it has not heard yet.
            now = time.monotonic()
            self._failing_since = self._failing_since or now
            broken = getattr(error, "actor_init_failed", False)
            if not broken and now < self._failing_since + _BUSY_S:
                return False
            raise JobError(
                f"slot {slot.name}: its actor did not start: {_reason(error)}; look at the node's "
                "Ray logs, all nodes need the same Python environment"
            ) from error
        self._failing_since = 0.0
        return True

    def _drop(self, slot: Slot) -> None:
        if (actor := self._workers.pop(slot, None)) is not None:
            actor.kill()

    def _check_room(self) -> None:
        """Say that the cluster is busy, once.

        Raises:
            JobError: the pool has no actor, and no node is left that could take one.
        """
        now = time.monotonic()
        placed = [actor for actor in self._workers.values() if actor.place]
        since = min((actor.started for actor in self._workers.values()), default=now)
        if placed or now < max(since + _BUSY_S, self._look_at):
            return
        self._look_at = now + _LOOK_S
        nodes, slot = self._cluster.nodes(), self.slots[0]
        need = "1 GPU" if slot.device == "cuda" else f"{slot.threads} CPUs"
        if not any(node.fits(slot) for node in nodes):
            self._look_at = 0.0
            raise JobError(
                f"no node of the Ray cluster has {need} ({_described(nodes)}), a worker has waited "
                f"{now - since:.0f} s for one; start a node and run again"
            )
        if not self._told:
            log.warning("waiting for a node of the Ray cluster with %s to spare", need)
        self._told = True


class RemoteWorker:
    """The actor of a slot, in a process of Ray: a thread runs jobs, while it sends messages."""

    def __init__(self, slot: Slot, *, preload: bool) -> None:
        end_with_parent(os.getppid())  # its node: Ray lets an actor at work go on without
        self._messages: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._threads = slot.threads
        prepare(slot, self._messages.put)
        self._jobs = ThreadPoolExecutor(1)
        if preload:
            import_libraries()

    def place(self) -> str:
        """Say where it is."""
        return f"process {os.getpid()} on {socket.gethostname()}"

    def run(self, payload: bytes) -> Iterator[bytes]:
        """Run a job; its log lines, its processor time while it logs nothing, its result."""

        def put(job: Future[bytes]) -> None:
            self._messages.put(job.result())
            self._messages.put(b"")

        self._jobs.submit(call, payload, self._threads).add_done_callback(put)
        while True:
            try:
                message = self._messages.get(timeout=_WORK_S)
            except queue.Empty:
                message = _WORK + str(time.process_time()).encode()
            if not message:
                return
            yield message


class _Actor:
    """The pool's handle of a slot's actor."""

    def __init__(self, slot: Slot, *, preload: bool) -> None:
        need: dict[str, Any] = {"num_cpus": slot.threads}
        if slot.device == "cuda":
            need = {"num_gpus": 1, "num_cpus": 0}  # a GPU's share of the CPUs comes with it
        options = {"scheduling_strategy": "SPREAD", "max_restarts": 0, "max_task_retries": 0}
        self._actor = _remote_class().options(**need, **options).remote(slot, preload=preload)
        self._ping: Any = None
        self._messages: Any = None
        self._cpu_s: float | None = None
        self._end = ""
        self.place = ""
        self.started = time.monotonic()

    def ping(self) -> Any:
        """A reference to the actor's answer, which comes once it is there and idle."""
        if self._ping is None:
            self._ping = self._actor.place.remote()
        return self._ping

    def answer(self) -> None:
        """Take the answer to the last ping; RayError: the actor is lost."""
        ping, self._ping = self._ping, None
        self.place = _ray().get(ping)

    def send(self, payload: bytes) -> None:
        self._messages = self._actor.run.remote(payload)

    def receive(self, timeout_s: float) -> bytes | None:
        ray = _ray()
        try:
            if not ray.wait([self._messages], timeout=timeout_s)[0]:
                return None
            message: bytes = ray.get(next(self._messages))
        except (StopIteration, ray.exceptions.RayError) as error:
            self._end = _reason(error)
            raise EOFError from None
        if message.startswith(_WORK):
            self._cpu_s = float(message[1:])
            return None
        return message

    def is_alive(self) -> bool:
        return not self._end

    def cpu_s(self) -> float | None:
        return self._cpu_s

    def kill(self) -> None:
        if _ray().is_initialized():  # else it went with Ray
            _ray().kill(self._actor)

    def wait(self) -> None:
        """Ray ends it in a moment, and gives what it held to others only then."""

    def release(self) -> None:
        self._messages = self._ping = None

    def death(self) -> str:
        return f"its {self.place} was lost: {self._end}"


@functools.cache
def _remote_class() -> Any:
    return _ray().remote(RemoteWorker)


def _ray(purpose: str = "this pool") -> Any:
    try:
        import ray
    except ImportError:
        raise MissingExtraError("ray", "ray", purpose) from None
    return ray


def _join(ray: Any) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    address = os.environ.get("RAY_ADDRESS", "local") or "local"
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address == "local":
        options |= {
            "include_dashboard": False,
            "num_cpus": len(os.sched_getaffinity(0)),
            "object_store_memory": _OBJECT_STORE_BYTES,
        }
    else:
        _check_answers(address)
    try:
        ray.init(address=address, **options)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise ConfigError(
            f"RAY_ADDRESS={address}: Ray cannot be used: {error}; all nodes and the run need the "
            "same versions of Ray and Python, and the cluster's token, with RAY_AUTH_MODE=token"
        ) from error
    # what raylets print of lost workers would come into our output; errors say it, too
    ray._private.worker._worker_logs_enabled = False


def _check_answers(address: str) -> None:
    """Refuse an address at which nobody listens; names like "auto" are left to Ray."""
    if "://" in address:
        raise ConfigError(
            f"RAY_ADDRESS={address}: Ray Client cannot be used; run on a node of the cluster and "
            "set RAY_ADDRESS=auto"
        )
    host, colon, port = address.rpartition(":")
    if not colon:
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S).close()
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"RAY_ADDRESS={address}: no Ray cluster answers ({error}); start one by "
            "`ray start --head`, or unset RAY_ADDRESS to use this machine alone"
        ) from None


def _node(resources: dict[str, float]) -> Node:
    kinds = [name for name in resources if name.startswith("accelerator_type:")]
    accelerator = kinds[0].partition(":")[2] if kinds else ""
    return Node(int(resources.get("CPU", 0)), int(resources.get("GPU", 0)), accelerator)


def _reason(error: BaseException) -> str:
    """What happened to an actor, from Ray's page of text."""
    text = " ".join(str(error).split())
    if found := re.search(r"(?:is dead|died) because (it.*?)\.(?: |$)", text):
        return found[1]
    if found := re.search(r"node running low on memory.*? was (\S+ used / \S+ limit)", text):
        return f"Ray killed it, its node ran out of memory ({found[1]})"
    if type(error).__name__ == "ActorUnavailableError":
        return "it cannot be reached, perhaps its node died"
    return re.sub(r"\x1b\[\d+m", "", text)[-_REASON_CHARS:] or type(error).__name__
