"""What can be replaced, by what, and from which weights."""

from pbkd.blocks.candidates import (
    build_candidate,
    candidate_name,
    init_candidate,
    settle_candidate,
)
from pbkd.blocks.discover import (
    BlockFacts,
    CandidateFacts,
    Discovery,
    Rejected,
    find_blocks,
    parameter_uses,
)
from pbkd.blocks.swap import swap, swapped

__all__ = [
    "BlockFacts",
    "CandidateFacts",
    "Discovery",
    "Rejected",
    "build_candidate",
    "candidate_name",
    "find_blocks",
    "init_candidate",
    "parameter_uses",
    "settle_candidate",
    "swap",
    "swapped",
]
