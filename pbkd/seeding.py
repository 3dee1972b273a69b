"""Seeds as pure functions of names, so that no result depends on who drew first."""

from __future__ import annotations

import hashlib

import torch


def derive_seed(seed: int, *names: str | int) -> int:
    """A 63-bit seed from a base seed and names, as in ``derive_seed(0, "order", epoch)``."""
    text = "/".join([str(seed), *map(str, names)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def make_generator(seed: int, *names: str | int) -> torch.Generator:
    """A CPU generator at ``derive_seed(seed, *names)``; the same draws on every machine."""
    return torch.Generator().manual_seed(derive_seed(seed, *names))
