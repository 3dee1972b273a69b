"""pbkd compresses a trained CNN by parallel blockwise knowledge distillation."""

from pbkd._version import __version__

__all__ = ["__version__"]
