"""Running the teacher from the input of one module on, without what comes before it.

No graph is traced: every leaf module that runs before the block is stubbed by zeros of its output's
shape, and a hook hands the first module the input that a cache holds. That is right only where
nothing later depends on an earlier result by another way, such as a skip around that module;
``find_cuts`` finds out by running with poison in place of the zeros.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pbkd.activations.capture import Activation, Capture, filled_up
from pbkd.devices import in_channels_last

_Calls = dict[nn.Module, list[tuple[int, ...]]]
"""Leaf module to the shapes of its outputs, without the batch, call by call."""


class Resume:
    """The teacher of a ``Capture`` from one module on.

    Args:
        start: the module's path below ``capture.net``.
        images_nchw: some images for a dry pass that notes what runs before the module.
        poison: what the stubs give; it must not matter.
    """

    def __init__(
        self, capture: Capture, start: str, images_nchw: Tensor, *, poison: float = 0.0
    ) -> None:
        self.capture = capture
        self._first = capture.net.get_submodule(start)
        self._image = images_nchw[:1]
        self._poison = poison
        self._calls = self._calls_before(images_nchw)

    def __call__(
        self, x: Tensor, paths: tuple[str, ...], *, fill_to: int = 0
    ) -> dict[str, Activation]:
        """Activations of the given blocks, of which none runs before the start.

        Args:
            x: (B, ...) exact inputs of the first module, float32; they may be overwritten.
            fill_to: as for ``Capture``.
        """
        batch = filled_up(x, fill_to)
        hook = self._first.register_forward_pre_hook(
            lambda _, args: (batch, *args[1:]), prepend=True
        )
        try:
            with self._stubbed():  # what comes before runs with one image, if at all
                found = self.capture.run(self._image, paths)
        finally:
            hook.remove()
        return {path: activation.first(len(x)) for path, activation in found.items()}

    def _calls_before(self, images_nchw: Tensor) -> _Calls:
        calls: _Calls = {}
        reached = False

        def note(module: nn.Module, _: Any, output: Any) -> None:
            if not reached and isinstance(output, Tensor):
                calls.setdefault(module, []).append(tuple(output.shape[1:]))

        def stop(*_: Any) -> None:
            nonlocal reached
            reached = True

        with ExitStack() as hooks:
            for module in self.capture.net.modules():
                if not any(module.children()):
                    hooks.callback(module.register_forward_hook(note).remove)
            hooks.callback(self._first.register_forward_pre_hook(stop).remove)
            self.capture(images_nchw)
        return calls

    @contextmanager
    def _stubbed(self) -> Iterator[None]:
        with ExitStack() as stubs:
            for module, shapes in self._calls.items():
                stubs.callback(_restore, module, vars(module).get("forward"))
                module.forward = self._stub(module.forward, shapes)
            yield

    def _stub(self, forward: Any, shapes: list[tuple[int, ...]]) -> Any:
        left = list(reversed(shapes))

        def stub(*args: Any, **kwargs: Any) -> Any:
            if not left:  # a module that is used again, after the start
                return forward(*args, **kwargs)
            return self._image.new_full((1, *left.pop()), self._poison)

        return stub


def _restore(module: nn.Module, own_forward: Any) -> None:
    del module.forward
    if own_forward is not None:  # an instance's own, which hid that of its class
        module.forward = own_forward


def find_cuts(capture: Capture, images_nchw: Tensor) -> dict[str, str]:
    """Where the teacher can go on: block to the module from whose input all later blocks come out.

    The module is the block itself, or one around it that runs no earlier block, such as the
    residual module whose skip begins where its first convolution does.
    """
    paths = capture.paths
    starts = {block: _possible_starts(block, paths[:index]) for index, block in enumerate(paths)}
    with exact_inputs(capture, {start for some in starts.values() for start in some}) as exact:
        expected = capture(images_nchw)
    cuts: dict[str, str] = {}
    for index, block in enumerate(paths):
        later = {path: expected[path] for path in paths[index:]}
        for start in starts[block]:
            if _is_cut(capture, start, exact.get(start), images_nchw, later):
                cuts[block] = start
                break
    return cuts


def _possible_starts(block: str, earlier: tuple[str, ...]) -> list[str]:
    """The block and the modules around it that hold no earlier block, from the inside out."""
    parts = block.split(".")
    around = [".".join(parts[:depth]) for depth in range(len(parts), 0, -1)]
    return [
        start for start in around if not any(f"{path}.".startswith(f"{start}.") for path in earlier)
    ]


def _is_cut(
    capture: Capture,
    start: str,
    x: Tensor | None,
    images_nchw: Tensor,
    expected: dict[str, Activation],
) -> bool:
    if x is None:  # it takes a list, say
        return False
    if x.dim() == 4 and x.stride() != in_channels_last(x).stride():
        return False  # the cache gives it back in another layout, in which kernels round otherwise
    try:
        resume = Resume(capture, start, images_nchw, poison=torch.nan)
        found = resume(x.clone(), tuple(expected))  # it may be overwritten
    except RuntimeError:  # code between the modules does not take the stubs' zeros
        return False
    return all(
        torch.equal(found[block].input, expected[block].input)
        and torch.equal(found[block].output, expected[block].output)
        for block in expected
    )


@contextmanager
def exact_inputs(capture: Capture, starts: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """While the capture runs: module to its last input, (B, ...) float32, not rounded."""
    inputs: dict[str, Tensor] = {}
    with ExitStack() as hooks:
        for start in starts:

            def keep(_: nn.Module, args: tuple[Any, ...], start: str = start) -> None:
                if args and isinstance(args[0], Tensor):
                    inputs[start] = args[0].clone()

            module = capture.net.get_submodule(start)
            hooks.callback(module.register_forward_pre_hook(keep).remove)
        yield inputs
