"""The teacher's suffix after a block: what runs again when only that block is another module.

A suffix begins with the latest module, at the block or before it, from whose input alone the
logits come out bit for bit: the block itself in a chain, the residual module around it where a skip
leads around it, the dense block where later layers take all earlier ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, suppress
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pbkd.activations.capture import PassIsOver
from pbkd.activations.resume import Calls, Prefix, note_calls

FROM_IMAGES = ""
"""The start of a suffix that is the whole teacher."""


class Teacher(Protocol):
    """A classifier whose blocks are named below ``net``."""

    net: nn.Module

    def __call__(self, x_nchw: Tensor) -> Tensor:
        """(B, C, H, W) images to (B, K) logits."""
        ...


class Suffixes:
    """Suffixes of some blocks.

    Attributes:
        starts: block to the path, below the network, of the module with which its suffix begins;
            FROM_IMAGES where no module gives the logits.

    Args:
        teacher: in evaluation mode.
        images_nchw: a few for dry passes, at least two: one image would take other kernels.
    """

    def __init__(self, teacher: Teacher, blocks: Iterable[str], images_nchw: Tensor) -> None:
        self._teacher = teacher
        search = _Search(teacher, images_nchw)
        self.starts = {block: search.start(block) for block in blocks}
        first_calls = list(search.calls.entered)
        found = {start for start in self.starts.values() if start != FROM_IMAGES}
        self._order = sorted(found, key=lambda s: first_calls.index(teacher.net.get_submodule(s)))
        image = images_nchw[:1]
        self._prefixes = {s: Prefix(teacher.net, s, search.calls, image) for s in self._order}

    def inputs(self, images_nchw: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Every start and its (B, ...) exact input, in the order of the network.

        The teacher runs once in all, from each start to the next, so that one input at a time is
        in memory. Between two of them the teacher's modules must be its own.
        """
        x, last = images_nchw, FROM_IMAGES
        if FROM_IMAGES in self.starts.values():
            yield FROM_IMAGES, x
        for start in self._order:
            x = self._input_of(start, last, x)
            last = start
            yield start, x

    @torch.no_grad()
    def logits(self, start: str, x: Tensor) -> Tensor:
        """(B, K) logits from a start's input, which is left as it is."""
        if start == FROM_IMAGES:
            return self._teacher(x)
        with self._prefixes[start].spared(x.clone()) as image:
            return self._teacher(image)

    @torch.no_grad()
    def _input_of(self, start: str, last: str, x: Tensor) -> Tensor:
        """The input of ``start``, by a pass from that of ``last``, which may be overwritten."""
        taken: list[Tensor] = []

        def take(_: nn.Module, args: tuple[Any, ...]) -> None:
            taken.append(args[0])
            raise PassIsOver

        with ExitStack() as stack:
            stack.enter_context(suppress(PassIsOver))
            module = self._teacher.net.get_submodule(start)
            stack.callback(module.register_forward_pre_hook(take).remove)
            if last != FROM_IMAGES:
                x = stack.enter_context(self._prefixes[last].spared(x))
            self._teacher(x)
        return taken[0]


class _Search:
    """Finds starts; each module is tried once."""

    def __init__(self, teacher: Teacher, images_nchw: Tensor) -> None:
        self._teacher, self._images = teacher, images_nchw
        self._paths: dict[nn.Module, str] = {
            module: path for path, module in teacher.net.named_modules() if path
        }
        self._inputs: dict[nn.Module, Tensor] = {}
        self._exact: dict[str, bool] = {}
        self.calls, self._logits = self._dry_pass()

    def start(self, block: str) -> str:
        """The latest start at the block or before it."""
        first_calls = list(self.calls.entered)
        module = self._teacher.net.get_submodule(block)
        if module not in self.calls.entered:
            return FROM_IMAGES
        for earlier in reversed(first_calls[: first_calls.index(module) + 1]):
            path = self._paths.get(earlier)
            if path is not None and self._is_start(path, earlier):
                return path
        return FROM_IMAGES

    @torch.no_grad()
    def _dry_pass(self) -> tuple[Calls, Tensor]:
        logits: list[Tensor] = []

        def keep(module: nn.Module, args: tuple[Any, ...]) -> None:
            if module in self._inputs or not args or not isinstance(args[0], Tensor):
                return
            copy = args[0].clone()
            if copy.stride() == args[0].stride():  # in another layout kernels round otherwise
                self._inputs[module] = copy

        with ExitStack() as hooks:
            for module in self._paths:
                hooks.callback(module.register_forward_pre_hook(keep).remove)
            net, images = self._teacher.net, self._images
            calls = note_calls(net, lambda: logits.append(self._teacher(images)))
        return calls, logits[0]

    def _is_start(self, path: str, module: nn.Module) -> bool:
        if path not in self._exact:
            self._exact[path] = module in self._inputs and self._gives_the_logits(path, module)
        return self._exact[path]

    @torch.no_grad()
    def _gives_the_logits(self, path: str, module: nn.Module) -> bool:
        net, image = self._teacher.net, self._images[:1]
        prefix = Prefix(net, path, self.calls, image, poison=torch.nan)
        try:
            with prefix.spared(self._inputs[module].clone()) as one:
                return torch.equal(self._teacher(one), self._logits)
        except Exception:  # noqa: BLE001 - code between the modules does not take the poison
            return False
