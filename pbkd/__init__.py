"""pbkd compresses a trained CNN by parallel blockwise knowledge distillation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pbkd._version import __version__

if TYPE_CHECKING:
    from pbkd.api import compress

__all__ = ["__version__", "compress"]


def __getattr__(name: str) -> Any:
    """``pbkd.compress`` imports torch, which takes seconds: only where it is used."""
    if name == "compress":
        from pbkd.api import compress

        return compress
    raise AttributeError(f"module 'pbkd' has no attribute {name!r}")
