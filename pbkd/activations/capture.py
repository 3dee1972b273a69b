"""One pass of the teacher that hands out the inputs and outputs of chosen blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pbkd.devices import in_channels_last
from pbkd.errors import BlockError


@dataclass(frozen=True)
class Activation:
    """A block's input and output for the same images, (B, ...) each."""

    input: Tensor
    output: Tensor

    def first(self, num: int) -> Activation:
        """Of the first ``num`` images."""
        return Activation(self.input[:num], self.output[:num])


def filled_up(x: Tensor, fill_to: int) -> Tensor:
    """A batch smaller than ``fill_to``, filled up to it with its first row; others as they are."""
    if len(x) >= fill_to:
        return x
    rows = torch.arange(fill_to, device=x.device)
    return x[rows.where(rows < len(x), 0)]  # unlike cat, keeps the layout


class PassIsOver(Exception):  # noqa: N818
    """Ends the teacher's pass once all that was wanted has run."""


_Name = tuple[str, str]
"""Block path, and "input" or "output"."""


@dataclass
class _Held:
    """Tensors of one pass with their versions at the hook."""

    tensors: dict[_Name, Tensor] = field(default_factory=dict)
    versions: dict[_Name, int] = field(default_factory=dict)


class Capture:
    """Runs a network and keeps the activations of some blocks.

    A dry pass compares each captured tensor's version at the hook and after the pass; what a later
    in-place operation overwrites (by an in-place ReLU, say) is copied in the hook from then on.

    Args:
        model: the teacher; blocks are named below ``model.net``.
        paths: the blocks.
        images_nchw: some images for the dry pass.
        dtype: what is handed out; both sources round to it.

    Raises:
        BlockError: an activation does not fit the dtype.
    """

    def __init__(
        self, model: nn.Module, paths: Iterable[str], images_nchw: Tensor, dtype: torch.dtype
    ) -> None:
        self.model = model.eval()
        self.net = model.get_submodule("net")
        self.paths = tuple(paths)
        self.dtype = dtype
        self.overwritten: set[_Name] = set()
        held = self._pass(images_nchw, self.paths, lambda _, tensor: tensor)
        self.overwritten = {
            name for name, tensor in held.tensors.items() if tensor._version != held.versions[name]
        }
        exact = self._pass(images_nchw, self.paths, lambda _, tensor: tensor.clone())
        for (path, side), tensor in exact.tensors.items():
            if not torch.isfinite(tensor.to(dtype)).all():
                raise BlockError(
                    f"block {path}: its {side} reaches {float(tensor.abs().max()):.3g}, which "
                    f"{dtype} does not hold; set `activations.dtype: bfloat16` or `float32`"
                )

    def __call__(
        self, images_nchw: Tensor, paths: Iterable[str] | None = None, *, fill_to: int = 0
    ) -> dict[str, Activation]:
        """Activations of the given blocks (default: all) for (B, C, H, W) images in [0, 1].

        Args:
            fill_to: a smaller batch is filled up to this with its first image, so that it runs the
                same kernels as a full one; the filling is not handed out.
        """
        wanted = self.paths if paths is None else tuple(paths)
        found = self.run(filled_up(images_nchw, fill_to), wanted)
        return {path: activation.first(len(images_nchw)) for path, activation in found.items()}

    def run(self, images_nchw: Tensor, paths: tuple[str, ...]) -> dict[str, Activation]:
        """One pass; whoever feeds modules by hooks of their own gets batches of another size."""
        # rounded in the hook, while the tensor is in the processor's caches
        rounded = self._pass(images_nchw, paths, self._rounded).tensors
        return {path: Activation(rounded[path, "input"], rounded[path, "output"]) for path in paths}

    def _rounded(self, name: _Name, tensor: Tensor) -> Tensor:
        if tensor.dim() == 4:  # in the layout in which a cache gives it back: sums depend on it
            return in_channels_last(tensor, self.dtype)
        rounded = tensor.to(self.dtype)
        # of its own type it is the tensor itself, which a later operation may overwrite
        return rounded.clone() if rounded is tensor and name in self.overwritten else rounded

    def _pass(
        self,
        images_nchw: Tensor,
        paths: tuple[str, ...],
        taken: Callable[[_Name, Tensor], Tensor],
    ) -> _Held:
        held = _Held()
        # inference_mode tensors have no version counter
        with torch.no_grad(), self._hooks(paths, held, taken), suppress(PassIsOver):
            self.model(images_nchw)
        return held

    @contextmanager
    def _hooks(
        self, paths: tuple[str, ...], held: _Held, taken: Callable[[_Name, Tensor], Tensor]
    ) -> Iterator[None]:
        pending = set(paths)

        def keep(name: _Name, tensor: Tensor) -> None:
            held.tensors[name] = taken(name, tensor)
            held.versions[name] = tensor._version

        def after(path: str, output: Tensor) -> None:
            keep((path, "output"), output)
            pending.discard(path)
            if not pending:
                raise PassIsOver

        handles = []
        for path in paths:
            module = self.net.get_submodule(path)

            def before_hook(_: nn.Module, args: tuple[Any, ...], path: str = path) -> None:
                keep((path, "input"), args[0])

            def after_hook(_: nn.Module, args: Any, out: Tensor, path: str = path) -> None:
                after(path, out)

            handles.append(module.register_forward_pre_hook(before_hook))
            handles.append(module.register_forward_hook(after_hook))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
