"""Which channels go together, in which layers: the dependency graph of Torch-Pruning.

Residual additions, depthwise convolutions, concatenations and flattened maps couple channels of
several layers (Fang et al., arXiv 2301.12900). The one file that imports torch_pruning.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from pbkd.errors import MissingExtraError
from pbkd.models import Classifier


@dataclass(frozen=True)
class Removal:
    """Channels that go together.

    Attributes:
        group: path of the layer whose outputs they are, the first of all that are coupled.
        channels: of that layer; one, or one per group where it is in groups.
    """

    group: str
    channels: tuple[int, ...]


def removable(student: Classifier, example: Tensor) -> Iterator[tuple[list[Removal], Tensor]]:
    """Per group of coupled layers what can go, and the importance of each removal, (R,) float32.

    It is the mean over the layers of the squared L2 norm of a channel's weights, batch norm's scale
    included, over the mean of all channels (arXiv 2301.12900).

    Args:
        student: on the CPU; it is put into evaluation mode, and needs gradients afterwards.
        example: (N, C, H, W) in [0, 1].

    Raises:
        MissingExtraError: torch-pruning is not installed.
        Exception: whatever it or the network raises where it cannot be traced.
    """
    graph = _graph(student, example)

    from torch_pruning.pruner.importance import GroupMagnitudeImportance

    importance = GroupMagnitudeImportance(p=2)
    ends = {id(node) for node in graph.module2node.values() if not node.outputs}
    for group in graph.get_all_groups():
        if not _can_go(graph, group, ends):
            continue
        path = graph._module2name[group[0].dep.target.module]
        per_channel = importance(group)
        num_groups = math.lcm(*(_num_groups(dep.target.module) for dep, _ in group))
        per_removal = per_channel.reshape(num_groups, -1).mean(0)
        size = len(per_removal)
        removals = [
            Removal(path, tuple(range(index, num_groups * size, size))) for index in range(size)
        ]
        yield removals, per_removal


def remove(student: Classifier, example: Tensor, gone: Mapping[str, Sequence[int]]) -> None:
    """Take channels out of the outputs of layers, in place, with what is coupled; as above."""
    graph = _graph(student, example)
    for path, channels in gone.items():
        layer = student.net.get_submodule(path)
        function = graph.get_pruner_of_module(layer).prune_out_channels
        graph.get_pruning_group(layer, function, sorted(channels)).prune(record_history=False)


def _graph(student: Classifier, example: Tensor) -> Any:
    """The dependency graph of the network; its parameters need gradients afterwards."""
    try:
        from torch_pruning import DependencyGraph
    except ImportError:
        raise MissingExtraError("torch-pruning", "shrink", "`prune_channels`") from None
    student.requires_grad_(True)  # the trace follows gradients
    return DependencyGraph().build_dependency(
        student.net,
        example[:1],
        forward_fn=lambda net, x_nchw: net(x_nchw),  # by itself it would try the image alone first
        verbose=False,
    )


def _can_go(graph: Any, group: Any, ends: set[int]) -> bool:
    """Whether no channel of the group is a logit, and all its layers are such as we resize."""
    from torch_pruning.ops import OPTYPE

    foreign = (OPTYPE.MHA, OPTYPE.LSTM, OPTYPE.EMBED, OPTYPE.CUSTOMIZED, OPTYPE.OUTPUT)
    for dep, _ in group:
        node = dep.target
        if node.type in foreign or not _is_known(node.module):
            return False
        if id(node) in ends and graph.is_out_channel_pruning_fn(dep.handler):
            return False
    return True


def _is_known(module: object) -> bool:
    if isinstance(module, nn.modules.conv._ConvNd):
        return isinstance(module, nn.Conv2d)
    return not isinstance(module, nn.LayerNorm) or len(module.normalized_shape) == 1


def _num_groups(module: object) -> int:
    """Into how many equal parts a layer's channels fall; 1 where each is a part of its own."""
    if isinstance(module, nn.GroupNorm):
        return module.num_groups
    if isinstance(module, nn.Conv2d) and module.groups < module.out_channels:
        return module.groups
    return 1
