"""`prune_channels`: whole channels go, and with them what their neighbours had for them.

All channels that can go are put into one order; how many of them do go follows from the limit.
"""

from __future__ import annotations

import copy
import logging
import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from pbkd.config import PruneChannelsStep, Resized, parse_limit
from pbkd.devices import channels_last
from pbkd.errors import PbkdError, ShrinkError
from pbkd.measure import count_macs, measure_interleaved
from pbkd.models import Classifier, ModelCard
from pbkd.seeding import make_generator
from pbkd.shrink.channel_groups import Removal, removable, remove
from pbkd.shrink.state import Shrunk
from pbkd.shrink.training import Trainer
from pbkd.students.edits import apply_edits, sizes_of

_log = logging.getLogger(__name__)

_LEAST_SHARE = 1 / 16
"""Of a layer's channels that stay where layers compete: none becomes a mere bottleneck."""
_PROBES = 8
"""Latencies that are measured at most."""
_PROBE_S = 0.4


def apply(shrunk: Shrunk, step: PruneChannelsStep, trainer: Trainer) -> Shrunk:
    """Take out the least important channels until the step's limit is met.

    Importance is the L2 norm of all that belongs to a channel, batch norm's scale included, over
    the mean of its group (arXiv 2301.12900).

    Returns:
        A student with one more edit, ``Resized``, of all layers whose sizes changed; the given one
        where it keeps to the limit already.

    Raises:
        MissingExtraError: torch-pruning is not installed.
        ShrinkError: the graph of the network cannot be traced, or is not understood; or the limit
            is not met with the fewest channels.
        TrainingError: a batch does not fit into memory.
    """
    student = copy.deepcopy(shrunk.model).cpu().eval()
    example = torch.rand(
        (2, shrunk.card.network.in_channels, *shrunk.card.image_size),
        generator=make_generator(0, "prune_channels"),
    )
    pruning = _Pruning(student, shrunk.card, example, step.scope)
    with pruning.explained():
        number = _num_removed(pruning, step)
    if not number:
        _log.info("prune_channels: %s keeps to the limit already", pruning.name)
        return shrunk
    model = pruning.pruned(number)
    edit = Resized(layers=pruning.changes(model))
    pruning.check(model, edit)
    _log.info("prune_channels: %d layers are narrower", len(edit.layers))
    if step.tune.epochs:
        trainer.fit(model, step.tune)
    card = shrunk.card.model_copy(update={"edits": (*shrunk.card.edits, edit)})
    return replace(shrunk, model=model.eval(), card=card)


# ---------------------------------------------------------------- how many


def _num_removed(pruning: _Pruning, step: PruneChannelsStep) -> int:
    """The least number of removals with which the limit is met; 0: it is met already."""
    if step.ratio is not None:
        number = pruning.number_of(step.ratio)
        if not number:
            raise ShrinkError(
                f"prune_channels of {pruning.name}: got ratio {step.ratio:g}, which is less than "
                "one channel; raise it, or leave the step out"
            )
        return number
    if step.max_macs is not None:
        return _within_macs(pruning, step.max_macs)
    assert step.max_latency is not None
    return _within_latency(pruning, step.max_latency)


def _within_macs(pruning: _Pruning, text: float | str) -> int:
    one = pruning.example[:1]
    own = count_macs(pruning.student, one)
    limit = parse_limit(text, "macs").of(own)

    def macs(number: int) -> float:
        return count_macs(pruning.pruned(number), one)

    if own <= limit:
        return 0
    _check_limit(pruning.name, "max_macs", own, macs(len(pruning.order)), limit)
    return _least(len(pruning.order), lambda number: macs(number) <= limit)


def _within_latency(pruning: _Pruning, text: float | str) -> int:
    """By bisection; each probe is measured in turns with the student, and compared with that."""
    limit = parse_limit(text, "latency")

    def latency(number: int) -> float:
        """As the limit is stated: a share of the student's, or milliseconds."""
        models = {"student": pruning.student, "pruned": pruning.pruned(number)}
        found = measure_interleaved(
            models, pruning.example, batch_size=1, threads=1, min_duration_s=_PROBE_S
        )
        pruned_ms, student_ms = found["pruned"].median_ms, found["student"].median_ms
        _log.info("prune_channels: %.3f ms, the student %.3f ms", pruned_ms, student_ms)
        return pruned_ms / student_ms if limit.is_share else pruned_ms

    own = 1.0 if limit.is_share else latency(0)
    if own <= limit.value:
        return 0
    name = "max_latency (share)" if limit.is_share else "max_latency (ms)"
    _check_limit(pruning.name, name, own, latency(len(pruning.order)), limit.value)
    coarseness = max(1, len(pruning.order) >> _PROBES)
    return _least(len(pruning.order), lambda number: latency(number) <= limit.value, coarseness)


def _check_limit(name: str, limit_name: str, own: float, least: float, limit: float) -> None:
    """Raise ShrinkError if not even the fewest channels keep to a limit."""
    if least > limit:
        raise ShrinkError(
            f"prune_channels of {name}: got {limit_name} {limit:.4g}, the fewest channels come to "
            f"{least:.4g} (now {own:.4g}); raise it, or take `low_rank` first"
        )


def _least(number: int, is_enough: Callable[[int], bool], coarseness: int = 1) -> int:
    """The least number, at most ``coarseness`` too high, that is enough; the given one is."""
    too_few, enough = 0, number
    while enough - too_few > coarseness:
        middle = (too_few + enough) // 2
        if is_enough(middle):
            enough = middle
        else:
            too_few = middle
    return enough


# ---------------------------------------------------------------- which


class _Pruning:
    """A student, and the order in which its channels go."""

    def __init__(self, student: Classifier, card: ModelCard, example: Tensor, scope: str) -> None:
        """
        Args:
            student: on the CPU, in evaluation mode; it is not changed.
            example: (2, C, H, W) in [0, 1].
        """
        self.student, self.name, self.example = student, card.network.name, example
        self.num_classes = card.network.num_classes
        self.sizes = sizes_of(student.net)
        self.num_channels = 0
        ranked: list[tuple[float, Removal]] = []
        with self.explained():
            for removals, importances in removable(copy.deepcopy(student), example):
                self.num_channels += sum(len(removal.channels) for removal in removals)
                least = math.ceil(len(removals) * _LEAST_SHARE) if scope == "global" else 1
                order = importances.argsort(stable=True).tolist()[: len(removals) - least]
                for rank, index in enumerate(order):
                    share = (rank + 1) / len(removals)
                    key = float(importances[index]) if scope == "global" else share
                    ranked.append((key, removals[index]))
        if not ranked:
            raise ShrinkError(
                f"prune_channels of {self.name}: no layer has channels that could go; leave the "
                "step out"
            )
        ranked.sort(key=lambda entry: entry[0])  # stable: of equal ones the earlier layer's
        self.shares = [key for key, _ in ranked] if scope == "layer" else None
        self.order = [removal for _, removal in ranked]

    def number_of(self, ratio: float) -> int:
        """How many removals take a share of the channels, of all or of each layer."""
        if self.shares is not None:
            return sum(share <= ratio + 1e-9 for share in self.shares)
        left, number = ratio * self.num_channels + 1e-9, 0
        for removal in self.order:
            left -= len(removal.channels)
            if left < 0:
                break
            number += 1
        return number

    def pruned(self, number: int) -> Classifier:
        """A copy without the channels of the first removals."""
        model = copy.deepcopy(self.student)
        gone: dict[str, list[int]] = defaultdict(list)
        for removal in self.order[:number]:
            gone[removal.group] += removal.channels
        with self.explained():
            remove(model, self.example, gone)
        for name, parameter in self.student.named_parameters():
            model.get_parameter(name).requires_grad_(parameter.requires_grad)
        channels_last(model.net)
        return model

    def changes(self, model: Classifier) -> dict[str, tuple[int, ...]]:
        """Path to sizes of all layers that are smaller than the student's."""
        return {
            path: sizes for path, sizes in sizes_of(model.net).items() if sizes != self.sizes[path]
        }

    def check(self, model: Classifier, edit: Resized) -> None:
        """Compare the model with one that is built by the edit: shapes, and logits bit for bit.

        Raises:
            ShrinkError: the graph was not understood.
        """
        rebuilt = copy.deepcopy(self.student)
        try:
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                apply_edits(rebuilt.net, (edit,))
                rebuilt.load_state_dict(model.state_dict())
                logits, again = model(self.example), rebuilt(self.example)
        except Exception as error:  # whatever a network raises that has other sizes
            raise self._not_understood(error) from error
        expected = (len(self.example), self.num_classes)
        if tuple(logits.shape) != expected:
            raise self._not_understood(f"logits of {tuple(logits.shape)}, expected {expected}")
        if not torch.equal(logits, again):
            raise self._not_understood("built again, it gives other logits")

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Whatever Torch-Pruning or the network raises, as ShrinkError; nothing is left behind."""
        try:
            with torch.enable_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield
        except PbkdError:
            raise
        except Exception as error:
            raise self._not_understood(error) from error

    def _not_understood(self, what: object) -> ShrinkError:
        text = f"{type(what).__name__}: {what}" if isinstance(what, Exception) else what
        return ShrinkError(
            f"prune_channels of {self.name}: its dependency graph cannot be traced, or comes out "
            f"wrong ({text}); take `low_rank` or `prune` for this student"
        )
