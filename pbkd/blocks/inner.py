"""Which channels live inside a block only, found by trying: no tracing, no graph.

A dense convolution mixes its channels, everything else that may stand between two of them (batch
norms, depthwise convolutions, activations, pooling, additions, squeeze-and-excitation) keeps them
apart. So each dense convolution's output is disturbed in some channels while all other dense
convolutions repeat what they gave before. Where only the disturbed channels arrive at the next
ones, and nothing leaves the block, these channels are inner.

The block is tried with random weights, so that the answer depends on its structure alone.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pbkd.config.candidates import InnerChannels
from pbkd.errors import CandidateError
from pbkd.seeding import make_generator

_IMAGES = 2
_INPUT = ""
"""Stands for the block's input among the modules' paths."""


def randomised(block: nn.Module) -> nn.Module:
    """A float32 copy in evaluation mode whose weights are random, equal in every process."""
    generator = make_generator(0, "randomised")
    copied = copy.deepcopy(block).float().eval()
    for module in copied.modules():
        for parameter in module.parameters(recurse=False):
            fan_in = max(1, parameter[0].numel()) if parameter.dim() > 1 else 1
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            parameter.data = noise / fan_in**0.5
        if isinstance(module, nn.BatchNorm2d) and module.running_var is not None:
            assert module.running_mean is not None
            variance = torch.rand(module.running_var.shape, generator=generator) + 0.5
            module.running_var.copy_(variance)
            module.running_mean.copy_(torch.randn(variance.shape, generator=generator) / 4)
            if module.affine:
                module.weight.data.copy_(torch.rand(variance.shape, generator=generator) + 0.5)
    return copied


def random_inputs(x_nchw: Tensor) -> Tensor:
    """Some images of noise with the shape of a block's inputs, float32."""
    shape = (_IMAGES, *x_nchw.shape[1:])
    return torch.randn(shape, generator=make_generator(0, "inputs"), dtype=torch.float32)


def find_inner(block: nn.Module, x_nchw: Tensor) -> tuple[InnerChannels, ...]:
    """The groups of channels that a block could have fewer of, in the order of its modules.

    Args:
        x_nchw: an input of the block; only its shape counts.

    Raises:
        CandidateError: the block does not run with random weights in float32.
    """
    trial = _Trial(randomised(block), random_inputs(x_nchw))
    links: dict[str, list[str]] = {}
    bad: set[str] = set()
    for source in [_INPUT, *trial.producers]:
        channels = trial.some_channels(source)
        reached, leaves = trial.disturb(source, channels)
        links[source] = list(reached)
        aligned = all(
            # fewer may arrive: an activation is flat where a channel happens to be
            path in trial.keepers and len(mask) == len(channels) and not (mask & ~channels).any()
            for path, mask in reached.items()
        )
        if source == _INPUT or leaves or not reached or not aligned:
            bad.add(source)
    return tuple(_groups(trial, links, bad))


def _groups(trial: _Trial, links: dict[str, list[str]], bad: set[str]) -> Iterable[InnerChannels]:
    """Producers that share a module have to keep the same channels: the connected ones."""
    unseen = [source for source in links if source != _INPUT]
    while unseen:
        sources, reached = {unseen[0]}, set[str]()
        size = -1
        while len(sources) + len(reached) > size:
            size = len(sources) + len(reached)
            reached |= {path for source in sources for path in links[source]}
            sources |= {source for source, paths in links.items() if reached & set(paths)}
        unseen = [source for source in unseen if source not in sources]
        between = [p for p in trial.paths if p in reached and p not in trial.producers]
        consumers = [p for p in trial.paths if p in reached and p in trial.producers]
        producers = [p for p in trial.paths if p in sources]
        called_once = not (sources | reached) & trial.several_calls
        if consumers and called_once and not sources & bad:
            yield InnerChannels(
                producers=tuple(producers), between=tuple(between), consumers=tuple(consumers)
            )


@dataclass
class _Trial:
    """A block with random weights, and what its modules got and gave when it ran undisturbed."""

    net: nn.Module
    x_nchw: Tensor
    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    several_calls: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        modules = dict(self.net.named_modules())
        # those with parameters of their own: any other kind of them rules the channels out
        self.paths = [p for p, m in modules.items() if [*m.parameters(recurse=False)] and p]
        dense = [p for p in self.paths if _is_dense(modules[p])]
        self.keepers = {p for p in self.paths if p in dense or _keeps_apart(modules[p])}
        self.producers: list[str] = dense
        self.output = self._run(_INPUT, None)
        self.producers = [p for p in dense if p in self.outputs]

    def some_channels(self, source: str) -> Tensor:
        """A random half of the channels that a module gives: (C,) bool, one at least."""
        num = (self.x_nchw if source == _INPUT else self.outputs[source]).shape[1]
        order = torch.randperm(num, generator=make_generator(0, source))
        mask = torch.zeros(num, dtype=torch.bool)
        mask[order[: max(1, num // 2)]] = True
        return mask

    def disturb(self, source: str, channels: Tensor) -> tuple[dict[str, Tensor], bool]:
        """Which modules get other inputs, in which channels, and whether the output changes."""
        before = dict(self.inputs)
        try:
            output = self._run(source, channels)
            after = self.inputs
        finally:
            self.inputs = before
        changed = {path: _changed(after[path], before[path]) for path in before if path in after}
        reached = {path: mask for path, mask in changed.items() if mask.any()}
        return reached, bool(_changed(output, self.output).any())

    def _run(self, source: str, channels: Tensor | None) -> Tensor:
        self.inputs = {}
        x_nchw = self.x_nchw.clone()
        if source == _INPUT and channels is not None:
            x_nchw = _noisy(x_nchw, channels)
        hooks = []
        for path in self.paths:
            module = self.net.get_submodule(path)
            hooks.append(module.register_forward_pre_hook(self._keep_input(path)))
            if path in self.producers:
                hooks.append(module.register_forward_hook(self._give(path, source, channels)))
        try:
            with torch.no_grad():
                output = self.net(x_nchw)
        except Exception as error:  # whatever a block does not bear
            raise CandidateError(
                f"does not run with random weights in float32: {type(error).__name__}: {error}"
            ) from error
        finally:
            for hook in hooks:
                hook.remove()
        assert isinstance(output, Tensor)
        return output

    def _keep_input(self, path: str) -> Any:
        def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if path in self.inputs:
                self.several_calls.add(path)
            self.inputs[path] = args[0].clone()

        return keep

    def _give(self, path: str, source: str, channels: Tensor | None) -> Any:
        def give(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if channels is None:
                self.outputs[path] = output.clone()
                return output
            known = self.outputs[path].clone()
            return _noisy(known, channels) if path == source else known

        return give


def _is_dense(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.groups == 1


def _keeps_apart(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv2d):
        return module.groups == module.in_channels == module.out_channels
    return isinstance(module, nn.BatchNorm2d)


def _noisy(x_nchw: Tensor, channels: Tensor) -> Tensor:
    noise = torch.randn(x_nchw.shape, generator=make_generator(0, "noise"), dtype=x_nchw.dtype)
    return torch.where(channels[None, :, None, None], x_nchw + noise, x_nchw)


def _changed(one: Tensor, other: Tensor) -> Tensor:
    """Channels (dimension 1) in which two tensors differ: (C,) bool."""
    if one.shape != other.shape or one.dim() < 2:
        return torch.ones(1, dtype=torch.bool)
    difference = (one - other).abs().transpose(0, 1).flatten(1).amax(1)
    return difference > 1e-6 * other.abs().amax().clamp_min(1e-6)
