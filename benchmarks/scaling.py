"""The block phase on two workers against one, and against what the machine can give.

Three programs, interleaved: one worker of one thread; two workers of one thread each; two copies of
the one-worker program side by side, each with its own cache. Two copies share nothing but the
machine, so twice the time of one over theirs is the machine's ceiling for two workers. Filling the
cache is counted, measuring costs is not (its results are kept).

The plan predicts what the trainings of a run take; the last target is how far it is off.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import harness
import torch
from workspaces import make_workspace, run_stages

from flows.profile import profile_workers
from flows.slot_pool import SlotPool
from flows.slots import Slot
from pbkd.activations import run_fill
from pbkd.artifacts import Workspace, load_tensors
from pbkd.distill import TRAINEES, run_job
from pbkd.distill.trainee import WEIGHTS
from pbkd.stages import StageContext, activations, distill

PARAMS = {
    "prepare": {"image_size": 32},
    "teacher": {"model": "cifar_vgg16", "width": 0.5, "epochs": 1, "min_accuracy": 0.0},
    "blocks": {"candidates": [{"kind": "separable", "depth": 2}]},
    "activations": {"chunk": 64, "max_cache_gb": 4.0},
    "distill": {"epochs": 6, "patience": 100, "score_images": 64},
    "stitch": {"students": {"half": {"max_macs": 0.5}}},
}


class Program:
    """The block phase of one workspace on a pool of its own, whose processes stay warm."""

    def __init__(self, workspace: Workspace, slots: list[Slot], locks: Path) -> None:
        self.workspace = workspace
        self.source = ""
        self.predicted_s: list[float] = []
        self.trained_s: list[float] = []
        self.jobs: list[dict[str, Any]] = []
        self._pool = SlotPool(slots, lock_dir=locks, job_timeout_s=3600, hang_timeout_s=600)

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.close()

    def run(self) -> float:
        """Seconds from an empty store to the last trained and scored candidate."""
        shutil.rmtree(self.workspace.store.root, ignore_errors=True)
        for stage in ("activations", "distill"):
            shutil.rmtree(self.workspace.artifacts(stage), ignore_errors=True)
        context, pool = StageContext.load(self.workspace), self._pool
        subject = activations.start(context)
        profile = profile_workers(context, subject, pool)
        num_workers = len(pool.slots)
        start = time.perf_counter()
        settled = activations.settle(context, subject, profile, num_workers)
        self._map(run_fill, activations.fill_jobs(context, subject, settled, profile, num_workers))
        activations.finish(context, subject, settled)
        subject = distill.start(context)
        todo = subject.left_to_do(context.workspace.store)
        plan = distill.plan_distill(context, subject, todo, profile, num_workers)
        trained = time.perf_counter()
        reports = self._map(run_job, plan.jobs)
        end = time.perf_counter()
        distill.finish_distill(context, plan, reports)
        self.source = settled.source
        assert plan.wall_s is not None
        self.predicted_s.append(plan.wall_s)
        self.trained_s.append(end - trained)
        costs = plan.predicted.jobs if plan.predicted is not None else ()
        self.jobs = [
            {"predicted_s": job.cost_s, "actual_s": report.duration_s, "trained": report.trained}
            for job, report in zip(costs, reports, strict=True)
        ]
        return end - start

    @property
    def errors(self) -> list[float]:
        """Of the predictions, relative to what the trainings took; the first run is left out."""
        pairs = zip(self.predicted_s[1:], self.trained_s[1:], strict=True)
        return [predicted / actual - 1 for predicted, actual in pairs]

    def weights(self) -> dict[str, dict[str, torch.Tensor]]:
        """Trainee's key to its tensors."""
        folders = (self.workspace.store.root / TRAINEES).iterdir()
        return {folder.name: load_tensors(folder / WEIGHTS) for folder in sorted(folders)}

    def _map(self, function: Callable[[Any], Any], jobs: Sequence[Any]) -> list[Any]:
        def call(index: int) -> Any:
            return self._pool.run(function, jobs[index], priority=-float(index))

        with ThreadPoolExecutor(max(1, len(jobs))) as threads:
            return list(threads.map(call, range(len(jobs))))


def main() -> None:
    """Measure, print and write."""
    options = harness.parser(__doc__).parse_args()
    rounds = 3 if options.quick else 9
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        folder = Path(temporary)
        template = make_workspace(folder / "template", PARAMS)
        run_stages(template, "prepare", "teacher", "blocks")

        def program(name: str, num_workers: int) -> Program:
            shutil.copytree(template.root, folder / name)
            workspace = Workspace(folder / name, folder / name / ".pbkd")
            slots = [Slot(f"cpu-{i}", "cpu", "", 1, ()) for i in range(num_workers)]
            return stack.enter_context(Program(workspace, slots, folder / "locks"))

        one, two = program("one", 1), program("two", 2)
        copies = [program("copy-a", 1), program("copy-b", 1)]

        def both_copies() -> float:
            with ThreadPoolExecutor(2) as threads:
                return max(threads.map(Program.run, copies))

        variants = {"one worker": one.run, "two workers": two.run, "two copies": both_copies}
        harness.interleaved(variants, 1)  # starts processes, measures and keeps the costs
        samples = harness.interleaved(variants, rounds)
        mine, other = one.weights(), two.weights()
    settings = {
        "params": PARAMS,
        "rounds": rounds,
        "jobs of the last run": {"one worker": one.jobs, "two workers": two.jobs},
        "sources": {"one worker": one.source, "two workers": two.source},
        "predicted_s": {"one worker": one.predicted_s[1:], "two workers": two.predicted_s[1:]},
        "trained_s": {"one worker": one.trained_s[1:], "two workers": two.trained_s[1:]},
    }
    _report(samples, _equal(mine, other), one.errors + two.errors, settings)


def _equal(
    mine: dict[str, dict[str, torch.Tensor]], other: dict[str, dict[str, torch.Tensor]]
) -> bool:
    return mine.keys() == other.keys() and all(
        torch.equal(tensor, other[key][name])
        for key, tensors in mine.items()
        for name, tensor in tensors.items()
    )


def _report(
    samples: dict[str, list[float]],
    same_weights: bool,
    errors: list[float],
    settings: dict[str, Any],
) -> None:
    medians = {name: harness.median(values) for name, values in samples.items()}
    speedup = medians["one worker"] / medians["two workers"]
    ceiling = 2 * medians["one worker"] / medians["two copies"]
    targets = [
        harness.Target(
            "speed-up over the machine's ceiling", speedup / ceiling, "at least", 0.95, ""
        ),
        harness.Target("equal weights", float(same_weights), "at least", 1, ""),
        harness.Target(
            "prediction's error, median",
            100 * harness.median([abs(error) for error in errors]),
            "at most",
            15,
            "%",
        ),
    ]
    if ceiling >= 1.95:
        targets.append(harness.Target("speed-up of two workers", speedup, "at least", 1.85, "x"))
    gains = {"one worker": 1.0, "two workers": speedup, "two copies": ceiling}
    rows = [
        {
            "program": name,
            "seconds (median)": f"{medians[name]:.2f}",
            "spread": harness.spread(samples[name]),
            "work per second, one worker = 1": f"{gains[name]:.3f}",
        }
        for name in samples
    ]
    harness.finish("scaling", settings, samples, rows, targets)


if __name__ == "__main__":
    main()
