"""Put modules into a network by path, and take them out again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import nn


def swap(net: nn.Module, replacements: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Replace the modules at the given paths, in place; returns what stood there."""
    originals = {path: net.get_submodule(path) for path in replacements}
    for path, module in replacements.items():
        # only where they differ: train() would also reset parts that are frozen in evaluation mode
        if module.training != originals[path].training:
            module.train(originals[path].training)
        net.set_submodule(path, module)
    return originals


@contextmanager
def swapped(net: nn.Module, replacements: Mapping[str, nn.Module]) -> Iterator[None]:
    """As ``swap``, undone at the end of the block."""
    originals = swap(net, replacements)
    try:
        yield
    finally:
        swap(net, originals)
