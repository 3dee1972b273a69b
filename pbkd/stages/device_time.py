"""Device seconds that a student took, from the blocks on: what its baselines are given."""

from __future__ import annotations

from collections.abc import Iterable

from pbkd.artifacts import Workspace, read_json
from pbkd.report import BlockPhase, JobFigures
from pbkd.stages.distill import read_distilled


def student_device_s(workspace: Workspace, student: str, finetune_s: float) -> float:
    """The whole block phase, its repair and its fine-tuning, seconds.

    Other students share the block phase, but this one could not be without it.

    Args:
        finetune_s: ``duration_s`` of its finetune.json.

    Raises:
        ArtifactError: a stage has not run.
    """
    stitched = read_json(workspace.artifacts("stitch") / student / "stitch.json")
    return block_phase_s(workspace) + float(stitched["repair_s"]) + finetune_s


def block_phase_s(workspace: Workspace) -> float:
    """Seconds in which devices trained the present library's candidates.

    The jobs of the last block phase count by their own duration. Candidates that were trained
    before, or without a pool, count by the time in which at least one of them was trained: what
    trained side by side on other devices is then counted once.
    """
    distilled = [item.result for item in read_distilled(workspace)]
    names = {f"{result.block}/{result.candidate}" for result in distilled}
    jobs = [job for job in _jobs(workspace) if names & set(job.trained)]
    known = {name for job in jobs for name in job.trained}
    spans = [
        (result.started_at, result.finished_at)
        for result in distilled
        if f"{result.block}/{result.candidate}" not in known
    ]
    return covered_s(spans) + sum(job.duration_s for job in jobs)


def covered_s(spans: Iterable[tuple[float, float]]) -> float:
    """Length of the union of (start, end) intervals."""
    total, covered_to = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(end - max(start, covered_to), 0.0)
        covered_to = max(covered_to, end)
    return total


def _jobs(workspace: Workspace) -> tuple[JobFigures, ...]:
    path = workspace.state / "block_phase.json"
    return BlockPhase.model_validate(read_json(path)).jobs if path.is_file() else ()
