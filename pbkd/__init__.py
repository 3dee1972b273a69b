"""pbkd compresses a trained CNN by parallel blockwise knowledge distillation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pbkd._version import __version__

if TYPE_CHECKING:
    from pbkd.api import compress
    from pbkd.loading import load

__all__ = ["__version__", "compress", "load"]


def __getattr__(name: str) -> Any:
    """Both import torch, which takes seconds: only where they are used."""
    if name == "compress":
        from pbkd.api import compress

        return compress
    if name == "load":
        from pbkd.loading import load

        return load
    raise AttributeError(f"module 'pbkd' has no attribute {name!r}")
