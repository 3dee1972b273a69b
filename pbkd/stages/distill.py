"""Stage `distill`: train every candidate of every block, and score its damage.

The work in the middle is the jobs'; what maps them onto workers is the caller's. This file says
what there is to do (``plan_distill``) and puts together what was done (``finish_distill``).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict

from pbkd.activations.cache import KIND as ACTIVATIONS
from pbkd.artifacts import Store, Workspace, atomic_dir, link_tree, read_json, write_json
from pbkd.blocks import Discovery, candidate_name
from pbkd.distill import (
    SCORES,
    TRAINEES,
    Damage,
    JobReport,
    JobSpec,
    TraineeResult,
    TraineeSpec,
    make_trainees,
    run_job,
)
from pbkd.distill.score import SCORE
from pbkd.distill.trainee import RESULT
from pbkd.models import read_card
from pbkd.plan import Job, group_trainees, trainee_cost
from pbkd.stages.activations import Settled, read_settled
from pbkd.stages.blocks import read_blocks
from pbkd.stages.context import StageContext

_log = logging.getLogger(__name__)


class Distilled(BaseModel):
    """One trained candidate, as ``distill.json`` lists it."""

    model_config = ConfigDict(frozen=True)

    key: str
    result: TraineeResult
    damage: Damage


@dataclass(frozen=True)
class DistillPlan:
    """All trainees of the present parameters, and jobs for those that the store does not hold."""

    trainees: tuple[TraineeSpec, ...]
    jobs: tuple[JobSpec, ...]
    costs: dict[str, float]

    @property
    def blocks(self) -> list[str]:
        """Block paths in the order of the network."""
        return list(dict.fromkeys(trainee.block for trainee in self.trainees))

    def of_block(self, block: str) -> list[TraineeSpec]:
        """The trainees of one block."""
        return [trainee for trainee in self.trainees if trainee.block == block]


def run(context: StageContext) -> None:
    """Everything in this process, one job after the other, without an orchestrator."""
    plan = plan_distill(context, num_workers=1)
    reports = [run_job(job) for job in plan.jobs]
    finish_distill(context, plan, reports)


def plan_distill(context: StageContext, num_workers: int) -> DistillPlan:
    """Import what the old output holds, then list what is left to do.

    Raises:
        ArtifactError: an earlier stage has not run.
    """
    workspace, store = context.workspace, context.workspace.store
    output = workspace.artifacts("distill")
    for kind in (TRAINEES, SCORES):
        for folder in (output / kind).iterdir() if (output / kind).is_dir() else ():
            store.adopt(kind, folder)
    discovery, settled = read_blocks(workspace), read_settled(workspace)
    for folder in workspace.artifacts("activations").glob("*/*"):  # the store may be new
        store.adopt(ACTIVATIONS, folder)
    card = read_card(workspace.artifacts("teacher"))
    trainees = make_trainees(discovery, card, context.params.distill, settled.config, settled.seed)
    costs = _costs(context, discovery, settled, trainees)
    todo = {t.name: t for t in trainees if not is_done(store, t)}
    jobs = group_trainees(
        {name: costs[name] for name in todo},
        {name: trainee.block for name, trainee in todo.items()},
        settled.source,
        num_workers,
    )
    specs = [_job_spec(context, settled, job, todo) for job in jobs]
    return DistillPlan(tuple(trainees), tuple(specs), costs)


def preview_jobs(context: StageContext, num_workers: int) -> list[Job]:
    """The jobs of a run that finds an empty store; needs `activations` to have run."""
    workspace = context.workspace
    discovery, settled = read_blocks(workspace), read_settled(workspace)
    card = read_card(workspace.artifacts("teacher"))
    trainees = make_trainees(discovery, card, context.params.distill, settled.config, settled.seed)
    costs = _costs(context, discovery, settled, trainees)
    return group_trainees(costs, {t.name: t.block for t in trainees}, settled.source, num_workers)


def is_done(store: Store, trainee: TraineeSpec) -> bool:
    """Whether the store holds a trainee's weights and score."""
    return store.has(TRAINEES, trainee.key) and store.has(SCORES, trainee.score_key)


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
    with atomic_dir(context.workspace.artifacts("distill")) as folder:
        for trainee in plan.trainees:
            for kind, key in ((TRAINEES, trainee.key), (SCORES, trainee.score_key)):
                (folder / kind).mkdir(exist_ok=True)
                link_tree(store.path(kind, key), folder / kind / key)
        distilled = [read_trainee(store, trainee) for trainee in plan.trainees]
        write_json(folder / "distill.json", [item.model_dump(mode="json") for item in distilled])
    trained = [name for report in reports for name in report.trained]
    reused = len(plan.trainees) - len(trained)
    _log.info("trained %s; %d taken from the store", ", ".join(trained) or "nothing", reused)


def read_distilled(workspace: Workspace) -> list[Distilled]:
    """What the stage wrote."""
    entries = read_json(workspace.artifacts("distill") / "distill.json")
    return [Distilled.model_validate(entry) for entry in entries]


def _costs(
    context: StageContext, discovery: Discovery, settled: Settled, trainees: list[TraineeSpec]
) -> dict[str, float]:
    """Predicted cost by trainee; with a relay the teacher's pass up to the block counts, too."""
    num_images = read_json(context.workspace.prepared / "meta.json")["num_images"]["train"]
    facts = {(b.path, c.name): c for b in discovery.blocks for c in b.candidates}
    prefix, reached = {}, 0
    for block in discovery.blocks:
        reached += block.macs
        prefix[block.path] = reached if settled.source == "relay" else 0
    return {
        t.name: trainee_cost(
            facts[t.block, candidate_name(t.config)].macs,
            prefix[t.block],
            num_images,
            context.params.distill.epochs,
        )
        for t in trainees
    }


def _job_spec(
    context: StageContext, settled: Settled, job: Job, trainees: dict[str, TraineeSpec]
) -> JobSpec:
    workspace = context.workspace
    return JobSpec(
        job_id=job.job_id,
        trainees=tuple(trainees[name] for name in job.trainees),
        source=settled.source,
        activations=settled.config,
        distill=context.params.distill,
        seed=settled.seed,
        teacher=workspace.artifacts("teacher"),
        prepared=workspace.prepared,
        store=workspace.store.root,
        progress=workspace.state / "progress",
    )
