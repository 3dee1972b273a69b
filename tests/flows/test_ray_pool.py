"""The pool on Ray, on one machine: jobs, limits, and an end that leaves no process."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pool_jobs
import psutil
import pytest

from flows import ray_pool
from flows.pool import WorkerPool
from flows.pools import pools
from flows.ray_pool import Node, RayCluster, RayPool, whole_node_slot, worker_slots_on
from flows.slots import Slot
from pbkd.errors import (
    ConfigError,
    JobError,
    JobFailedError,
    MissingExtraError,
    PoolClosedError,
    TrainingError,
)
from pbkd.settings import Settings

ray = pytest.importorskip("ray")

NUM_CPUS = 2


def is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def wait_until(condition: Callable[[], bool], timeout_s: float = 120.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


def settings(**values: Any) -> Settings:
    return Settings.model_validate({"runner": "ray", "device": "cpu"} | values)


# ---------------------------------------------------------------- slots of a cluster


@pytest.mark.parametrize(
    ("nodes", "workers", "expected"),
    [
        ([Node(1, 0)], 0, [1]),
        ([Node(2, 0)], 0, [1, 1]),
        ([Node(2, 0)], 1, [2]),
        ([Node(8, 0)], 3, [2, 2, 2]),
        ([Node(3, 0), Node(3, 0)], 3, [1, 1, 1]),
        ([Node(3, 0), Node(3, 0)], 2, [3, 3]),
        ([Node(0, 0), Node(4, 0), Node(2, 0)], 3, [2, 2, 2]),
        ([Node(2, 1)], 0, [1, 1]),
    ],
)
def test_cpus_are_shared_so_that_every_worker_fits_a_node(
    nodes: list[Node], workers: int, expected: list[int]
) -> None:
    slots = worker_slots_on(nodes, settings(workers=workers))
    assert [slot.threads for slot in slots] == expected
    assert {(slot.device, slot.visible_devices, slot.locks) for slot in slots} == {("cpu", "", ())}
    assert whole_node_slot(nodes).threads == max(node.cpus for node in nodes)


def test_a_gpu_takes_one_worker_with_its_share_of_the_cpus(
    caplog: pytest.LogCaptureFixture,
) -> None:
    nodes = [Node(8, 2, "H100"), Node(6, 1, "A100"), Node(4, 0)]
    slots = worker_slots_on(nodes, settings(device="auto"))
    machines = "Ray: 1 x (4 CPU), 1 x (6 CPU + 1 GPU A100), 1 x (8 CPU + 2 GPU H100)"
    assert slots == [Slot(f"gpu-{i}", "cuda", None, 4, (), machines) for i in range(3)]
    assert len(worker_slots_on(nodes, settings(device="cuda", workers=1))) == 1
    assert not caplog.records
    assert worker_slots_on(nodes, settings(device="auto", workers=9)) == slots
    assert "the Ray cluster has 3 GPUs; using 3 workers" in caplog.text
    assert {slot.device for slot in worker_slots_on(nodes, settings())} == {"cpu"}


def test_what_a_cluster_lacks_is_named() -> None:
    with pytest.raises(ConfigError, match=r"has no GPU \(Ray: 2 x \(4 CPU\)\); add a node"):
        worker_slots_on([Node(4, 0), Node(4, 0)], settings(device="cuda"))
    with pytest.raises(ConfigError, match="no CPU to work on"):
        worker_slots_on([Node(0, 0)], settings())


class FakeCluster:
    """What a pool asks of a cluster, without Ray."""

    def __init__(self, *nodes: Node) -> None:
        self.condition, self.pools, self._nodes = threading.Condition(), [], list(nodes)

    def nodes(self) -> list[Node]:
        return self._nodes

    def leave(self) -> None:
        pass


@pytest.mark.parametrize(
    ("nodes", "workers", "cpus", "jobs"),
    [
        ([Node(2, 0)], 0, 1, 1),
        ([Node(4, 0), Node(4, 0)], 0, 1, 7),
        ([Node(4, 0), Node(4, 0)], 4, 2, 3),
        ([Node(8, 0)], 3, 1, 3),
    ],
)
def test_students_leave_the_cpus_to_teachers(
    nodes: list[Node], workers: int, cpus: int, jobs: int
) -> None:
    slots = worker_slots_on(nodes, settings(workers=workers))
    cluster: Any = FakeCluster(*nodes)
    pool = RayPool(cluster, slots, job_timeout_s=1.0, hang_timeout_s=1.0)
    assert pool.leave_room(cpus) == jobs


def test_a_cluster_without_room_for_teachers_is_refused() -> None:
    cluster: Any = FakeCluster(Node(2, 0))
    slots = worker_slots_on(cluster.nodes(), settings(workers=1))
    pool = RayPool(cluster, slots, job_timeout_s=1.0, hang_timeout_s=1.0)
    with pytest.raises(ConfigError, match=r"a worker takes 2 CPUs .* has 2 .*PBKD_WORKERS"):
        pool.leave_room(1)


# ---------------------------------------------------------------- joining


def test_a_cluster_that_cannot_be_joined_is_refused_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for address, message in {
        f"127.0.0.1:{port}": r"no Ray cluster answers \(.*refused\); start one by `ray start",
        "ray://head:10001": "Ray Client cannot be used; run on a node",
    }.items():
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(ConfigError, match=message), pools(settings()):
            pass


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"PBKD_RUNNER=ray needs ray, .*pbkd\[ray\]"):
        RayCluster()


def test_ray_is_imported_only_where_it_is_used() -> None:
    code = "import sys, flows.pools; print([n for n in ('ray', 'torch') if n in sys.modules])"
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


# ---------------------------------------------------------------- jobs


@pytest.fixture(scope="module")
def _ray() -> Iterator[None]:
    """Ray on this machine, as if it had two cores, for all tests of this file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setattr(os, "sched_getaffinity", lambda _: set(range(NUM_CPUS)))
        try:
            cluster = RayCluster()
        except Exception as error:  # noqa: BLE001 - whatever keeps Ray from starting
            pytest.skip(f"Ray does not start on this machine: {error}")
    yield
    cluster.leave()
    assert not ray.is_initialized()


@pytest.fixture
def make_pool(_ray: None) -> Iterator[Callable[..., RayPool]]:
    """Make pools of so many slots with a thread each; they are closed at the end."""
    made: list[RayPool] = []

    def make(num_slots: int = 1, threads: int = 1, **limits: float) -> RayPool:
        slots = [Slot(f"cpu-{i}", "cpu", "", threads, ()) for i in range(num_slots)]
        limits = {"job_timeout_s": 60.0, "hang_timeout_s": 60.0} | limits
        made.append(RayPool(RayCluster(), slots, **limits))
        return made[-1]

    yield make
    for pool in made:
        pool.close()
    wait_until(lambda: ray.available_resources().get("CPU") == NUM_CPUS)


MakePool = Callable[..., RayPool]


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as executor:
        yield executor


def test_result_comes_back_and_the_actor_stays(make_pool: MakePool) -> None:
    pool = make_pool(2)
    _: WorkerPool = pool
    assert pool.run(pool_jobs.add, 2, 3) == 5
    assert pool.run(pool_jobs.pid) == pool.run(pool_jobs.pid) != os.getpid()


def test_a_preloaded_actor_takes_the_job(make_pool: MakePool) -> None:
    pool = make_pool()
    pool.preload()
    assert pool.run(pool_jobs.torch_is_loaded)


def test_slots_work_at_the_same_time(make_pool: MakePool, threads: ThreadPoolExecutor) -> None:
    started: list[str] = []
    both = threading.Barrier(2, timeout=120)

    def on_start(slot: Slot) -> None:
        started.append(slot.name)
        both.wait()

    pool = make_pool(2)
    futures = [threads.submit(pool.run, pool_jobs.pid, on_start=on_start) for _ in range(2)]
    assert len({future.result() for future in futures}) == 2
    assert sorted(started) == ["cpu-0", "cpu-1"]


@pytest.mark.slow
def test_highest_priority_first_then_in_order(
    make_pool: MakePool, threads: ThreadPoolExecutor
) -> None:
    order: list[str] = []
    futures: list[Future[int]] = []
    pool = make_pool()
    gate = threads.submit(pool.run, pool_jobs.sleep, 1.5, on_start=lambda _: order.append("-"))
    wait_until(lambda: bool(order))
    for name, priority in {"low": 0.0, "mid a": 1.0, "mid b": 1.0, "high": 2.0}.items():

        def on_start(_: Slot, name: str = name) -> None:
            order.append(name)

        submit: Callable[..., Future[int]] = threads.submit
        futures.append(submit(pool.run, pool_jobs.pid, priority=priority, on_start=on_start))
        time.sleep(0.1)
    assert not gate.done()
    for future in futures:
        future.result()
    assert order == ["-", "high", "mid a", "mid b", "low"]


def test_environment_is_set_before_torch_comes(
    make_pool: MakePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = make_pool(threads=2)
    environ, torch_came_early, num_threads = pool.run(pool_jobs.environment)
    assert environ["CUDA_VISIBLE_DEVICES"] == ""
    assert environ["OMP_NUM_THREADS"] == environ["MKL_NUM_THREADS"] == "2"
    assert not torch_came_early
    assert num_threads == 2
    pool.run(pool_jobs.change_threads)
    assert pool.run(pool_jobs.environment)[2] == 2


def test_a_job_finds_modules_on_a_path_that_came_after_its_actor(
    make_pool: MakePool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "of_the_user.py").touch()
    pool = make_pool()
    assert not pool.run(pool_jobs.can_import, "of_the_user")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert pool.run(pool_jobs.can_import, "of_the_user")
    assert pool.run(os.getcwd) == str(tmp_path)


def test_what_a_job_logs_is_logged_here(
    make_pool: MakePool, caplog: pytest.LogCaptureFixture
) -> None:
    pool = make_pool()
    with caplog.at_level(logging.INFO, logger="pbkd"):
        pool.run(pool_jobs.log, "epoch 1: 50%")
    mine = [record for record in caplog.records if record.name == "pbkd.models.training"]
    assert [(r.levelname, r.getMessage()) for r in mine] == [("INFO", "epoch 1: 50%")]


def test_errors_of_jobs(make_pool: MakePool) -> None:
    pool = make_pool()
    pid = pool.run(pool_jobs.pid)
    with pytest.raises(TrainingError, match="loss is NaN") as ours:
        pool.run(pool_jobs.diverge)
    assert "in diverge" in ours.value.__notes__[0]
    with pytest.raises(MissingExtraError, match=r"the other pool needs rays"):
        pool.run(pool_jobs.miss)
    with pytest.raises(JobFailedError, match=r"divide .* ZeroDivisionError: division"):
        pool.run(pool_jobs.divide)
    with pytest.raises(JobFailedError, match="SystemExit: 3"):
        pool.run(pool_jobs.give_up)
    with pytest.raises(JobError, match=r"unpicklable: its result, of type function, cannot"):
        pool.run(pool_jobs.unpicklable)
    with pytest.raises(JobError, match=r"cannot be sent .* top level of a module"):
        pool.run(lambda: None)
    assert pool.run(pool_jobs.pid) == pid, "an error is no crash: the actor lives on"


# ---------------------------------------------------------------- what is lost, and limits


def test_killed_actor_fails_its_job_alone(
    make_pool: MakePool, threads: ThreadPoolExecutor, tmp_path: Path
) -> None:
    pid_file = tmp_path / "pid"
    pool = make_pool(2)
    victim = threads.submit(pool.run, pool_jobs.hold, pid_file)
    wait_until(pid_file.exists)
    sibling = threads.submit(pool.run, pool_jobs.sleep, 2.0)
    pid = int(pid_file.read_text())
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(
        JobError, match=rf"hold on slot cpu-\d: its process {pid} on \S+ was lost: .* died after"
    ) as lost:
        victim.result(timeout=120)
    assert not isinstance(lost.value, JobFailedError | PoolClosedError)
    assert sibling.result(timeout=120) == 2.0
    first, second = (threads.submit(pool.run, pool_jobs.sleep, 0.5) for _ in range(2))
    assert first.result(timeout=120) == second.result(timeout=120) == 0.5


def test_an_actor_that_cannot_start_says_why(make_pool: MakePool) -> None:
    make_pool()
    broken = Slot("cpu-0", "cpu", 7, 1, ())  # type: ignore[arg-type]
    with (
        RayPool(RayCluster(), [broken], job_timeout_s=60.0, hang_timeout_s=60.0) as pool,
        pytest.raises(JobError, match=r"slot cpu-0: its actor did not start: .* str expected"),
    ):
        pool.run(pool_jobs.pid)


def test_an_idle_death_costs_nothing(make_pool: MakePool) -> None:
    pool = make_pool()
    pid = pool.run(pool_jobs.pid)
    os.kill(pid, signal.SIGKILL)
    assert pool.run(pool_jobs.pid) != pid


@pytest.mark.slow
def test_a_hung_job_is_killed_and_a_working_one_is_not(make_pool: MakePool, tmp_path: Path) -> None:
    pool = make_pool(hang_timeout_s=3.0)
    assert pool.run(pool_jobs.work, 5.0) == 5.0
    with pytest.raises(JobError, match=r"killed: no work for \d s, .* PBKD_HANG_TIMEOUT_S"):
        pool.run(pool_jobs.sleep, 60.0)
    with pytest.raises(JobError, match="no work for"):
        pool.run(pool_jobs.hold_everything, tmp_path / "pid")
    wait_until(lambda: is_gone(int((tmp_path / "pid").read_text())))
    assert pool.run(pool_jobs.add, 1, 1) == 2


@pytest.mark.slow
def test_a_job_without_a_heartbeat_is_killed_though_it_lives(
    make_pool: MakePool, tmp_path: Path
) -> None:
    heartbeat = tmp_path / "heartbeat"
    pool = make_pool(hang_timeout_s=1.5)
    assert pool.run(pool_jobs.beat, heartbeat, 25, heartbeat=heartbeat) == 25
    with pytest.raises(JobError, match=r"no change of .*heartbeat for .* PBKD_HANG_TIMEOUT_S"):
        pool.run(pool_jobs.beat, heartbeat, 0, heartbeat=heartbeat)


def test_long_job_is_killed(make_pool: MakePool) -> None:
    pool = make_pool(job_timeout_s=1.0)
    with pytest.raises(JobError, match=r"sleep on slot cpu-0 .*PBKD_JOB_TIMEOUT_S"):
        pool.run(pool_jobs.sleep, 60.0)
    assert pool.run(pool_jobs.add, 1, 1) == 2


# ---------------------------------------------------------------- room on the cluster


@pytest.mark.slow
@pytest.mark.usefixtures("_ray")
def test_two_pools_never_wait_for_each_others_idle_actors(threads: ThreadPoolExecutor) -> None:
    with pools(settings(workers=2)) as opened:
        assert [slot.threads for slot in opened.whole.slots] == [2]
        assert [slot.threads for slot in opened.workers.slots] == [1, 1]
        opened.whole.preload()
        for _ in range(2):
            assert opened.workers.run(pool_jobs.add, 1, 1) == 2
            assert opened.whole.run(pool_jobs.add, 1, 1) == 2
        both = [opened.whole, opened.workers, opened.workers, opened.workers] * 2
        futures = [threads.submit(pool.run, pool_jobs.sleep, 0.1) for pool in both]
        assert [future.result(timeout=60) for future in futures] == [0.1] * len(both)
    with pools(settings(workers=1)) as opened:
        assert opened.whole is opened.workers


@pytest.mark.slow
def test_a_busy_cluster_is_waited_for_and_named_once(
    make_pool: MakePool,
    threads: ThreadPoolExecutor,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(ray_pool, "_BUSY_S", 0.5)
    monkeypatch.setattr(ray_pool, "_LOOK_S", 0.5)
    other, pool = make_pool(2), make_pool()
    for future in [threads.submit(other.run, pool_jobs.sleep, 0.5) for _ in range(2)]:
        future.result()
    caplog.clear()
    waiting = threads.submit(pool.run, pool_jobs.add, 1, 1)
    time.sleep(2)
    assert not waiting.done()
    other.close()
    assert waiting.result(timeout=120) == 2
    [record] = [record for record in caplog.records if "waiting" in record.message]
    assert "a node of the Ray cluster with 1 CPUs to spare" in record.message


@pytest.mark.slow
def test_a_job_that_no_node_can_take_is_refused(
    make_pool: MakePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_pool, "_BUSY_S", 0.5)
    pool = make_pool(threads=64)
    for _ in range(2):
        with pytest.raises(JobError, match=r"no node of the Ray cluster has 64 CPUs .*start a nod"):
            pool.run(pool_jobs.add, 1, 1)


# ---------------------------------------------------------------- the end


@pytest.mark.slow
def test_close_ends_running_and_waiting_jobs(
    make_pool: MakePool, threads: ThreadPoolExecutor, tmp_path: Path
) -> None:
    files = [tmp_path / "a", tmp_path / "b"]
    pool = make_pool(2)
    running: list[Future[Any]] = [threads.submit(pool.run, pool_jobs.hold, path) for path in files]
    wait_until(lambda: all(path.exists() for path in files))
    waiting: Future[Any] = threads.submit(pool.run, pool_jobs.pid)
    pool.close()
    for future in (*running, waiting):
        with pytest.raises(PoolClosedError, match="pool is closed"):
            future.result(timeout=5)
    wait_until(lambda: all(is_gone(int(path.read_text())) for path in files), timeout_s=10)
    pool.close()
    with pytest.raises(PoolClosedError, match="pool is closed"):
        pool.run(pool_jobs.pid)
    assert ray.is_initialized(), "it was not this pool that started Ray"


# A program of its own, with one core and its own Ray.
SCRIPT = """\
import os, signal, sys, threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import psutil
import pool_jobs
from flows.pools import pools
from pbkd.errors import PoolClosedError
from pbkd.settings import Settings

folder = Path(sys.argv[1])
os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])

def note_children():
    children = psutil.Process().children(recursive=True)
    pool_jobs.write(folder / "children", " ".join(str(child.pid) for child in children))

def main():
    with pools(Settings(runner="ray", device="cpu")) as opened:
        BODY

main()
"""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    """Start a program with the given body."""
    root, here = Path(__file__).parents[2], Path(__file__).parent
    processes: list[subprocess.Popen[str]] = []
    environ = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}

    def start_script(body: str) -> subprocess.Popen[str]:
        script = tmp_path / "script"
        script.write_text(SCRIPT.replace("BODY", body.strip()))
        process = subprocess.Popen(
            [sys.executable, "-W", "error", str(script), str(tmp_path)],
            env=environ | {"PYTHONPATH": f"{root}:{here}"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        processes.append(process)
        return process

    yield start_script
    for process in processes:
        process.kill()
        process.communicate(timeout=10)


def children_in(folder: Path) -> list[int]:
    pids = [int(pid) for pid in (folder / "children").read_text().split()]
    assert len(pids) > 3, "Ray has more processes than that"
    return pids


def name_of(pid: int) -> str:
    try:
        return " ".join(psutil.Process(pid).cmdline())
    except psutil.NoSuchProcess:
        return ""


@pytest.mark.slow
def test_a_pool_on_one_core_works_and_closes_from_a_signal_handler(
    tmp_path: Path, start: Callable[[str], subprocess.Popen[str]]
) -> None:
    body = """
        import ray
        with ThreadPoolExecutor(4) as threads:
            both = [opened.whole, opened.workers] * 2
            jobs = [threads.submit(pool.run, pool_jobs.add, 1, 1) for pool in both]
            print([job.result() for job in jobs])
        note_children()
        signal.signal(signal.SIGUSR1, lambda *_: opened.close())
        threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGUSR1)).start()
        try:
            opened.workers.run(pool_jobs.sleep, 30.0)
        except PoolClosedError:
            print("closed", ray.is_initialized())
    """
    process = start(body)
    stdout, stderr = process.communicate(timeout=90)
    assert (stdout, stderr) == ("[2, 2, 2, 2]\nclosed False\n", "")
    assert process.returncode == 0
    wait_until(lambda: all(map(is_gone, children_in(tmp_path))), timeout_s=10)


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL], ids=["ctrl-c", "kill"])
def test_no_process_stays_when_the_program_is_stopped(
    tmp_path: Path, start: Callable[[str], subprocess.Popen[str]], sent: signal.Signals
) -> None:
    body = """
        opened.workers.run(pool_jobs.pid)
        note_children()
        opened.workers.run(pool_jobs.hold, folder / "pid")
    """
    process = start(body)
    wait_until((tmp_path / "pid").exists, timeout_s=90)
    if sent == signal.SIGINT:
        os.killpg(process.pid, sent)  # as a terminal does
    else:
        process.kill()
    _, stderr = process.communicate(timeout=120)
    assert process.returncode != 0
    if sent == signal.SIGINT:
        assert stderr.strip().endswith("KeyboardInterrupt")
    # a killed driver's Ray has agents that look for its head for a minute or two before they end
    agents = [pid for pid in children_in(tmp_path) if "Agent" in name_of(pid)]
    last = agents if sent == signal.SIGKILL else []
    others = [pid for pid in children_in(tmp_path) if pid not in last]
    wait_until(lambda: all(map(is_gone, others)), timeout_s=20)
