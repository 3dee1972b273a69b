"""From measured times per image to what the planner needs: seconds and bytes of the block phase."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import get_args

from pbkd.activations import Side, side_bytes
from pbkd.blocks import BlockFacts
from pbkd.config import ActivationsConfig, DistillConfig
from pbkd.distill.profile import Profile
from pbkd.distill.trainee import TraineeSpec
from pbkd.plan import BlockCost, TraineeCost

_DRY_PASSES = 3
"""Of a relay, before it trains: two that look for what is overwritten, one for the first inputs."""


def block_costs(
    blocks: Iterable[BlockFacts],
    profile: Profile,
    activations: ActivationsConfig,
    distill: DistillConfig,
    num_images: dict[str, int],
    num_stored: int,
    held: Collection[tuple[str, Side]] = (),
) -> list[BlockCost]:
    """Costs of the blocks that the profile knows, in the order of the network.

    Args:
        num_images: of the splits "train" and "val".
        num_stored: images that a cache holds, in all views.
        held: (block, side) that a cache holds already.
    """
    num_train, num_val = num_images["train"], num_images["val"]
    passes = distill.epochs * num_train + (distill.epochs + 1) * num_val
    relayed = passes + _DRY_PASSES * min(distill.batch_size, num_val)
    scored = min(distill.score_images, num_val)
    used = min(num_stored, distill.epochs * num_train + num_val)
    # what fits lives on a GPU and is read once
    reads = used if profile.device.startswith("cuda") else passes
    disk = profile.disk

    def cost(block: BlockFacts) -> BlockCost:
        sizes = {side: side_bytes(block, side, activations, 1) for side in get_args(Side)}
        read = {s: size * (reads / disk.read + used / disk.verify) for s, size in sizes.items()}
        write = {side: size * num_stored / disk.write for side, size in sizes.items()}
        return BlockCost(
            path=block.path,
            teacher_s=profile.teacher_s[block.path] * relayed,
            fill_teacher_s=profile.teacher_s[block.path] * profile.capture_gain * num_stored,
            before_score_s=profile.suffixes[block.path].before_s * scored,
            read_input_s=read["input"],
            read_output_s=read["output"],
            read_cut_s=read["cut"],
            write_input_s=write["input"],
            write_output_s=write["output"],
            write_cut_s=write["cut"],
            input_bytes=sizes["input"] * num_stored,
            output_bytes=sizes["output"] * num_stored,
            cut_bytes=sizes["cut"] * num_stored,
            is_cut=block.path in profile.cuts,
            has_input=(block.path, "input") in held,
            has_output=(block.path, "output") in held,
            has_cut=(block.path, "cut") in held,
        )

    return [cost(block) for block in blocks if block.path in profile.teacher_s]


def trainee_costs(
    trainees: Iterable[TraineeSpec],
    profile: Profile,
    distill: DistillConfig,
    num_images: dict[str, int],
    trained: Collection[str] = (),
) -> list[TraineeCost]:
    """Costs of trainees: steps and validations of all epochs, and the score.

    One whose step does not fit into memory costs what its validations say, and more memory than
    there is, so that the planner trains it alone and names it. One that is ``trained`` is scored.
    """
    num_train, num_val = num_images["train"], num_images["val"]
    num_steps = max(1, num_train // distill.batch_size)
    stepped = distill.epochs * num_steps * min(distill.batch_size, num_train)
    validated = (distill.epochs + 1) * num_val
    scored = min(distill.score_images, num_val)

    def cost(spec: TraineeSpec) -> TraineeCost:
        measured = profile.trainees[spec.name]
        fits = measured.step_s is not None
        step_s = measured.step_s if measured.step_s is not None else 3 * measured.eval_s
        score_s = profile.suffixes[spec.block].suffix_s + measured.eval_s
        training_s = measured.fixed_s + stepped * step_s + validated * measured.eval_s
        return TraineeCost(
            name=spec.name,
            block=spec.block,
            own_s=scored * score_s + (0 if spec.name in trained else training_s),
            memory_bytes=measured.held_bytes if fits else int(profile.memory_bytes) + 1,
        )

    return [cost(spec) for spec in trainees]


def teacher_score_s(profile: Profile, distill: DistillConfig, num_val: int) -> float:
    """The teacher's own pass over the images of the score: once per run, for all trainees."""
    return profile.whole_teacher_s * min(distill.score_images, num_val)
