"""A kind of the user's own: a function named in params.yaml; docs/adding_a_candidate.md.

``function(block, **settings) -> nn.Module`` gets a copy of the block, so it may take parts of it
as they are; the weights that it returns are those with which training starts. When a student is
loaded, it is called again, with a block of random weights, and the trained weights are filled in. A
method ``inherit(block, x_nchw)`` of the module, if it has one, is called once before training, with
some of the block's inputs.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util

import torch
from torch import Tensor, nn

from pbkd.blocks.inner import randomised
from pbkd.blocks.kinds.kind import Kind
from pbkd.config import CustomConfig
from pbkd.errors import CandidateError, ConfigError
from pbkd.measure import eval_mode
from pbkd.models import network_code


def build(config: CustomConfig, block: nn.Module) -> nn.Module:
    """See ``Kind.build``.

    Raises:
        ConfigError: there is no such function, or it fails.
        CandidateError: the function says that it does not fit the block; or its code has changed
            since the block was discovered.
    """
    if config.code and config.code != network_code(config.kind):
        raise CandidateError(
            f"the code of {config.kind} is not that with which the blocks were found; restore it, "
            "or run: pbkd blocks"
        )
    return _call(config, copy.deepcopy(block))


def init(config: CustomConfig, candidate: nn.Module, block: nn.Module, x_nchw: Tensor) -> None:
    """See ``Kind.init``: the module's own method ``inherit``, if it has one."""
    inherit = getattr(candidate, "inherit", None)
    if not callable(inherit):
        return
    try:
        with torch.no_grad(), eval_mode(candidate):
            inherit(copy.deepcopy(block).eval(), x_nchw.clone())
    except Exception as error:  # whatever a user's code raises
        raise ConfigError(
            f"blocks.candidates: {config.kind}: inherit(block, x_nchw): {type(error).__name__}: "
            f"{error}"
        ) from error


def settle(config: CustomConfig, block: nn.Module, x_nchw: Tensor) -> CustomConfig:
    """See ``Kind.settle``: the digest of the code; the module is tried with other weights.

    Raises:
        CandidateError: its structure follows the block's weights, or it cannot take the inputs.
    """
    module, other = _call(config, copy.deepcopy(block)), _call(config, _with_other_weights(block))
    shapes = [
        {name: tuple(tensor.shape) for name, tensor in each.state_dict().items()}
        for each in (module, other)
    ]
    if shapes[0] != shapes[1]:
        raise CandidateError(
            f"{config.kind} gives another structure where the block's weights differ; a student "
            "could not be loaded: let it depend on the block's shapes and on `settings` alone"
        )
    try:
        with torch.no_grad(), eval_mode(module):
            output = module(x_nchw.clone())
    except Exception as error:  # whatever a user's code raises
        raise CandidateError(
            f"{config.kind} gives a module that cannot take {tuple(x_nchw.shape)}: "
            f"{type(error).__name__}: {error}"
        ) from error
    if not isinstance(output, Tensor):
        raise CandidateError(
            f"{config.kind} gives a module whose output is {type(output).__name__}, expected one "
            "tensor"
        )
    return config.model_copy(update={"code": network_code(config.kind)})


KIND = Kind(build, init, settle)


def _call(config: CustomConfig, block: nn.Module) -> nn.Module:
    module_name, _, function_name = config.kind.partition(":")
    where = f"blocks.candidates: kind {config.kind}"
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{where}: there is no module {error.name} beside params.yaml or on the Python path"
        ) from error
    except AttributeError as error:
        raise ConfigError(f"{where}: {module_name} has no function {function_name}") from error
    except Exception as error:  # whatever a user's code raises
        raise ConfigError(f"{where}: importing it: {type(error).__name__}: {error}") from error
    given = ", ".join(["block", *(f"{name}={value!r}" for name, value in config.settings.items())])
    try:
        module = function(block, **config.settings)
    except CandidateError:
        raise
    except Exception as error:  # whatever a user's code raises
        raise ConfigError(
            f"{where}: {function_name}({given}) of a {type(block).__name__}: "
            f"{type(error).__name__}: {error}; where it does not fit a block, let it raise "
            "pbkd.errors.CandidateError"
        ) from error
    if not isinstance(module, nn.Module):
        raise ConfigError(
            f"{where}: {function_name}({given}) gives {type(module).__name__}, expected a "
            "torch.nn.Module"
        )
    return module


def _with_other_weights(block: nn.Module) -> nn.Module:
    dtype = next((parameter.dtype for parameter in block.parameters()), torch.float32)
    other = randomised(block).to(dtype)
    for part, own in zip(other.modules(), block.modules(), strict=True):
        part.training = own.training
    return other
