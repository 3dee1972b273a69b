"""Choose, per block, a trained candidate or the teacher's own module."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from pbkd.blocks import BlockFacts, CandidateFacts, candidate_name
from pbkd.config import CandidateConfig
from pbkd.distill import Damage


class Choice(BaseModel):
    """What was chosen for a block, and why; ``config`` is null where the teacher's module stays."""

    model_config = ConfigDict(frozen=True)

    block: str
    candidate: str | None
    config: CandidateConfig | None
    damage_kl: float | None
    reason: str


def choose(
    blocks: tuple[BlockFacts, ...], damages: dict[tuple[str, str], Damage], max_damage: float
) -> list[Choice]:
    """The candidate with the fewest MACs whose damage is at most ``max_damage``, block by block.

    Args:
        damages: (block path, candidate name) to its damage.
        max_damage: mean KL divergence, nats.
    """
    return [_choose_for(block, damages, max_damage) for block in blocks]


def _choose_for(
    block: BlockFacts, damages: dict[tuple[str, str], Damage], max_damage: float
) -> Choice:
    known = [(facts, damages[block.path, facts.name].kl) for facts in block.candidates]
    allowed = [(facts, kl) for facts, kl in known if kl is not None and kl <= max_damage]
    if not allowed:
        finite = [kl for _, kl in known if kl is not None]
        least = min(finite, default=None)
        text = "not finite" if least is None else f"{least:.3g}"
        reason = f"damage {text} is over stitch.max_damage {max_damage:g}"
        return Choice(block=block.path, candidate=None, config=None, damage_kl=least, reason=reason)

    def cost(entry: tuple[CandidateFacts, float]) -> tuple[int, int, float]:
        facts, kl = entry
        return facts.macs, facts.num_parameters, kl

    facts, kl = min(allowed, key=cost)
    return Choice(
        block=block.path,
        candidate=candidate_name(facts.config),
        config=facts.config,
        damage_kl=kl,
        reason="fewest MACs within the allowed damage",
    )
