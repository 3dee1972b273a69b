"""Small runs that are killed at a random moment, in a random way, and run again.

After the rerun the figures must be those of a run that nobody disturbed, byte for byte, DVC must
find all up to date, and nothing may be left: no process, no temporary file, no shared memory.
Targets: every run right, nothing left, all processes gone 10 s after the kill.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import harness
import numpy as np
import psutil
from workspaces import make_workspace

BIN = Path(sys.executable).parent
PARAMS = {
    "prepare": {"image_size": 8},
    "teacher": {"width": 0.25, "epochs": 3, "min_accuracy": 0.0},
    "activations": {"source": "cache"},
    "distill": {"epochs": 2, "patience": 100},
    "stitch": {"students": {"half": {"max_parameters": 0.6}}, "max_damage": 5.0},
    "finetune": {"epochs": 1},
    "shrink": {"recipe": []},
    "evaluate": {"latency_batch_sizes": [1], "latency_seconds": 0.05, "runtimes": ["pytorch"]},
    "register": {"name": "endurance"},
}
COMMANDS = {"flow": ("pbkd", "run"), "repro": ("dvc", "repro")}
VICTIMS = ("a worker", "the driver", "all at once", "SIGTERM")
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - where the system keeps it
LONGEST_S = 600.0


def main() -> None:
    """Run, print and write."""
    parser = harness.parser(__doc__)
    parser.add_argument("--runs", type=int, help="[default: 50; 4 with --quick]")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    num_runs = options.runs or (4 if options.quick else 50)
    random = np.random.default_rng(options.seed)
    before = set(SHARED_MEMORY.iterdir())
    outcomes = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        references = {name: undisturbed(folder / name, name) for name in COMMANDS}
        expected = references["flow"][0]
        for number in range(num_runs):
            driver = str(random.choice(list(COMMANDS)))
            victim = str(random.choice(VICTIMS))
            after_s = float(random.uniform(0.05, 1.0)) * references[driver][1]
            place = folder / f"run-{number}"
            outcomes.append(disturbed(place, driver, victim, after_s, expected))
            print(number, outcomes[-1], flush=True)
    report(outcomes, options.seed, len(set(SHARED_MEMORY.iterdir()) - before))


def environment_of(root: Path) -> dict[str, str]:
    """Of all programs of a workspace; PBKD_LOCK_DIR tells whose they are."""
    foreign = ("PREFECT_", "MLFLOW_", "PBKD_", "DVC_", "OMP_")
    kept = {name: text for name, text in os.environ.items() if not name.startswith(foreign)}
    return kept | {
        "PATH": f"{BIN}{os.pathsep}{kept.get('PATH', '')}",
        "PREFECT_HOME": str(root / "prefect-home"),
        "PBKD_WORKERS": "2",
        "PBKD_DEVICE": "cpu",
        "PBKD_LOCK_DIR": str(root / "locks"),
    }


def start(root: Path, driver: str) -> subprocess.Popen[bytes]:
    """Start a driver in a workspace, in a session of its own."""
    program, *arguments = COMMANDS[driver]
    log = (root / "log.txt").open("ab")
    return subprocess.Popen(
        [str(BIN / program), *arguments],
        cwd=root, env=environment_of(root), stdout=log, stderr=log, start_new_session=True,
    )  # fmt: skip


def finish(root: Path, driver: str) -> None:
    """Run a driver to its end."""
    process = start(root, driver)
    if process.wait(LONGEST_S):
        sys.exit(f"{driver} in {root} failed:\n{(root / 'log.txt').read_text()[-3000:]}")


def undisturbed(root: Path, driver: str) -> tuple[bytes, float]:
    """The figures of a run that nobody disturbs, and its seconds."""
    make_workspace(root, PARAMS)
    began = time.perf_counter()
    finish(root, driver)
    return (root / "results" / "metrics.json").read_bytes(), time.perf_counter() - began


def disturbed(
    root: Path, driver: str, victim: str, after_s: float, expected: bytes
) -> dict[str, object]:
    """Kill a run, run it again, and say what is wrong."""
    make_workspace(root, PARAMS)
    process = start(root, driver)
    with suppress(subprocess.TimeoutExpired):
        process.wait(after_s)
    stage = sorted(path.stem for path in (root / ".pbkd" / "stages").glob("*.json"))
    kill(process, victim)
    survives = victim == "a worker"
    if survives:
        process.wait(LONGEST_S)
    gone_s = seconds_until_gone(root)
    process.wait(10)
    if not survives or process.returncode:
        finish(root, driver)
    status = subprocess.run(
        [str(BIN / "dvc"), "status"],
        cwd=root, env=environment_of(root), capture_output=True, text=True,
    )  # fmt: skip
    return {
        "driver": driver,
        "victim": victim,
        "after_s": round(after_s, 1),
        "stages_done": len(stage),
        "right": (root / "results" / "metrics.json").read_bytes() == expected,
        "clean": "up to date" in status.stdout,
        "gone_s": round(gone_s, 1),
        "processes": len(list(processes_of(root))),
        "files": len(leftovers(root)),
    }


def kill(process: subprocess.Popen[bytes], victim: str) -> None:
    """Disturb a run; one that has ended is left alone."""
    with suppress(psutil.NoSuchProcess):
        driver = psutil.Process(process.pid)
        children = driver.children(recursive=True)
        if victim == "SIGTERM":
            driver.send_signal(signal.SIGTERM)
        elif victim == "a worker":
            workers = [child for child in children if "spawn_main" in " ".join(child.cmdline())]
            for worker in workers[:1]:
                worker.kill()
        else:
            for own in (driver, *children) if victim == "all at once" else (driver,):
                with suppress(psutil.NoSuchProcess):
                    own.kill()


def processes_of(root: Path) -> Iterator[psutil.Process]:
    """Living processes of a workspace."""
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            own = process.environ().get("PBKD_LOCK_DIR") == str(root / "locks")
            if own and process.status() != psutil.STATUS_ZOMBIE:
                yield process


def seconds_until_gone(root: Path) -> float:
    """How long the run's processes live on; at most 60."""
    began = time.perf_counter()
    while any(True for _ in processes_of(root)) and time.perf_counter() - began < 60:
        time.sleep(0.2)
    return time.perf_counter() - began


def leftovers(root: Path) -> list[Path]:
    """Temporary files and half-written items."""
    found = [*root.rglob(".*.tmp"), *root.rglob("*.parts")]
    return [path for path in found if ".dvc" not in path.parts and "prefect-home" not in path.parts]


def report(outcomes: list[dict[str, object]], seed: int, num_shared: int) -> None:
    """Table, targets and the file."""
    right = [outcome["right"] and outcome["clean"] for outcome in outcomes]
    targets = [
        harness.Target("runs right after a rerun", np.mean(right).item(), "at least", 1.0, "share"),
        harness.Target(
            "processes left", sum(int(str(o["processes"])) for o in outcomes), "at most", 0, ""
        ),
        harness.Target("files left", sum(int(str(o["files"])) for o in outcomes), "at most", 0, ""),
        harness.Target("shared memory left", num_shared, "at most", 0, "files"),
        harness.Target(
            "longest life of a process after the kill",
            max(float(str(o["gone_s"])) for o in outcomes),
            "at most",
            10,
            "s",
        ),
    ]
    rows = [{key: str(value) for key, value in outcome.items()} for outcome in outcomes]
    settings = {"params": PARAMS, "runs": len(outcomes), "seed": seed}
    harness.finish("endurance", settings, {"outcomes": outcomes}, rows, targets)


if __name__ == "__main__":
    main()
