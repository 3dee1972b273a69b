from __future__ import annotations

import itertools
import logging
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pool_jobs
import psutil
import pytest

from flows.pool import WorkerPool, run_all
from flows.slot_pool import SlotPool
from flows.slots import Slot, whole_machine_slot, worker_slots
from flows.worker import call, unpack_result
from pbkd.errors import ConfigError, JobError, MissingExtraError, TrainingError
from pbkd.settings import Settings


def cpu_slot(index: int = 0, threads: int = 1) -> Slot:
    return Slot(f"cpu-{index}", "cpu", "", threads, (f"cpu-{index}",))


def make_pool(tmp_path: Path, num_slots: int = 1, **limits: float) -> SlotPool:
    limits = {"job_timeout_s": 60.0, "hang_timeout_s": 60.0} | limits
    slots = [cpu_slot(i) for i in range(num_slots)]
    return SlotPool(slots, lock_dir=tmp_path / "locks", **limits)


def workers_of(pid: int) -> list[psutil.Process]:
    """List the spawned children; multiprocessing's resource tracker is none of ours."""
    found = []
    for process in psutil.Process(pid).children(recursive=True):
        try:
            if process.status() != psutil.STATUS_ZOMBIE and "spawn_main" in str(process.cmdline()):
                found.append(process)
        except psutil.NoSuchProcess:
            pass
    return found


def spawned(number: int) -> list[psutil.Process]:
    """The spawned children of this process, once there are so many: a fork shows its own name."""
    wait_until(lambda: len(workers_of(os.getpid())) >= number)
    found = workers_of(os.getpid())
    assert len(found) == number
    return found


def is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def wait_until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as executor:
        yield executor


def test_result_comes_back_and_the_child_stays(tmp_path: Path) -> None:
    with make_pool(tmp_path, 2) as pool:
        _: WorkerPool = pool
        assert pool.run(pool_jobs.add, 2, 3) == 5
        assert pool.run(pool_jobs.pid) == pool.run(pool_jobs.pid) != os.getpid()


def test_preloaded_children_take_the_jobs(tmp_path: Path) -> None:
    with make_pool(tmp_path, 2) as pool:
        pool.preload()
        children = {child.pid for child in spawned(2)}
        assert pool.run(pool_jobs.pid) in children
        assert pool.run(pool_jobs.torch_is_loaded)


def test_a_child_that_dies_while_it_loads_costs_nothing(tmp_path: Path) -> None:
    with make_pool(tmp_path) as pool:
        pool.preload()
        (child,) = spawned(1)
        child.kill()
        wait_until(lambda: is_gone(child.pid))
        assert pool.run(pool_jobs.pid) != child.pid


def test_a_job_finds_modules_on_a_path_that_came_after_its_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "of_the_user.py").touch()
    with make_pool(tmp_path) as pool:
        assert not pool.run(pool_jobs.can_import, "of_the_user")
        monkeypatch.syspath_prepend(tmp_path)
        assert pool.run(pool_jobs.can_import, "of_the_user")


def test_a_job_runs_in_the_folder_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with make_pool(tmp_path) as pool:
        assert pool.run(os.getcwd) == str(Path.cwd())
        monkeypatch.chdir(tmp_path)
        assert pool.run(os.getcwd) == str(tmp_path)
    elsewhere = call(pickle.dumps((str(tmp_path / "absent"), sys.path, b"")), threads=1)
    with pytest.raises(ConfigError, match=r"absent, cannot be entered: No such .* shared disk"):
        unpack_result(elsewhere[1:], "add", cpu_slot())


def test_slots_work_at_the_same_time(tmp_path: Path, threads: ThreadPoolExecutor) -> None:
    started: list[Slot] = []
    both = threading.Barrier(2, timeout=10)

    def on_start(slot: Slot) -> None:
        started.append(slot)
        both.wait()

    with make_pool(tmp_path, 2) as pool:
        futures = [threads.submit(pool.run, pool_jobs.pid, on_start=on_start) for _ in range(2)]
        assert len({future.result() for future in futures}) == 2
    assert sorted(slot.name for slot in started) == ["cpu-0", "cpu-1"]


def test_highest_priority_first_then_in_order(tmp_path: Path, threads: ThreadPoolExecutor) -> None:
    order: list[str] = []
    futures: list[Future[int]] = []
    with make_pool(tmp_path) as pool:
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
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    slot = Slot("cpu-0", "cpu", "", 3, ())
    with SlotPool([slot], lock_dir=tmp_path, job_timeout_s=60, hang_timeout_s=60) as pool:
        environ, torch_came_early, num_threads = pool.run(pool_jobs.environment)
        assert environ["CUDA_VISIBLE_DEVICES"] == ""
        assert environ["OMP_NUM_THREADS"] == environ["MKL_NUM_THREADS"] == "3"
        assert not torch_came_early
        assert num_threads == 3
        pool.run(pool_jobs.change_threads)
        assert pool.run(pool_jobs.environment)[2] == 3
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "5"
    assert "OMP_NUM_THREADS" not in os.environ


def test_killed_child_fails_its_job_alone(tmp_path: Path, threads: ThreadPoolExecutor) -> None:
    pid_file = tmp_path / "pid"
    with make_pool(tmp_path, 2) as pool:
        victim = threads.submit(pool.run, pool_jobs.hold, pid_file)
        wait_until(pid_file.exists)
        sibling = threads.submit(pool.run, pool_jobs.sleep, 1.0)
        os.kill(int(pid_file.read_text()), signal.SIGKILL)
        with pytest.raises(JobError, match=r"hold on slot cpu-0: .* killed by SIGKILL after .* s"):
            victim.result(timeout=10)
        assert sibling.result(timeout=10) == 1.0
        first, second = (threads.submit(pool.run, pool_jobs.sleep, 0.5) for _ in range(2))
        assert first.result(timeout=10) == second.result(timeout=10) == 0.5


def test_exit_status_is_named_and_an_idle_death_costs_nothing(tmp_path: Path) -> None:
    with make_pool(tmp_path) as pool:
        with pytest.raises(JobError, match="ended with status 7"):
            pool.run(pool_jobs.leave)
        with pytest.raises(JobError, match="killed by SIGSEGV"):
            pool.run(pool_jobs.die, int(signal.SIGSEGV))
        pid = pool.run(pool_jobs.pid)
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: is_gone(pid))
        time.sleep(0.2)  # a zombie is reaped only once its last thread is gone
        assert pool.run(pool_jobs.pid) != pid


def test_crash_is_seen_and_takes_what_the_job_forked(
    tmp_path: Path, threads: ThreadPoolExecutor
) -> None:
    pid_file = tmp_path / "pid"
    with make_pool(tmp_path) as pool:
        victim = threads.submit(pool.run, pool_jobs.hold_with_offspring, pid_file)
        wait_until(pid_file.exists)
        pid = int(pid_file.read_text())
        [offspring] = psutil.Process(pid).children()
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(JobError, match="SIGKILL"):
            victim.result(timeout=5)
        wait_until(lambda: is_gone(offspring.pid), timeout_s=2)


def test_silent_job_is_killed_and_a_beating_one_is_not(tmp_path: Path) -> None:
    heartbeat = tmp_path / "heartbeat"
    with make_pool(tmp_path, hang_timeout_s=1.2) as pool:
        pool.run(pool_jobs.pid)  # or the start of the child would count
        assert pool.run(pool_jobs.beat, heartbeat, 18, heartbeat=heartbeat) == 18
        started = time.monotonic()
        with pytest.raises(JobError, match=r"no change of .*heartbeat for .* PBKD_HANG_TIMEOUT_S"):
            pool.run(pool_jobs.beat, heartbeat, 0, heartbeat=heartbeat)
        assert time.monotonic() - started < 5
        assert workers_of(os.getpid()) == []
        assert pool.run(pool_jobs.add, 1, 1) == 2


def test_a_job_without_heartbeat_shows_life_by_its_work(tmp_path: Path) -> None:
    with make_pool(tmp_path, hang_timeout_s=1.5) as pool:
        assert pool.run(pool_jobs.work, 4.0) == 4.0
        with pytest.raises(JobError, match=r"killed: no work for \d s, .* PBKD_HANG_TIMEOUT_S"):
            pool.run(pool_jobs.sleep, 60.0)
        assert pool.run(pool_jobs.add, 1, 1) == 2


def test_what_a_job_logs_is_logged_here(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with make_pool(tmp_path) as pool, caplog.at_level(logging.INFO, logger="pbkd"):
        assert pool.run(pool_jobs.log, "epoch 1: 50%") == "epoch 1: 50%"
    mine = [r for r in caplog.records if r.name == "pbkd.models.training"]
    assert [(r.levelname, r.getMessage()) for r in mine] == [("INFO", "epoch 1: 50%")]


def test_long_job_is_killed(tmp_path: Path) -> None:
    with make_pool(tmp_path, job_timeout_s=1.0) as pool:
        started = time.monotonic()
        with pytest.raises(JobError, match=r"sleep on slot cpu-0 .*PBKD_JOB_TIMEOUT_S"):
            pool.run(pool_jobs.sleep, 60.0)
        assert time.monotonic() - started < 5
        assert workers_of(os.getpid()) == []
        assert pool.run(pool_jobs.add, 1, 1) == 2


def test_errors_of_jobs(tmp_path: Path) -> None:
    with make_pool(tmp_path) as pool:
        pid = pool.run(pool_jobs.pid)
        with pytest.raises(TrainingError, match="loss is NaN") as ours:
            pool.run(pool_jobs.diverge)
        assert "in diverge" in ours.value.__notes__[0]
        with pytest.raises(MissingExtraError, match=r"the other pool needs rays"):
            pool.run(pool_jobs.miss)
        with pytest.raises(JobError, match=r"divide .* ZeroDivisionError: division") as other:
            pool.run(pool_jobs.divide)
        assert "in divide" in other.value.__notes__[0]
        with pytest.raises(JobError, match="SystemExit: 3"):
            pool.run(pool_jobs.give_up)
        with pytest.raises(JobError, match=r"unpicklable: its result, of type function, cannot"):
            pool.run(pool_jobs.unpicklable)
        with pytest.raises(JobError, match=r"cannot be sent .* top level of a module"):
            pool.run(lambda: None)
        assert pool.run(pool_jobs.pid) == pid, "an error is no crash: the child lives on"


def test_close_ends_running_and_waiting_jobs(tmp_path: Path, threads: ThreadPoolExecutor) -> None:
    files = [tmp_path / "a", tmp_path / "b"]
    pool = make_pool(tmp_path, 2)
    running: list[Future[Any]] = [threads.submit(pool.run, pool_jobs.hold, path) for path in files]
    wait_until(lambda: all(path.exists() for path in files))
    waiting: Future[Any] = threads.submit(pool.run, pool_jobs.pid)
    assert len(spawned(2)) == 2
    started = time.monotonic()
    pool.close()
    assert workers_of(os.getpid()) == []
    for future in (*running, waiting):
        with pytest.raises(JobError, match="pool is closed"):
            future.result(timeout=5)
    assert time.monotonic() - started < 5
    pool.close()
    with pytest.raises(JobError, match="pool is closed"):
        pool.run(pool_jobs.pid)


@pytest.fixture
def on_signal() -> Iterator[Callable[[Callable[[], None]], None]]:
    """Have a function called by a signal handler, in the main thread, a second from now."""
    before = signal.getsignal(signal.SIGUSR1)
    timer = threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGUSR1))

    def arm(function: Callable[[], None]) -> None:
        signal.signal(signal.SIGUSR1, lambda *_: function())
        timer.start()

    yield arm
    timer.join()
    signal.signal(signal.SIGUSR1, before)


def test_close_from_a_signal_handler(
    tmp_path: Path, on_signal: Callable[[Callable[[], None]], None]
) -> None:
    pool = make_pool(tmp_path)
    on_signal(pool.close)
    with pytest.raises(JobError, match="pool is closed"):
        pool.run(pool_jobs.sleep, 30.0)
    assert workers_of(os.getpid()) == []
    with pool._condition:  # the signal can come on any line of run()
        pool.close()


def test_interrupted_run_takes_its_child_along(
    tmp_path: Path, on_signal: Callable[[Callable[[], None]], None]
) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    with make_pool(tmp_path) as pool:
        on_signal(interrupt)
        with pytest.raises(KeyboardInterrupt):
            pool.run(pool_jobs.sleep, 30.0)
        assert workers_of(os.getpid()) == []
        assert pool.run(pool_jobs.add, 1, 1) == 2


# A console script as pip writes it: no .py, guarded, imported again by every child.
SCRIPT = """\
import os, signal, sys, time
from pathlib import Path
import pool_jobs
from flows.slot_pool import SlotPool
from flows.slots import Slot

folder = Path(sys.argv[1])
(folder / f"main-{__name__}-{os.getpid()}").touch()
if __name__ == "__mp_main__":
    time.sleep(0.5)  # a slow import

def main():
    global pool  # what is collected early needs no care at exit
    slot = Slot("cpu-0", "cpu", "", 1, ("cpu-0",))
    pool = SlotPool([slot], lock_dir=folder / "locks", job_timeout_s=60, hang_timeout_s=60)
    BODY

if __name__ == "__main__":
    main()
"""


Start = Callable[[str], subprocess.Popen[str]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start a script with the given body; what still runs at the end is killed."""
    root, here = Path(__file__).parents[2], Path(__file__).parent
    script = tmp_path / "script"
    processes: list[subprocess.Popen[str]] = []

    def start_script(body: str) -> subprocess.Popen[str]:
        script.write_text(SCRIPT.replace("BODY", body.strip()))
        process = subprocess.Popen(
            [sys.executable, "-W", "error", str(script), str(tmp_path)],
            env=os.environ | {"PYTHONPATH": f"{root}:{here}"},
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


def test_unclosed_pool_does_not_hold_up_the_exit(tmp_path: Path, start: Start) -> None:
    process = start("print(pool.run(pool_jobs.add, 1, 2))")
    assert process.communicate(timeout=15) == ("3\n", "")
    assert process.returncode == 0
    names = sorted(path.name.split("-")[1] for path in tmp_path.glob("main-*"))
    assert names == ["__main__", "__mp_main__"]


def test_ctrl_c_reaches_the_parent_alone(tmp_path: Path, start: Start) -> None:
    body = """
    signal.signal(signal.SIGINT, lambda *_: print("asked"))
    print(pool.run(pool_jobs.ignored_signals))
    """
    process = start(body)
    wait_until(lambda: any(tmp_path.glob("main-__mp_main__-*")))  # the child still imports
    os.killpg(process.pid, signal.SIGINT)
    assert process.communicate(timeout=15) == ("asked\nTrue\n", "")


def test_children_go_when_their_parent_is_killed(tmp_path: Path, start: Start) -> None:
    process = start("pool.run(pool_jobs.hold_with_offspring, folder / 'pid')")
    wait_until((tmp_path / "pid").exists)
    child = psutil.Process(int((tmp_path / "pid").read_text()))
    [offspring] = child.children()
    process.kill()
    wait_until(lambda: is_gone(child.pid) and is_gone(offspring.pid), timeout_s=2)


def test_device_lock_keeps_two_processes_apart(tmp_path: Path, start: Start) -> None:
    (tmp_path / "spans").mkdir()
    body = """
    with pool:
        for _ in range(3):
            pool.run(pool_jobs.span, folder / "spans")
    """
    processes = [start(body) for _ in range(2)]
    for process in processes:
        _, stderr = process.communicate(timeout=20)
        assert process.returncode == 0, stderr
    texts = [path.read_text().split() for path in (tmp_path / "spans").iterdir()]
    spans = sorted((float(start_s), float(end_s)) for start_s, end_s in texts)
    assert len(spans) == 6
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))


def test_waiting_for_a_device_names_the_holder_once(
    tmp_path: Path, threads: ThreadPoolExecutor, caplog: pytest.LogCaptureFixture
) -> None:
    pid_file = tmp_path / "pid"
    with make_pool(tmp_path) as holder, make_pool(tmp_path) as pool:
        threads.submit(holder.run, pool_jobs.hold, pid_file)
        wait_until(pid_file.exists)
        waiting = threads.submit(pool.run, pool_jobs.add, 1, 1)
        time.sleep(1.2)
        holder.close()
        assert waiting.result(timeout=5) == 2
    [record] = [record for record in caplog.records if "waiting" in record.message]
    assert f"device cpu-0 is in use by process {os.getpid()}" in record.message


class FakeNvml(types.ModuleType):
    """A driver that knows so many GPUs."""

    class NVMLError(Exception):
        pass

    def __init__(self, num_gpus: int | None) -> None:
        super().__init__("pynvml")
        self._num_gpus = num_gpus
        self.num_open = 0

    def nvmlInit(self) -> None:  # noqa: N802
        if self._num_gpus is None:
            raise self.NVMLError("no driver")
        self.num_open += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.num_open -= 1

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return self._num_gpus or 0

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        return index

    def nvmlDeviceGetUUID(self, handle: int) -> str:  # noqa: N802
        return f"GPU-{'abcd'[handle]}0"


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., FakeNvml]:
    def make(num_gpus: int | None, visible: str | None = None, num_cores: int = 8) -> FakeNvml:
        nvml = FakeNvml(num_gpus)
        monkeypatch.setitem(sys.modules, "pynvml", nvml)
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(10, 10 + num_cores)))
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        return nvml

    return make


def settings(**values: Any) -> Settings:
    return Settings.model_validate(values)


def test_cpu_slots_share_the_cores(machine: Callable[..., FakeNvml]) -> None:
    machine(None)
    assert [slot.locks for slot in worker_slots(settings())] == [
        (f"cpu-{10 + i}",) for i in range(8)
    ]
    assert worker_slots(settings(workers=3))[1] == Slot("cpu-1", "cpu", "", 2, ("cpu-12", "cpu-13"))
    many = worker_slots(settings(workers=10))
    assert [slot.threads for slot in many] == [1] * 10
    assert len({slot.locks for slot in many}) == 10
    whole = whole_machine_slot(settings(workers=10))
    assert whole.threads == 8
    assert set(whole.locks) == {name for slot in many for name in slot.locks}


def test_gpu_slots(machine: Callable[..., FakeNvml], caplog: pytest.LogCaptureFixture) -> None:
    nvml = machine(2)
    assert worker_slots(settings()) == [
        Slot("gpu-0", "cuda", "GPU-a0", 4, ("gpu-GPU-a0",)),
        Slot("gpu-1", "cuda", "GPU-b0", 4, ("gpu-GPU-b0",)),
    ]
    assert nvml.num_open == 0
    assert whole_machine_slot(settings()) == Slot("gpu-0", "cuda", "GPU-a0", 8, ("gpu-GPU-a0",))
    assert [slot.device for slot in worker_slots(settings(device="cpu"))] == ["cpu"] * 8
    assert len(worker_slots(settings(workers=1))) == 1
    assert not caplog.records
    assert worker_slots(settings(workers=5)) == worker_slots(settings())
    assert "PBKD_WORKERS=5: there are 2 GPUs" in caplog.text


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        ("3, 1", {"3": "gpu-GPU-d0", "1": "gpu-GPU-b0"}),
        ("GPU-c,0", {"GPU-c": "gpu-GPU-c0", "0": "gpu-GPU-a0"}),
        ("2,-1,0", {"2": "gpu-GPU-c0"}),
        ("MIG-x", {"MIG-x": "gpu-MIG-x"}),
        ("", {}),
        ("9", {}),
    ],
)
def test_cuda_visible_devices_is_kept(
    machine: Callable[..., FakeNvml], visible: str, expected: dict[str, str]
) -> None:
    machine(4, visible)
    slots = [slot for slot in worker_slots(settings()) if slot.device == "cuda"]
    assert {slot.visible_devices: slot.locks[0] for slot in slots} == expected


def test_cuda_without_gpu_is_refused(machine: Callable[..., FakeNvml]) -> None:
    machine(None)
    with pytest.raises(ConfigError, match=r"PBKD_DEVICE=cuda: got 0 GPUs .*\(unset\).*nvidia-smi"):
        worker_slots(settings(device="cuda"))
    machine(2, "")
    with pytest.raises(ConfigError, match=r"got 2 GPUs .*CUDA_VISIBLE_DEVICES=''"):
        whole_machine_slot(settings(device="cuda"))


def test_pool_does_not_import_torch() -> None:
    code = (
        "import sys, flows.slots as s; s.worker_slots(s.Settings()); print('torch' in sys.modules)"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"


def test_so_many_calls_use_a_pool_at_once(tmp_path: Path) -> None:
    running, most, lock = [0], [0], threading.Lock()

    def call(_: WorkerPool) -> None:
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        time.sleep(0.05)
        with lock:
            running[0] -= 1

    pool = make_pool(tmp_path)
    run_all(pool, [call] * 6, at_once=2)
    assert most == [2]
    assert pool.leave_room(1) == 1
