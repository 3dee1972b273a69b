"""How large a model is: its parameters, and the bytes of its weights in a file."""

from __future__ import annotations

from safetensors.torch import save
from torch import nn


def num_parameters(module: nn.Module) -> int:
    """Number of parameters, trained or not; one that stands in two places counts once."""
    return sum(parameter.numel() for parameter in module.parameters())


def state_dict_bytes(module: nn.Module) -> int:
    """Bytes of the state dict as safetensors, header included: what ``save_tensors`` writes.

    Every entry counts in its own dtype, buffers too; a tensor under two names counts twice, as it
    is written twice. The state dict is really serialised, in memory.
    """
    # safetensors refuses tensors that share memory, hence the clones.
    state = {
        name: tensor.detach().cpu().contiguous().clone()
        for name, tensor in module.state_dict().items()
    }
    return len(save(state))
