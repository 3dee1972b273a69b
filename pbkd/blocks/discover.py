"""Find the blocks of any network by module path and forward hooks: no tracing, no graph."""

from __future__ import annotations

import fnmatch
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from pbkd.blocks.candidates import build_candidate, candidate_name, settle_candidate
from pbkd.config import BlocksConfig, CandidateConfig
from pbkd.errors import BlockError, CandidateError
from pbkd.measure import count_macs, eval_mode, num_parameters


class CandidateFacts(BaseModel):
    """What is known of a candidate before it is trained; MACs are of one image."""

    model_config = ConfigDict(frozen=True)

    name: str
    config: CandidateConfig
    num_parameters: int
    macs: int


class Rejected(BaseModel):
    """A block or candidate that is left out, and why."""

    model_config = ConfigDict(frozen=True)

    name: str
    reason: str


class BlockFacts(BaseModel):
    """What is known of a block, equal on every machine.

    Attributes:
        path: module path below the network.
        input_shape, output_shape: of one image, without the batch.
        macs: multiply-accumulates of one image.
        share_of_parameters, share_of_macs: of the whole network, 0 to 1.
    """

    model_config = ConfigDict(frozen=True)

    path: str
    module: str
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    num_parameters: int
    macs: int
    share_of_parameters: float
    share_of_macs: float
    candidates: tuple[CandidateFacts, ...]
    rejected: tuple[Rejected, ...]

    @property
    def elements_per_image(self) -> int:
        """Numbers in one image's input and output together."""
        return int(torch.Size(self.input_shape).numel() + torch.Size(self.output_shape).numel())


class Discovery(BaseModel):
    """The blocks of a network in the order in which they run, and what was refused."""

    model_config = ConfigDict(frozen=True)

    num_parameters: int
    macs: int
    blocks: tuple[BlockFacts, ...]
    refused: tuple[Rejected, ...]


def find_blocks(net: nn.Module, config: BlocksConfig, x_nchw: Tensor) -> Discovery:
    """Select blocks, refuse those that cannot be replaced, and list each one's candidates.

    Args:
        net: the network, without its normalisation.
        x_nchw: at least one image, normalised, to run the network once.

    Raises:
        BlockError: a glob or the selector matches nothing, or no block has a candidate.
    """
    selected = _select(net, config)
    calls = _observe(net, selected, x_nchw)
    refused = _refuse(net, selected, calls)
    overlaps = {path: reason for path, reason in refused.items() if reason.startswith("overlaps")}
    if config.select == "paths" and overlaps:
        path, reason = next(iter(overlaps.items()))
        raise BlockError(
            f"blocks.paths: {path} {reason}; name one of them only, or put one into blocks.exclude"
        )
    image = x_nchw[:1]
    total_parameters, total_macs = num_parameters(net), count_macs(net, image)
    facts = []
    for path in sorted(set(selected) - set(refused), key=lambda path: calls[path].order):
        call = calls[path]
        assert isinstance(call.input, Tensor)
        assert isinstance(call.output, Tensor)
        candidates, rejected = _candidates(net, path, config, call.input[:1], call.output[:1])
        block = net.get_submodule(path)
        parameters, macs = num_parameters(block), count_macs(block, call.input[:1])
        facts.append(
            BlockFacts(
                path=path,
                module=type(block).__name__,
                input_shape=tuple(call.input.shape[1:]),
                output_shape=tuple(call.output.shape[1:]),
                num_parameters=parameters,
                macs=macs,
                share_of_parameters=parameters / total_parameters,
                share_of_macs=macs / total_macs,
                candidates=candidates,
                rejected=rejected,
            )
        )
    usable = [block for block in facts if block.candidates]
    without = {block.path: _no_candidate(block) for block in facts if not block.candidates}
    refused |= without
    if not usable:
        reasons = "; ".join(f"{path}: {reason}" for path, reason in refused.items())
        raise BlockError(f"blocks: no selected block can be replaced: {reasons}")
    return Discovery(
        num_parameters=total_parameters,
        macs=total_macs,
        blocks=tuple(usable),
        refused=tuple(Rejected(name=path, reason=refused[path]) for path in refused),
    )


# ---------------------------------------------------------------- selection


def _select(net: nn.Module, config: BlocksConfig) -> list[str]:
    modules = dict(net.named_modules())
    modules.pop("", None)
    if config.select == "paths":
        selected = []
        for glob in config.paths:
            matches = fnmatch.filter(modules, glob)
            if not matches:
                raise BlockError(
                    f"blocks.paths: `{glob}` matches no module; expected a path such as "
                    f"`{next(iter(modules))}`; list them with: pbkd inspect"
                )
            selected += matches
    else:
        test = _is_conv if config.select == "convs" else _is_residual
        selected = [path for path, module in modules.items() if test(module)]
    for glob in [*config.exclude, *config.overrides]:
        if not fnmatch.filter(modules, glob):
            raise BlockError(f"blocks: `{glob}` in exclude or overrides matches no module")
    excluded = {path for glob in config.exclude for path in fnmatch.filter(modules, glob)}
    selected = [path for path in dict.fromkeys(selected) if path not in excluded]
    if not selected:
        raise BlockError(
            f"blocks.select: `{config.select}` matches nothing in {type(net).__name__}; "
            "name modules with `select: paths`"
        )
    return selected


def _is_conv(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and max(module.kernel_size) > 1


def _is_residual(module: nn.Module) -> bool:
    """BasicBlock- and Bottleneck-like: at least two numbered convolutions and a skip."""
    children = dict(module.named_children())
    convs = [n for n, child in children.items() if isinstance(child, nn.Conv2d) and n[:4] == "conv"]
    has_skip = any(hasattr(module, name) for name in ("downsample", "shortcut", "skip"))
    return len(convs) >= 2 and has_skip


# ---------------------------------------------------------------- observation and refusal


@dataclass
class _Call:
    """What the hooks saw of one module during one pass."""

    times: int = 0
    order: int = 0
    problem: str = ""
    input: Tensor | None = None
    output: Tensor | None = None


@dataclass
class _Observer:
    calls: dict[str, _Call] = field(default_factory=dict)

    def before(self, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = self.calls[path]
        call.times += 1
        call.order = sum(other.times for other in self.calls.values())
        if kwargs:
            call.problem = f"takes keyword inputs ({', '.join(kwargs)}), expected one tensor"
        elif len(args) != 1:
            call.problem = f"takes {len(args)} inputs, expected one tensor"
        elif not isinstance(args[0], Tensor):
            call.problem = f"takes {type(args[0]).__name__}, expected one tensor"
        else:
            call.input = args[0].clone()

    def after(self, path: str, output: object) -> None:
        if isinstance(output, Tensor):
            self.calls[path].output = output.clone()
        else:
            self.calls[path].problem = f"gives {type(output).__name__}, expected one tensor"


def _observe(net: nn.Module, paths: list[str], x_nchw: Tensor) -> dict[str, _Call]:
    observer = _Observer({path: _Call() for path in paths})
    hooks = []
    for path in paths:
        module = net.get_submodule(path)
        hooks.append(
            module.register_forward_pre_hook(
                lambda _, args, kwargs, path=path: observer.before(path, args, kwargs),
                with_kwargs=True,
            )
        )
        hooks.append(
            module.register_forward_hook(lambda _, args, out, path=path: observer.after(path, out))
        )
    try:
        with torch.no_grad(), eval_mode(net):
            net(x_nchw)
    finally:
        for hook in hooks:
            hook.remove()
    return observer.calls


def parameter_uses(net: nn.Module) -> Counter[int]:
    """``id`` of each parameter to the number of places in the network that hold it."""
    return Counter(
        id(parameter)
        for _, module in net.named_modules(remove_duplicate=False)
        for parameter in module.parameters(recurse=False)
    )


def _refuse(net: nn.Module, selected: list[str], calls: dict[str, _Call]) -> dict[str, str]:
    """Path to reason, for every selected block that cannot be replaced."""
    names: dict[int, list[str]] = {}
    for path, module in net.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(path)
    uses = parameter_uses(net)
    refused: dict[str, str] = {}
    for path in sorted(selected):  # a block before those inside it
        module = net.get_submodule(path)
        parents = [p for p in selected if path.startswith(p + ".") and p not in refused]
        tied = sum(uses[id(p)] for p in module.parameters()) > len(list(module.parameters()))
        if len(names[id(module)]) > 1:
            refused[path] = f"shared module: the same as {', '.join(names[id(module)])}"
        elif calls[path].times > 1:
            refused[path] = f"shared module: called {calls[path].times} times in one pass"
        elif calls[path].times == 0:
            refused[path] = "never called in a pass"
        elif tied:
            refused[path] = "shares parameters with another module"
        elif calls[path].problem:
            refused[path] = calls[path].problem
        elif parents:
            refused[path] = f"overlaps: lies inside {parents[0]}, which is selected too"
    return {path: refused[path] for path in selected if path in refused}


# ---------------------------------------------------------------- facts


def _candidates(
    net: nn.Module, path: str, config: BlocksConfig, x_nchw: Tensor, y_nchw: Tensor
) -> tuple[tuple[CandidateFacts, ...], tuple[Rejected, ...]]:
    block = net.get_submodule(path)
    parameters, macs = num_parameters(block), count_macs(block, x_nchw)
    accepted, rejected = [], []
    for candidate_config in _configs_for(path, config):
        name = candidate_name(candidate_config)
        try:
            facts = _candidate_facts(candidate_config, block, x_nchw, y_nchw)
        except CandidateError as error:
            rejected.append(Rejected(name=name, reason=str(error)))
            continue
        if facts.num_parameters < parameters or facts.macs < macs:
            accepted.append(facts)
        else:
            rejected.append(Rejected(name=name, reason="neither fewer parameters nor fewer MACs"))
    return tuple(accepted), tuple(rejected)


def _configs_for(path: str, config: BlocksConfig) -> tuple[CandidateConfig, ...]:
    chosen = config.candidates
    for glob, configs in config.overrides.items():
        if fnmatch.fnmatch(path, glob):
            chosen = configs
    return tuple({candidate_name(each): each for each in chosen}.values())


def _candidate_facts(
    config: CandidateConfig, block: nn.Module, x_nchw: Tensor, y_nchw: Tensor
) -> CandidateFacts:
    config = settle_candidate(config, block, x_nchw)
    candidate = build_candidate(config, block).eval()
    with torch.no_grad():
        shape = tuple(candidate(x_nchw.clone()).shape)
    if shape != tuple(y_nchw.shape):
        raise CandidateError(f"gives {shape}, the block {tuple(y_nchw.shape)}")
    return CandidateFacts(
        name=candidate_name(config),
        config=config,
        num_parameters=num_parameters(candidate),
        macs=count_macs(candidate, x_nchw),
    )


def _no_candidate(block: BlockFacts) -> str:
    return "; ".join(f"{item.name}: {item.reason}" for item in block.rejected)
