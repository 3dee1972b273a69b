"""Blockwise distillation without pbkd: what blocks.py and gpu.py compare with.

``Published`` is the algorithm of Blakeney et al. (arXiv 2012.03096); ``Joint`` is what one writes
today in plain PyTorch: forward hooks, one optimizer and one loss for all blocks; ``Torchdistill``
is that same step in torchdistill's classes, where that library is installed.

All three take the teacher, the initial candidates and pbkd's stream, and copy the first two. They
round activations as pbkd does and start from equal weights, so their losses are comparable.

torchdistill (1.1.5) cannot be *configured* to do this. In ``DistillationBox.forward_process`` the
student gets ``sample_batch`` through ``student_forward_proc``: a student with replaced blocks sees
its own, drifted inputs, and no key of the configuration feeds a module with the teacher's
``io_dict[path]["input"]``. Its auxiliary wrappers that do call modules on hooked tensors
(``Connector4DAB``, ``VariationalDistributor4VID``) build fixed layers on the student's features.
It can be *extended* to: a class of one's own under ``register_auxiliary_model_wrapper`` holds
teacher and candidates, and feeds them in ``secondary_forward``; ``WeightedSumLoss`` adds up terms
over the hooked outputs. What runs then is ``Joint``'s step: one optimizer and one sum of losses,
with the hooks' bookkeeping on top. Its hooks keep references, so an in-place operation right behind
a block spoils the block's target; neither network of the benchmark has one there.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pbkd.config import MixedPrecision
from pbkd.data import Stream
from pbkd.devices import autocast
from pbkd.distill import relative_l2

Pair = tuple[Tensor, Tensor]
"""A block's input and output for one batch, rounded."""


@dataclass(frozen=True)
class Recipe:
    """What all variants of a comparison share.

    Attributes:
        num_steps: of the whole training, per candidate: the length of the cosine schedule.
        dtype: activations are rounded to it, and go back to float32 before a candidate sees them.
        layout: of weights and images.
        mixed_precision: candidates run under bfloat16 autocast, as in pbkd.
    """

    batch_size: int
    lr: float
    weight_decay: float
    num_steps: int
    dtype: torch.dtype
    layout: torch.memory_format = torch.channels_last
    mixed_precision: MixedPrecision = False


class _Baseline:
    def __init__(
        self,
        teacher: nn.Module,
        candidates: Mapping[str, nn.Module],
        train: Stream,
        recipe: Recipe,
    ) -> None:
        self.recipe, self.train = recipe, train
        self.teacher = in_layout(copy.deepcopy(teacher), recipe.layout)
        self.candidates = {
            path: in_layout(copy.deepcopy(module), recipe.layout)
            for path, module in candidates.items()
        }

    def images(self, epoch: int) -> Iterator[Tensor]:
        """The stream's batches of one epoch, (B, C, H, W), in the recipe's layout."""
        for batch in self.train.epoch(epoch, self.recipe.batch_size):
            yield laid_out(batch.images_nchw, self.recipe.layout)

    def rounded(self, x: Tensor, y: Tensor) -> Pair:
        """Input and output of a block as pbkd's sources hand them out."""
        return x.to(self.recipe.dtype), y.to(self.recipe.dtype)

    def loss(self, path: str, pair: Pair) -> Tensor:
        """A candidate's loss on its block's rounded input and output."""
        x, target = pair[0].float(), pair[1].float()
        with autocast(x.device, self.recipe.mixed_precision):
            output = self.candidates[path](x)
        return relative_l2(output.float(), target)


class Published(_Baseline):
    """One job per block, one after the other: prefix from the images, then a step.

    The jobs' processes are not started anew, as the original does: that time is not counted.
    """

    def __init__(
        self,
        teacher: nn.Module,
        candidates: Mapping[str, nn.Module],
        train: Stream,
        recipe: Recipe,
    ) -> None:
        super().__init__(teacher, candidates, train, recipe)
        self._learners = {path: _Learner([m], recipe) for path, m in self.candidates.items()}

    def epoch(self, epoch: int) -> None:
        """One epoch of every job."""
        for path in self.candidates:
            for images_nchw in self.images(epoch):
                self._learners[path].step(self.loss(path, self._prefix(path, images_nchw)))

    def _prefix(self, path: str, images_nchw: Tensor) -> Pair:
        block = self.teacher.get_submodule("net").get_submodule(path)
        handle = block.register_forward_hook(self._stop)
        try:
            with torch.no_grad():
                self.teacher(images_nchw)
        except _Reached as reached:
            return reached.pair
        finally:
            handle.remove()
        raise AssertionError(f"{path} was not called")

    def _stop(self, module: nn.Module, args: Any, output: Tensor) -> None:
        raise _Reached(self.rounded(args[0], output))


class Joint(_Baseline):
    """One teacher pass per batch, the sum of all blocks' losses, one backward, one optimizer."""

    def __init__(
        self,
        teacher: nn.Module,
        candidates: Mapping[str, nn.Module],
        train: Stream,
        recipe: Recipe,
    ) -> None:
        super().__init__(teacher, candidates, train, recipe)
        self._learner = _Learner(list(self.candidates.values()), recipe)
        self._held: dict[str, Pair] = {}
        for path in candidates:
            block = self.teacher.get_submodule("net").get_submodule(path)

            def hold(_: nn.Module, args: Any, output: Tensor, path: str = path) -> None:
                self._held[path] = self.rounded(args[0], output)

            block.register_forward_hook(hold)

    def epoch(self, epoch: int) -> None:
        """One epoch of all candidates."""
        for images_nchw in self.images(epoch):
            with torch.no_grad():
                self.teacher(images_nchw)
            losses = [self.loss(path, self._held[path]) for path in self.candidates]
            self._learner.step(torch.stack(losses).sum())


class Torchdistill(_Baseline):
    """``Joint``'s step by torchdistill's ``TrainingBox``, on the CPU; see the top of this file.

    Raises:
        ImportError: torchdistill is not installed; it is none of pbkd's requirements.
    """

    def __init__(
        self,
        teacher: nn.Module,
        candidates: Mapping[str, nn.Module],
        train: Stream,
        recipe: Recipe,
    ) -> None:
        super().__init__(teacher, candidates, train, recipe)
        self._box = _training_box(self)

    @staticmethod
    def installed() -> bool:
        """Whether the library can be imported."""
        return importlib.util.find_spec("torchdistill") is not None

    def epoch(self, epoch: int) -> None:
        """One epoch of all candidates."""
        for images_nchw in self.images(epoch):
            self._box.post_forward_process(self._box.forward_process(images_nchw))


def _training_box(baseline: Torchdistill) -> Any:
    from torchdistill.core.training import get_training_box
    from torchdistill.models.registry import register_auxiliary_model_wrapper
    from torchdistill.models.wrapper import AuxiliaryModelWrapper

    recipe, dtype = baseline.recipe, baseline.recipe.dtype
    slots = {path: path.replace(".", "_") for path in baseline.candidates}
    blocks = {slot: f"teacher.net.{path}" for path, slot in slots.items()}

    class Blockwise(AuxiliaryModelWrapper):  # type: ignore[misc]
        def __init__(self, **_: Any) -> None:
            super().__init__()
            self.teacher = baseline.teacher
            self.candidates = nn.ModuleDict(
                {slots[path]: module for path, module in baseline.candidates.items()}
            )

        def forward(self, images_nchw: Tensor) -> Tensor:
            with torch.no_grad():
                return self.teacher(images_nchw)

        def secondary_forward(self, io_dict: dict[str, dict[str, Tensor]]) -> None:
            for slot, candidate in self.candidates.items():
                candidate(io_dict[blocks[slot]]["input"].to(dtype).float())

    class Term(nn.Module):
        def __init__(self, slot: str) -> None:
            super().__init__()
            self.slot = slot

        def forward(self, io_dict: dict[str, dict[str, Tensor]], *_: Any) -> Tensor:
            target = io_dict[blocks[self.slot]]["output"].to(dtype).float()
            return relative_l2(io_dict[f"candidates.{self.slot}"]["output"], target)

    register_auxiliary_model_wrapper(key="Blockwise")(Blockwise)
    terms = {slot: {"criterion": Term(slot), "weight": 1.0} for slot in blocks}
    outputs = [*blocks.values(), *(f"candidates.{slot}" for slot in blocks)]
    config = {
        "num_epochs": 1,
        "model": {
            "forward_proc": "forward_batch_only",
            "auxiliary_model_wrapper": {"key": "Blockwise"},
            "forward_hook": {"input": list(blocks.values()), "output": outputs},
            "frozen_modules": ["teacher"],
        },
        "optimizer": {
            "key": "AdamW",
            "kwargs": {"lr": recipe.lr, "weight_decay": recipe.weight_decay, "fused": True},
        },
        "scheduler": {
            "key": "CosineAnnealingLR",
            "kwargs": {"T_max": recipe.num_steps},
            "scheduling_step": 1,
        },
        "criterion": {"key": "WeightedSumLoss", "kwargs": {"sub_terms": terms}},
    }
    return get_training_box(baseline.teacher, {}, config, torch.device("cpu"), None, False, 1.0)


class _Learner:
    """pbkd's optimizer and schedule, written down again."""

    def __init__(self, modules: list[nn.Module], recipe: Recipe) -> None:
        parameters = [parameter for module in modules for parameter in module.parameters()]
        self.optimizer = torch.optim.AdamW(
            parameters, lr=recipe.lr, weight_decay=recipe.weight_decay, fused=True
        )
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, recipe.num_steps)

    def step(self, loss: Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.schedule.step()


class _Reached(Exception):  # noqa: N818
    """Ends the teacher's pass behind the block."""

    def __init__(self, pair: Pair) -> None:
        super().__init__()
        self.pair = pair


def in_layout(module: nn.Module, layout: torch.memory_format) -> nn.Module:
    """Give a module's convolutions a layout, in place; values stay."""
    for parameter in module.parameters():
        if parameter.dim() == 4:
            parameter.data = laid_out(parameter.data, layout)
    return module


def laid_out(x_nchw: Tensor, layout: torch.memory_format) -> Tensor:
    """A copy in a layout, unlike ``contiguous`` also where one channel fits both layouts."""
    return torch.empty_like(x_nchw, memory_format=layout).copy_(x_nchw)
