"""Block inputs and outputs as the teacher computes them: read from disk, or relayed."""

from pbkd.activations.cache import CacheSource, cache_bytes, cache_key, cache_keys, fill_cache
from pbkd.activations.capture import Activation, Capture
from pbkd.activations.relay import RelaySource
from pbkd.activations.source import Source

__all__ = [
    "Activation",
    "CacheSource",
    "Capture",
    "RelaySource",
    "Source",
    "cache_bytes",
    "cache_key",
    "cache_keys",
    "fill_cache",
]
