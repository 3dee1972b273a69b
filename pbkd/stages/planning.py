"""What `activations` and `distill` share: the block phase's costs on this machine, and its plan."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from pydantic import ValidationError

from pbkd.activations import Side, SideKeys, as_shown, cache_keys
from pbkd.activations.shards import KIND
from pbkd.artifacts import Store, Workspace, read_json, write_json
from pbkd.blocks import Discovery
from pbkd.config import ActivationsConfig, AugmentConfig, DistillConfig
from pbkd.devices import best_device
from pbkd.distill import (
    SCORES,
    TRAINEES,
    Profile,
    ProfileJob,
    TraineeSpec,
    make_trainees,
    run_profile,
)
from pbkd.distill.costs import block_costs, teacher_score_s, trainee_costs
from pbkd.distill.score import with_score_images
from pbkd.errors import ArtifactError
from pbkd.models import ModelCard
from pbkd.plan import Limits, Plan, on_more_workers, plan_block_phase
from pbkd.stages.blocks import read_blocks
from pbkd.stages.teacher import read_teacher_card

_log = logging.getLogger(__name__)

Source = Literal["auto", "cache", "relay"]
_RISK = 0.15
"""How far a job's time is off its predicted cost on a machine that others use, too."""


@dataclass(frozen=True)
class Subject:
    """What is planned: trainees of a teacher's blocks, and the images that they see.

    Attributes:
        distill: with as many images for the score as are used.
    """

    discovery: Discovery
    card: ModelCard
    trainees: list[TraineeSpec]
    activations: ActivationsConfig
    distill: DistillConfig
    seed: int
    num_images: dict[str, int]

    @classmethod
    def of(
        cls,
        workspace: Workspace,
        activations: ActivationsConfig,
        distill: DistillConfig,
        seed: int,
    ) -> Subject:
        """Read the outputs of `prepare`, `teacher` and `blocks`.

        Args:
            activations, seed: of the stream; as `activations` settled them, once it has run.

        Raises:
            ArtifactError: one of them has not run, or they do not belong together.
        """
        card, prepared = read_teacher_card(workspace)
        discovery = read_blocks(workspace)
        num_images = prepared.meta.num_images
        distill = with_score_images(distill, num_images["train"], num_images["val"])
        return cls(
            discovery=discovery,
            card=card,
            trainees=make_trainees(discovery, card, distill, activations, seed),
            activations=activations,
            distill=distill,
            seed=seed,
            num_images=num_images,
        )

    def keys(self, sides: Sequence[tuple[str, Side]], cuts: dict[str, str]) -> SideKeys:
        """Keys of cached sides; a cut's is that of the module from which the teacher goes on."""
        return cache_keys(self.card, self.cached, self.seed, sides, cuts)

    @property
    def cached(self) -> ActivationsConfig:
        """The settings of a cache: no more views than the epochs show."""
        return as_shown(self.activations, self.distill.epochs)

    @property
    def num_stored(self) -> int:
        """Images that a cache holds, in all views; without augmentation these are one."""
        augments = self.card.augment != AugmentConfig()
        num_views = self.cached.views if augments else 1
        return num_views * self.num_images["train"] + self.num_images["val"]

    def untrained(self, store: Store) -> list[TraineeSpec]:
        """The trainees whose weights the store does not hold; others may lack a score."""
        return [trainee for trainee in self.trainees if not store.has(TRAINEES, trainee.key)]

    def left_to_do(self, store: Store) -> list[TraineeSpec]:
        """The trainees whose weights or score the store does not hold."""
        return [trainee for trainee in self.trainees if not is_done(store, trainee)]

    def held(self, store: Store, cuts: dict[str, str]) -> list[tuple[str, Side]]:
        """The sides that the store holds in every view."""
        sides: list[tuple[str, Side]] = [
            (block.path, side)
            for block in self.discovery.blocks
            for side in ("input", "output", "cut")
            if side != "cut" or block.path in cuts
        ]
        return [side for side in sides if self.holds(store, side, cuts)]

    def holds(self, store: Store, side: tuple[str, Side], cuts: dict[str, str]) -> bool:
        """Whether the store holds one side in every view."""
        return all(store.has(KIND, key) for key in self.keys([side], cuts).values())


def is_done(store: Store, trainee: TraineeSpec) -> bool:
    """Whether the store holds a trainee's weights and score."""
    return store.has(TRAINEES, trainee.key) and store.has(SCORES, trainee.score_key)


def profile_job(workspace: Workspace, subject: Subject, workers: Sequence[str]) -> ProfileJob:
    """What each of the workers is to measure, all at the same time."""
    return ProfileJob(
        trainees=tuple(subject.trainees),
        distill=subject.distill,
        dtype=subject.activations.dtype,
        teacher=workspace.artifacts("teacher"),
        prepared=workspace.prepared,
        workers=tuple(workers),
        folder=workspace.store.root,
        meeting=workspace.state / "profiles" / f"meeting-{os.getpid()}",
    )


def profiled(
    workspace: Workspace, job: ProfileJob, measure: Callable[[ProfileJob], Profile]
) -> Profile:
    """The profile that this machine keeps, or a new one."""
    path = _profile_path(workspace, job)
    with suppress(ArtifactError, ValidationError):  # not there, or of another version
        return Profile.model_validate(read_json(path))
    profile = measure(job)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, profile)
    _log.info(
        "measured the costs of %d candidates in %.1f s", len(job.trainees), profile.duration_s
    )
    return profile


def profiled_here(workspace: Workspace, subject: Subject) -> Profile:
    """The profile of this process as the only worker: kept, or measured now."""
    worker = f"{best_device()} {torch.get_num_threads()} in one process"
    return profiled(workspace, profile_job(workspace, subject, [worker]), profile_here)


def profile_here(job: ProfileJob) -> Profile:
    """Measure in this process, as the only worker."""
    return run_profile(job, 0)


def forget_profiles(workspace: Workspace) -> None:
    """Let the next plan measure anew."""
    shutil.rmtree(workspace.state / "profiles", ignore_errors=True)


def plan_of(
    subject: Subject,
    profile: Profile,
    num_workers: int,
    *,
    source: Source = "auto",
    todo: Sequence[TraineeSpec] | None = None,
    trained: Collection[str] = (),
    held: Sequence[tuple[str, Side]] = (),
    disk_bytes: float = float("inf"),
) -> Plan:
    """The best plan for so many workers like the one that was measured.

    Args:
        todo: the trainees that are left to train or to score; None: all.
        trained: names of those that are left to score only.
        held: what the cache holds; it costs nothing to fill.
        disk_bytes: that the cache may take beside that.
    """
    specs = subject.trainees if todo is None else list(todo)
    step_bytes = max((cost.step_bytes for cost in profile.trainees.values()), default=0)
    memory_bytes = max(0, profile.memory_bytes - step_bytes)
    limits = Limits(disk_bytes, memory_bytes, profile.setup_s, _RISK)
    blocks = block_costs(
        subject.discovery.blocks,
        profile,
        subject.activations,
        subject.distill,
        subject.num_images,
        subject.num_stored,
        held,
    )
    trainees = trainee_costs(specs, profile, subject.distill, subject.num_images, trained)
    speeds = _speeds(profile, num_workers)
    return plan_block_phase(blocks, trainees, speeds, limits, source)


def plans_of(
    subject: Subject, profile: Profile, numbers: Iterable[int], source: Source, disk_bytes: float
) -> dict[int, Plan]:
    """Plans from nothing for several numbers of workers, ascending; more are never slower.

    The teacher's own pass over the images of the score is in their times.
    """
    plans: dict[int, Plan] = {}
    for number in sorted(set(numbers)):
        plan = plan_of(subject, profile, number, source=source, disk_bytes=disk_bytes)
        for fewer in plans.values():
            if fewer.wall_s < plan.wall_s:
                again = on_more_workers(fewer, _speeds(profile, number))
                plan = min(plan, again, key=lambda one: one.wall_s)
        plans[number] = plan
    score_s = teacher_score_s(profile, subject.distill, subject.num_images["val"])
    return {number: _longer(plan, score_s) for number, plan in plans.items()}


def _longer(plan: Plan, teacher_s: float) -> Plan:
    """With so many seconds more of the teacher's, which no other worker can take over."""
    if not plan.jobs:
        return plan
    return replace(
        plan,
        wall_s=plan.wall_s + teacher_s,
        work_s=plan.work_s + teacher_s,
        bound_s=plan.bound_s + teacher_s,
        work=replace(plan.work, teacher_s=plan.work.teacher_s + teacher_s),
    )


def _speeds(profile: Profile, num_workers: int) -> tuple[float, ...]:
    """Those measured, where so many were; others are taken to be like the mean."""
    return profile.speeds if num_workers == profile.num_workers else (1.0,) * num_workers


def _profile_path(workspace: Workspace, job: ProfileJob) -> Path:
    return workspace.state / "profiles" / f"{job.key}.json"
