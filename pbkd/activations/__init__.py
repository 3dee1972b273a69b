"""Block inputs and outputs as the teacher computes them: read from disk, or relayed."""

from pbkd.activations.cache import (
    Side,
    SideKeys,
    as_shown,
    both_sides,
    cache_key,
    cache_keys,
    fill_cache,
    finish_fill,
    side_bytes,
)
from pbkd.activations.capture import Activation, Capture
from pbkd.activations.fill import FillJob, run_fill
from pbkd.activations.reader import CacheSource
from pbkd.activations.relay import RelaySource, ResumedSource
from pbkd.activations.resume import Resume, find_cuts
from pbkd.activations.source import Source, activation_stream
from pbkd.activations.suffix import Suffixes

__all__ = [
    "Activation",
    "CacheSource",
    "Capture",
    "FillJob",
    "RelaySource",
    "Resume",
    "ResumedSource",
    "Side",
    "SideKeys",
    "Source",
    "Suffixes",
    "activation_stream",
    "as_shown",
    "both_sides",
    "cache_key",
    "cache_keys",
    "fill_cache",
    "find_cuts",
    "finish_fill",
    "run_fill",
    "side_bytes",
]
