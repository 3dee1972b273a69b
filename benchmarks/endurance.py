"""Small runs that are killed at a random moment, in a random way, and run again.

After the rerun the figures must be those of a run that nobody disturbed, byte for byte, DVC must
find all up to date, and nothing may be left: no process, no temporary file, no shared memory.
Targets: every run right, nothing left, all processes gone 10 s after the kill.
"""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import islice
from pathlib import Path

import harness
import numpy as np
import psutil
from programs import LONGEST_S, output_of, processes_of, run, seconds_until_gone, start
from workspaces import make_workspace

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
COMMANDS = {"flow": "pbkd run", "repro": "dvc repro"}
VICTIMS = ("a worker", "the driver", "all at once", "SIGTERM")
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - where the system keeps it


def main() -> None:
    """Run, print and write."""
    parser = harness.parser(__doc__)
    parser.add_argument("--runs", type=int, help="[default: 50; 4 with --quick]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit-s", type=float, default=1e9, help="then no further run begins")
    parser.add_argument("--at-once", type=int, default=1, help="runs side by side, on a core each")
    options = parser.parse_args()
    num_runs = options.runs or (4 if options.quick else 50)
    random = np.random.default_rng(options.seed)
    before = set(SHARED_MEMORY.iterdir())
    cores = iter(sorted(os.sched_getaffinity(0)) if options.at_once > 1 else ())

    def pin() -> None:
        if core := {*islice(cores, 1)}:
            os.sched_setaffinity(0, core)  # of this thread and the processes it starts

    began = time.perf_counter()
    with (
        tempfile.TemporaryDirectory() as temporary,
        ThreadPoolExecutor(options.at_once, initializer=pin) as threads,
    ):
        folder = Path(temporary)
        found = threads.map(lambda name: undisturbed(folder / name, name), COMMANDS)
        references = dict(zip(COMMANDS, found, strict=True))
        print({name: f"{seconds:.0f} s" for name, (_, seconds) in references.items()}, flush=True)
        expected = references["flow"][0]
        draws = [
            (
                str(random.choice(list(COMMANDS))),
                str(random.choice(VICTIMS)),
                random.uniform(0.05, 1),
            )
            for _ in range(num_runs)
        ]

        def one(number: int) -> dict[str, object] | None:
            if time.perf_counter() - began > options.limit_s:
                return None
            driver, victim, share = draws[number]
            after_s = share * references[driver][1]
            outcome = disturbed(folder / f"run-{number}", driver, victim, after_s, expected)
            print(number, outcome, flush=True)
            return outcome

        outcomes = [outcome for outcome in threads.map(one, range(num_runs)) if outcome]
    report(outcomes, options.seed, len(set(SHARED_MEMORY.iterdir()) - before))


def undisturbed(root: Path, driver: str) -> tuple[bytes, float]:
    """The figures of a run that nobody disturbs, and its seconds."""
    make_workspace(root, PARAMS)
    began = time.perf_counter()
    run(root, COMMANDS[driver])
    return (root / "results" / "metrics.json").read_bytes(), time.perf_counter() - began


def disturbed(
    root: Path, driver: str, victim: str, after_s: float, expected: bytes
) -> dict[str, object]:
    """Kill a run, run it again, and say what is wrong."""
    make_workspace(root, PARAMS)
    process = start(root, COMMANDS[driver])
    with suppress(subprocess.TimeoutExpired):
        process.wait(after_s)
    stage = sorted(path.stem for path in (root / ".pbkd" / "stages").glob("*.json"))
    kill(process, victim)
    if victim == "a worker":
        process.wait(LONGEST_S)
    gone_s = seconds_until_gone(root)
    if process.wait(10):
        try:
            run(root, COMMANDS[driver])
        except SystemExit as failure:
            print(failure)
    figures = root / "results" / "metrics.json"
    return {
        "driver": driver,
        "victim": victim,
        "after_s": round(after_s, 1),
        "stages_done": len(stage),
        "right": figures.is_file() and figures.read_bytes() == expected,
        "clean": "up to date" in output_of(root, "dvc status"),
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
