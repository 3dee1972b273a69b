"""What the drivers cost: the same pipeline by the library alone, by `pbkd run`, by `dvc repro`.

Every program starts from nothing, in its own workspace, with one worker of as many threads as there
are cores, and ends with a registered model:

- library: every stage in one process, no orchestrator;
- run, warm: `pbkd run` with a Prefect server that is running already;
- run, cold: `pbkd run` without one, so that it starts a temporary server;
- repro, cold: `dvc repro`, where every stage is a process of its own.

What a driver costs does not grow with the training, so the share of a two-minute run is the
difference to the library's time over 120 s. The start of an interpreter with torch, which `dvc
repro` pays per stage, is measured and listed apart.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import harness
from programs import BIN, environment_of
from workspaces import make_workspace

from flows.server import answers
from pbkd.stages import STAGES

LONG_RUN_S = 120.0
PARAMS = {
    "prepare": {"image_size": 8},
    "teacher": {"epochs": 2, "min_accuracy": 0.0},
    "distill": {"epochs": 2, "patience": 100},
    "finetune": {"epochs": 1},
    "evaluate": {"latency_batch_sizes": [1]},
    "register": {"name": "overhead"},
}
LIBRARY = """
from pathlib import Path
from pbkd.artifacts import Workspace
from pbkd.stages import STAGES, StageContext, run_stage
for name in STAGES:
    run_stage(name, StageContext.load(Workspace.find(Path("."), None)))
"""


def main() -> None:
    """Measure, print and write."""
    options = harness.parser(__doc__).parse_args()
    rounds = 2 if options.quick else 5
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        with prefect_server(folder / "server") as url:
            commands: dict[str, tuple[list[str], dict[str, str]]] = {
                "library": ([sys.executable, "-c", LIBRARY], {}),
                "run, warm": ([str(BIN / "pbkd"), "run"], {"PREFECT_API_URL": url}),
                "run, cold": ([str(BIN / "pbkd"), "run"], {}),
                "repro, cold": ([str(BIN / "dvc"), "repro"], {}),
            }
            variants = {
                name: lambda c=command, e=extra: seconds(folder, c, e)
                for name, (command, extra) in commands.items()
            }
            samples = harness.interleaved(variants, rounds)
        start = [seconds(folder, [sys.executable, "-c", "import torch"], {}) for _ in range(rounds)]
    report(samples, start, rounds)


def seconds(folder: Path, command: list[str], extra: dict[str, str]) -> float:
    """Wall time of a command in a fresh workspace."""
    root = make_workspace(folder / "workspace", PARAMS).root
    one_worker = {"PBKD_WORKERS": "1", "PREFECT_HOME": str(folder / "prefect")}
    environment = environment_of(root) | one_worker | extra
    log = folder / "log.txt"
    start = time.perf_counter()
    with log.open("w") as output:
        done = subprocess.run(command, cwd=root, env=environment, stdout=output, stderr=output)
    duration_s = time.perf_counter() - start
    if done.returncode:
        sys.exit(f"{' '.join(command)[:80]} failed:\n{log.read_text()[-3000:]}")
    shutil.rmtree(root)
    return duration_s


@contextmanager
def prefect_server(folder: Path) -> Iterator[str]:
    """A Prefect server of our own; its API's URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder.mkdir()
    url = f"http://127.0.0.1:{port}/api"
    quiet = {"PREFECT_HOME": str(folder), "PREFECT_SERVER_ANALYTICS_ENABLED": "0"}
    with (folder / "log.txt").open("w") as log:
        server = subprocess.Popen(
            [str(BIN / "prefect"), "server", "start", "--host", "127.0.0.1", "--port", str(port)],
            env=os.environ | quiet,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline:
            if answers(f"{url}/health"):
                break
            time.sleep(0.3)
        yield url
    finally:
        with suppress(ProcessLookupError):
            os.killpg(server.pid, 15)
        server.wait(30)


def report(samples: dict[str, list[float]], start: list[float], rounds: int) -> None:
    """Tables, targets and the file."""
    medians = {name: harness.median(values) for name, values in samples.items()}
    over = {name: value - medians["library"] for name, value in medians.items()}
    starts_s = harness.median(start) * (len(STAGES) - 1)  # the library starts once as well
    targets = [
        harness.Target(
            "pbkd run with a running server, share of a two-minute run",
            100 * over["run, warm"] / LONG_RUN_S,
            "at most",
            10,
            "%",
        ),
        harness.Target("pbkd run, cold", over["run, cold"], "at most", 25, "s"),
        harness.Target(
            "dvc repro, cold, without one start of torch per stage",
            over["repro, cold"] - starts_s,
            "at most",
            25,
            "s",
        ),
    ]
    rows = [
        {
            "program": name,
            "seconds (median)": f"{medians[name]:.1f}",
            "spread": harness.spread(values),
            "over the library (s)": f"{over[name]:.1f}",
        }
        for name, values in samples.items()
    ]
    rows.append(
        {
            "program": "python -c 'import torch'",
            "seconds (median)": f"{harness.median(start):.1f}",
            "spread": harness.spread(start),
            "over the library (s)": f"{starts_s:.1f} for the other {len(STAGES) - 1} stages",
        }
    )
    settings = {"params": PARAMS, "rounds": rounds}
    harness.finish("overhead", settings, samples | {"import torch": start}, rows, targets)


if __name__ == "__main__":
    main()
