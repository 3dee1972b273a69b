"""Running the teacher from the input of one module on, without what comes before it.

No graph is traced: every leaf module that runs before that module is stubbed by zeros of its
output's shape, and a hook hands the module the input that is known. That is right only where
nothing later depends on an earlier result by another way, such as a skip around that module;
whoever goes on from a module finds out first, by running with poison in place of the zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pbkd.activations.capture import Activation, Capture, filled_up
from pbkd.devices import in_channels_last


@dataclass(frozen=True)
class Calls:
    """What one pass of a network called.

    Attributes:
        leaves: leaf modules that gave a tensor, in order, and its shape without the batch.
        entered: module to the number of leaves that had ended before its first call, in the order
            of the first calls.
    """

    leaves: list[tuple[nn.Module, tuple[int, ...]]]
    entered: dict[nn.Module, int]


def note_calls(net: nn.Module, run: Callable[[], object]) -> Calls:
    """The calls of ``net``'s modules while ``run`` runs it."""
    calls = Calls([], {})

    def enter(module: nn.Module, _: Any) -> None:
        calls.entered.setdefault(module, len(calls.leaves))

    def leave(module: nn.Module, _: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            calls.leaves.append((module, tuple(output.shape[1:])))

    with ExitStack() as hooks:
        for module in net.modules():
            hooks.callback(module.register_forward_pre_hook(enter).remove)
            if not any(module.children()):
                hooks.callback(module.register_forward_hook(leave).remove)
        run()
    return calls


class Prefix:
    """What runs before the first call of one module, and how to spare it.

    Args:
        start: the module's path below ``net``; another module may stand there by the time of a
            pass.
        calls: of a pass in which it was called.
        image_nchw: (1, C, H, W), what a spared prefix runs with, as far as it runs at all.
        poison: what the stubs give; it must not matter.
    """

    def __init__(
        self, net: nn.Module, start: str, calls: Calls, image_nchw: Tensor, poison: float = 0.0
    ) -> None:
        self._net, self._start, self._image, self._poison = net, start, image_nchw, poison
        self._shapes: dict[nn.Module, list[tuple[int, ...]]] = {}
        for module, shape in calls.leaves[: calls.entered[net.get_submodule(start)]]:
            self._shapes.setdefault(module, []).append(shape)

    @contextmanager
    def spared(self, x: Tensor) -> Iterator[Tensor]:
        """While it lasts, a pass with the image that it gives is one of ``x`` from the start on.

        Args:
            x: (B, ...) inputs of the start, float32; they may be overwritten.
        """
        given = [x]

        def hand_over(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            return (given.pop(), *args[1:]) if given else None  # later calls take their own

        first = self._net.get_submodule(self._start)
        with ExitStack() as undo:
            for module, shapes in self._shapes.items():
                undo.callback(_restore, module, vars(module).get("forward"))
                module.forward = self._stub(module.forward, shapes)
            undo.callback(first.register_forward_pre_hook(hand_over, prepend=True).remove)
            yield self._image

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


class Resume:
    """The teacher of a ``Capture`` from one module on.

    Args:
        start: the module's path below ``capture.net``.
        images_nchw: some images for a dry pass that notes what runs before the module.
        calls: what such a pass noted, if there was one.
        poison: what the stubs give; it must not matter.
    """

    def __init__(
        self,
        capture: Capture,
        start: str,
        images_nchw: Tensor,
        *,
        calls: Calls | None = None,
        poison: float = 0.0,
    ) -> None:
        self.capture = capture
        calls = calls or note_calls(capture.net, lambda: capture(images_nchw))
        self._prefix = Prefix(capture.net, start, calls, images_nchw[:1], poison)

    def __call__(
        self, x: Tensor, paths: tuple[str, ...], *, fill_to: int = 0
    ) -> dict[str, Activation]:
        """Activations of the given blocks, of which none runs before the start.

        Args:
            x: (B, ...) exact inputs of the first module, float32; they may be overwritten.
            fill_to: as for ``Capture``.
        """
        with self._prefix.spared(filled_up(x, fill_to)) as image:
            found = self.capture.run(image, paths)
        return {path: activation.first(len(x)) for path, activation in found.items()}


def find_cuts(capture: Capture, images_nchw: Tensor) -> dict[str, str]:
    """Where the teacher can go on: block to the module from whose input all later blocks come out.

    The module is the block itself, or one around it that runs no earlier block, such as the
    residual module whose skip begins where its first convolution does.
    """
    paths = capture.paths
    starts = {block: _possible_starts(block, paths[:index]) for index, block in enumerate(paths)}
    expected: dict[str, Activation] = {}
    with exact_inputs(capture, {start for some in starts.values() for start in some}) as exact:
        calls = note_calls(capture.net, lambda: expected.update(capture(images_nchw)))
    cuts: dict[str, str] = {}
    for index, block in enumerate(paths):
        later = {path: expected[path] for path in paths[index:]}
        for start in starts[block]:
            if start in exact and _is_cut(capture, start, exact[start], images_nchw, calls, later):
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
    x: Tensor,
    images_nchw: Tensor,
    calls: Calls,
    expected: dict[str, Activation],
) -> bool:
    if x.dim() == 4 and x.stride() != in_channels_last(x).stride():
        return False  # the cache gives it back in another layout, in which kernels round otherwise
    try:
        resume = Resume(capture, start, images_nchw, calls=calls, poison=torch.nan)
        found = resume(x.clone(), tuple(expected))  # it may be overwritten
    except Exception:  # noqa: BLE001 - code between the modules does not take the stubs' poison
        return False
    return all(
        torch.equal(found[block].input, expected[block].input)
        and torch.equal(found[block].output, expected[block].output)
        for block in expected
    )


@contextmanager
def exact_inputs(capture: Capture, starts: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """While the capture runs: module to its first input, (B, ...) float32, not rounded, a copy.

    One that takes no tensor as its first argument is left out.
    """
    inputs: dict[str, Tensor] = {}
    with ExitStack() as hooks:
        for start in starts:

            def keep(_: nn.Module, args: tuple[Any, ...], start: str = start) -> None:
                if start not in inputs and args and isinstance(args[0], Tensor):
                    inputs[start] = args[0].clone()

            module = capture.net.get_submodule(start)
            hooks.callback(module.register_forward_pre_hook(keep).remove)
        yield inputs
