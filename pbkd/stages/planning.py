"""What `activations` and `distill` share: the block phase's costs on this machine, and its plan."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pbkd.activations import Side, SideKeys, cache_keys
from pbkd.activations.cache import KIND
from pbkd.artifacts import Store, Workspace, read_json, write_json
from pbkd.blocks import Discovery
from pbkd.config import ActivationsConfig, AugmentConfig, DistillConfig
from pbkd.distill import Profile, ProfileJob, TraineeSpec, make_trainees, run_profile
from pbkd.distill.costs import block_costs, trainee_costs
from pbkd.models import ModelCard, read_card
from pbkd.plan import Limits, Plan, on_more_workers, plan_block_phase
from pbkd.stages.blocks import read_blocks

_log = logging.getLogger(__name__)

Source = Literal["auto", "cache", "relay"]


@dataclass(frozen=True)
class Subject:
    """What is planned: trainees of a teacher's blocks, and the images that they see."""

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
            ArtifactError: one of them has not run.
        """
        discovery, card = read_blocks(workspace), read_card(workspace.artifacts("teacher"))
        return cls(
            discovery=discovery,
            card=card,
            trainees=make_trainees(discovery, card, distill, activations, seed),
            activations=activations,
            distill=distill,
            seed=seed,
            num_images=read_json(workspace.prepared / "meta.json")["num_images"],
        )

    def keys(self, sides: Sequence[tuple[str, Side]], cuts: dict[str, str]) -> SideKeys:
        """Keys of cached sides; a cut's is that of the module from which the teacher goes on."""
        return cache_keys(self.card, self.activations, self.seed, sides, cuts)

    def held(self, store: Store, cuts: dict[str, str]) -> list[tuple[str, Side]]:
        """The sides that the store holds in every view."""
        sides: list[tuple[str, Side]] = [
            (block.path, side)
            for block in self.discovery.blocks
            for side in ("input", "output", "cut")
            if side != "cut" or block.path in cuts
        ]
        return [
            side
            for side in sides
            if all(store.has(KIND, key) for key in self.keys([side], cuts).values())
        ]


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
    if path.is_file():
        return Profile.model_validate(read_json(path))
    profile = measure(job)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, profile)
    _log.info(
        "measured the costs of %d candidates in %.1f s", len(job.trainees), profile.duration_s
    )
    return profile


def profile_here(job: ProfileJob) -> Profile:
    """Measure in this process, as the only worker."""
    return run_profile(job, 0)


def plan_of(
    subject: Subject,
    profile: Profile,
    num_workers: int,
    *,
    source: Source = "auto",
    todo: Sequence[TraineeSpec] | None = None,
    held: Sequence[tuple[str, Side]] = (),
    disk_bytes: float = float("inf"),
) -> Plan:
    """The best plan for so many workers like the one that was measured.

    Args:
        todo: the trainees that are left to train; None: all.
        held: what the cache holds; it costs nothing to fill.
        disk_bytes: that the cache may take beside that.
    """
    specs = subject.trainees if todo is None else list(todo)
    limits = Limits(disk_bytes, profile.memory_bytes, profile.setup_s)
    augments = subject.card.augment != AugmentConfig()
    blocks = block_costs(
        subject.discovery.blocks,
        profile,
        subject.activations,
        subject.distill,
        subject.num_images,
        subject.activations.views if augments else 1,
        held,
    )
    trainees = trainee_costs(specs, profile, subject.distill, subject.num_images)
    speeds = _speeds(profile, num_workers)
    return plan_block_phase(blocks, trainees, speeds, limits, source)


def plans_of(
    subject: Subject, profile: Profile, numbers: Iterable[int], source: Source, disk_bytes: float
) -> dict[int, Plan]:
    """Plans from nothing for several numbers of workers, ascending; more are never slower."""
    plans: dict[int, Plan] = {}
    for number in sorted(set(numbers)):
        plan = plan_of(subject, profile, number, source=source, disk_bytes=disk_bytes)
        for fewer in plans.values():
            if fewer.wall_s < plan.wall_s:
                again = on_more_workers(fewer, _speeds(profile, number))
                plan = min(plan, again, key=lambda one: one.wall_s)
        plans[number] = plan
    return plans


def _speeds(profile: Profile, num_workers: int) -> tuple[float, ...]:
    """Those measured, where so many were; others are taken to be like the mean."""
    return profile.speeds if num_workers == profile.num_workers else (1.0,) * num_workers


def _profile_path(workspace: Workspace, job: ProfileJob) -> Path:
    return workspace.state / "profiles" / f"{job.key}.json"
