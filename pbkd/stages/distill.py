"""Stage `distill`: train every candidate of every block, and score its damage.

The work in the middle is the jobs'; what maps them onto workers is the caller's. This file says
what there is to do (``plan_distill``) and puts together what was done (``finish_distill``).
"""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from pbkd.artifacts import Store, Workspace, atomic_dir, link_tree, read_json, write_json
from pbkd.distill import (
    SCORES,
    TRAINEES,
    Damage,
    JobReport,
    JobSpec,
    Profile,
    TraineeResult,
    TraineeSpec,
    run_job,
)
from pbkd.distill.costs import teacher_score_s
from pbkd.distill.score import SCORE
from pbkd.distill.trainee import RESULT
from pbkd.errors import ArtifactError
from pbkd.plan import Plan, PlannedJob
from pbkd.stages.activations import Settled, adopt_cache, read_settled
from pbkd.stages.budgets import check_budgets
from pbkd.stages.context import StageContext, subfolders
from pbkd.stages.planning import Subject, plan_of, profiled_here

_log = logging.getLogger(__name__)


class Distilled(BaseModel):
    """One trained candidate, as ``distill.json`` lists it."""

    model_config = ConfigDict(frozen=True)

    key: str
    result: TraineeResult
    damage: Damage


@dataclass(frozen=True)
class DistillPlan:
    """All trainees of the present parameters, and jobs for those that the store does not hold.

    Attributes:
        jobs: in the order in which idle workers should take them.
        predicted: what the jobs are predicted to take; None where there is nothing to do.
        score_s: predicted seconds of the teacher's own pass over the images of the score.
    """

    trainees: tuple[TraineeSpec, ...]
    jobs: tuple[JobSpec, ...] = ()
    predicted: Plan | None = None
    score_s: float = 0.0

    @property
    def blocks(self) -> list[str]:
        """Block paths in the order of the network."""
        return list(dict.fromkeys(trainee.block for trainee in self.trainees))

    @property
    def wall_s(self) -> float | None:
        """Predicted seconds from the first job's start to the last one's end."""
        return self.predicted.wall_s + self.score_s if self.predicted is not None else None

    def of_block(self, block: str) -> list[TraineeSpec]:
        """The trainees of one block."""
        return [trainee for trainee in self.trainees if trainee.block == block]


def run(context: StageContext) -> None:
    """Everything in this process, one job after the other, without an orchestrator."""
    plan = plan_here(context)
    finish_distill(context, plan, [run_job(job) for job in plan.jobs])


def plan_here(context: StageContext) -> DistillPlan:
    """The plan for this process as the only worker."""
    subject = start(context)
    todo = subject.left_to_do(context.workspace.store)
    if not todo:
        return DistillPlan(tuple(subject.trainees))
    profile = profiled_here(context.workspace, subject)
    return plan_distill(context, subject, todo, profile, num_workers=1)


def start(context: StageContext) -> Subject:
    """Import what the old outputs hold, and read what there is to do.

    Raises:
        ArtifactError: an earlier stage has not run.
        BudgetError: no choice of candidates can keep to a student's limits.
    """
    check_budgets(context)
    workspace, store = context.workspace, context.workspace.store
    output = workspace.artifacts("distill")
    for kind in (TRAINEES, SCORES):
        for folder in subfolders(output / kind):
            store.adopt(kind, folder)
    settled = read_settled(workspace)
    adopt_cache(workspace)
    return Subject.of(workspace, settled.config, context.params.distill, settled.seed)


def plan_distill(
    context: StageContext,
    subject: Subject,
    todo: list[TraineeSpec],
    profile: Profile,
    num_workers: int,
) -> DistillPlan:
    """Jobs for what is left, from measured costs and from what the cache holds.

    Raises:
        ArtifactError: the cache lacks a view that an epoch shows.
    """
    settled, store = read_settled(context.workspace), context.workspace.store
    _check_cache(settled, subject, store)
    trained = {trainee.name for trainee in todo} - {t.name for t in subject.untrained(store)}
    plan = plan_of(
        subject,
        profile,
        num_workers,
        source="auto" if settled.source == "mixed" else settled.source,
        todo=todo,
        trained=trained,
        held=settled.sides,
        disk_bytes=0,
    )
    if plan.too_large:
        _log.warning("too large for the memory that is free: %s", ", ".join(plan.too_large))
    by_name = {trainee.name: trainee for trainee in todo}
    specs = [_job_spec(context, subject, settled, job, by_name) for job in plan.jobs]
    score_s = teacher_score_s(profile, subject.distill, subject.num_images["val"])
    return DistillPlan(tuple(subject.trainees), tuple(specs), plan, score_s)


def _check_cache(settled: Settled, subject: Subject, store: Store) -> None:
    for side in settled.sides:
        if not subject.holds(store, side, settled.cuts):
            raise ArtifactError(
                f"the cache of activations lacks the {side[1]} of block {side[0]} in one of the "
                f"{subject.cached.views} views of {subject.distill.epochs} epochs; run: pbkd "
                "activations"
            )


def read_trainee(store: Store, trainee: TraineeSpec) -> Distilled:
    """A finished trainee's result and damage."""
    result = read_json(store.path(TRAINEES, trainee.key) / RESULT)
    damage = read_json(store.path(SCORES, trainee.score_key) / SCORE)
    return Distilled(
        key=trainee.key,
        result=TraineeResult.model_validate(result),
        damage=Damage.model_validate(damage),
    )


def finish_distill(context: StageContext, plan: DistillPlan, reports: list[JobReport]) -> None:
    """Write ``artifacts/distill/``: exactly the items of the present parameters, by hard links."""
    store = context.workspace.store
    for trainee in plan.trainees:
        store.verify(TRAINEES, trainee.key)
        store.verify(SCORES, trainee.score_key)
    # those left are of trainees that were given up
    shutil.rmtree(_checkpoints(context.workspace), ignore_errors=True)
    with atomic_dir(context.workspace.artifacts("distill")) as folder:
        for trainee in plan.trainees:
            for kind, key in ((TRAINEES, trainee.key), (SCORES, trainee.score_key)):
                (folder / kind).mkdir(exist_ok=True)
                link_tree(store.path(kind, key), folder / kind / key)
        distilled = [read_trainee(store, trainee) for trainee in plan.trainees]
        write_json(folder / "distill.json", [item.model_dump(mode="json") for item in distilled])
    if duration_s := sum(report.duration_s for report in reports):
        score_s = sum(report.score_s for report in reports)
        _log.info("scores took %.1f s, %.0f %%", score_s, 100 * score_s / duration_s)
    trained = [name for report in reports for name in report.trained]
    reused = len(plan.trainees) - len(trained)
    _log.info("trained %s; %d taken from the store", ", ".join(trained) or "nothing", reused)


def read_distilled(workspace: Workspace) -> list[Distilled]:
    """What the stage wrote."""
    entries = read_json(workspace.artifacts("distill") / "distill.json")
    return [Distilled.model_validate(entry) for entry in entries]


def _job_spec(
    context: StageContext,
    subject: Subject,
    settled: Settled,
    job: PlannedJob,
    trainees: dict[str, TraineeSpec],
) -> JobSpec:
    workspace = context.workspace
    return JobSpec(
        job_id=job.job_id,
        trainees=tuple(trainees[name] for name in job.trainees),
        source=job.source,
        start=job.start,
        cuts=settled.cuts,
        activations=settled.config,
        distill=subject.distill,
        seed=settled.seed,
        teacher=workspace.artifacts("teacher"),
        prepared=workspace.prepared,
        store=workspace.store.root,
        progress=workspace.state / "progress",
        checkpoints=_checkpoints(workspace),
    )


def _checkpoints(workspace: Workspace) -> Path:
    return workspace.checkpoint("distill", "trainees").parent
