"""Latency of every option of every block, measured once per machine: for limits on latency.

A block alone finds its weights in the processor's caches, a block of a network may not: measured
alone, the convolutions of a VGG-16 seem to take two thirds of their time in it. So options are
timed where they will stand. A whole network runs with the first option in every block, then one
with the second in every block, and so on; a block's time goes from its own start to the next
block's start, with what lies between (norms, activations), and so the times of a pass add up to the
pass. In the end all are scaled by one factor, the teacher's plain time over the sum of its parts:
it takes out the clock's own costs and, on a GPU, those of waiting for each block.

Predicted latency is that of the teacher, less its own blocks', plus the chosen options'.
"""

from __future__ import annotations

import copy
import logging
import shutil
import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from pbkd.artifacts import Workspace, digest_of, read_json, write_json
from pbkd.blocks import Discovery, build_candidate, swap, swapped
from pbkd.config import StitchConfig
from pbkd.devices import in_channels_last
from pbkd.measure import eval_mode, measure_interleaved, this_machine, usable_cores
from pbkd.models import Classifier, ModelCard

_log = logging.getLogger(__name__)

OWN = ""
"""Stands for the teacher's own module among a block's options."""

_TURN_S = 0.03
_SECONDS_PER_NETWORK = 0.4
_MAX_S = 120.0
_MIN_CALLS = 5


class LatencyTable(BaseModel):
    """Milliseconds per batch, on one machine.

    Attributes:
        device: as torch names it.
        teacher_ms: of the whole teacher.
        rest_ms: of it before its first block; with the blocks' own times it adds up to the teacher.
        blocks: block path, then candidate (``OWN``: the teacher's module) to its time in place.
    """

    model_config = ConfigDict(frozen=True)

    machine_id: str
    device: str
    batch_size: int
    threads: int
    teacher_ms: float
    rest_ms: float
    blocks: dict[str, dict[str, float]]


@dataclass(frozen=True)
class LatencyMeter:
    """Measures one teacher and its candidates on the teacher's device, or reads what is kept.

    Figures are kept in the state folder by machine and by a digest of structure, shapes and
    settings; weights do not count.
    """

    workspace: Workspace
    teacher: Classifier
    card: ModelCard
    discovery: Discovery
    config: StitchConfig

    def table(self) -> LatencyTable:
        """Of every option of every block."""
        path = _kept(self.workspace) / f"{self._key}.json"
        if not path.is_file():
            _log.info("measuring the latency of every candidate of each block")
            write_json(path, self._measured())
        return LatencyTable.model_validate(read_json(path))

    def whole(self, students: Mapping[str, Mapping[str, str]]) -> dict[str, float]:
        """Milliseconds of whole students and of the ``teacher``, measured in one run.

        Args:
            students: name, then block path to the candidate that stands there.
        """
        key = digest_of({"table": self._key, "students": list(students.values())})
        path = _kept(self.workspace) / f"whole-{key}.json"
        if not path.is_file():
            write_json(path, self._measured_whole(list(students.values())))
        kept = read_json(path)
        return dict(zip(["teacher", *students], kept, strict=True))

    @property
    def _key(self) -> str:
        return digest_of(
            {
                "network": self.card.network,
                "image_size": self.card.image_size,
                "blocks": self.discovery.blocks,
                "batch_size": self.config.latency_batch_size,
                "threads": self._threads,
                "device": str(self._device),
            }
        )

    @property
    def _threads(self) -> int:
        return self.config.latency_threads or usable_cores()

    @property
    def _device(self) -> torch.device:
        return next(self.teacher.parameters()).device

    @property
    def _images(self) -> Tensor:
        """(B, C, H, W) noise in [0, 1], as a stream's batches lie in memory."""
        shape = (self.config.latency_batch_size, self.card.network.in_channels)
        generator = torch.Generator().manual_seed(0)
        noise = torch.rand(*shape, *self.card.image_size, generator=generator)
        return in_channels_last(noise.to(self._device))

    def _measured(self) -> LatencyTable:
        passes = _Passes(self.teacher, self._options(), self._images)
        with torch.inference_mode(), eval_mode(self.teacher), _torch_threads(self._threads):
            passes.run()
        return LatencyTable(
            machine_id=this_machine().machine_id,
            device=str(self._device),
            batch_size=self.config.latency_batch_size,
            threads=self._threads,
            **passes.summary(),
        )

    def _measured_whole(self, students: list[Mapping[str, str]]) -> list[float]:
        models: dict[str, nn.Module] = {"teacher": self.teacher}
        options = self._options()
        for index, chosen in enumerate(students):
            student = copy.deepcopy(self.teacher)
            modules = {path: copy.deepcopy(options[path][name]) for path, name in chosen.items()}
            swap(student.net, modules)
            models[f"student {index}"] = student
        found = measure_interleaved(
            models,
            self._images,
            batch_size=self.config.latency_batch_size,
            threads=self._threads,
            min_duration_s=_SECONDS_PER_NETWORK * len(models),
            max_duration_s=_MAX_S,
        )
        return [latency.median_ms for latency in found.values()]

    def _options(self) -> dict[str, dict[str, nn.Module]]:
        """Block path to its options by name, untrained: weights take no time."""
        options: dict[str, dict[str, nn.Module]] = {}
        with torch.random.fork_rng(devices=[]):
            for block in self.discovery.blocks:
                own = self.teacher.net.get_submodule(block.path)
                options[block.path] = {OWN: own}
                for candidate in block.candidates:
                    module = build_candidate(candidate.config, own).to(self._device).eval()
                    options[block.path][candidate.name] = module
        return options


def forget_latencies(workspace: Workspace) -> None:
    """Let the next selection measure anew."""
    shutil.rmtree(workspace.state / "latency", ignore_errors=True)


def _kept(workspace: Workspace) -> Path:
    return workspace.state / "latency" / this_machine().machine_id


@contextmanager
def _torch_threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# ---------------------------------------------------------------- passes


@dataclass
class _Passes:
    """Timed passes of the teacher, plain and with options in all its blocks at a time."""

    teacher: Classifier
    options: dict[str, dict[str, nn.Module]]
    images_nchw: Tensor
    plain_s: list[float] = field(default_factory=list)
    before_s: list[float] = field(default_factory=list)
    block_s: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    _marks: list[tuple[str, float]] = field(default_factory=list)

    def run(self) -> None:
        """Networks take turns until each had its time; the first turns warm up."""
        turns = range(-1, max(len(names) for names in self.options.values()))
        for turn in turns:
            self._turn(turn)
        for times in (self.plain_s, self.before_s, *self.block_s.values()):
            times.clear()
        begin_s = time.perf_counter()
        order = list(turns)
        while True:
            for turn in order:
                self._turn(turn)
            order.reverse()  # so that no network always follows the same one
            spent_s = time.perf_counter() - begin_s
            enough = spent_s >= _SECONDS_PER_NETWORK * len(order)
            if (enough and len(self.plain_s) >= _MIN_CALLS) or spent_s >= _MAX_S:
                return

    def summary(self) -> dict[str, object]:
        """The fields of a table that were measured, from medians, scaled to the plain teacher."""
        median_ms = {name: 1e3 * statistics.median(times) for name, times in self.block_s.items()}
        before_ms = 1e3 * statistics.median(self.before_s)
        teacher_ms = 1e3 * statistics.median(self.plain_s)
        parts_ms = before_ms + sum(median_ms[path, OWN] for path in self.options)
        factor = teacher_ms / parts_ms
        return {
            "teacher_ms": teacher_ms,
            "rest_ms": factor * before_ms,
            "blocks": {
                path: {name: factor * median_ms[path, name] for name in names}
                for path, names in self.options.items()
            },
        }

    def _turn(self, turn: int) -> None:
        """Some passes of one network: -1 the plain teacher, else option ``turn`` everywhere."""
        if turn == -1:
            self.plain_s += self._timed_calls()
            return
        names = {path: list(own)[turn % len(own)] for path, own in self.options.items()}
        modules = {path: self.options[path][name] for path, name in names.items()}
        with ExitStack() as stack:
            stack.enter_context(swapped(self.teacher.net, modules))
            for path, module in modules.items():
                hook = module.register_forward_pre_hook(lambda *_, path=path: self._mark(path))
                stack.callback(hook.remove)
            self._timed_calls(names)

    def _timed_calls(self, names: Mapping[str, str] | None = None) -> list[float]:
        """Seconds of whole passes; those of blocks go on record. The first call is left out."""
        durations_s: list[float] = []
        begin_s = time.perf_counter()
        self.teacher(self.images_nchw)
        while not durations_s or time.perf_counter() - begin_s < _TURN_S:
            self._marks.clear()
            start_s = self._now_s()
            self.teacher(self.images_nchw)
            end_s = self._now_s()
            durations_s.append(end_s - start_s)
            if names is not None:
                self._record(names, start_s, end_s)
        return durations_s

    def _record(self, names: Mapping[str, str], start_s: float, end_s: float) -> None:
        paths, starts_s = zip(*self._marks, strict=True)
        if names[paths[0]] == OWN:
            self.before_s.append(starts_s[0] - start_s)
        for path, begin_s, until_s in zip(paths, starts_s, (*starts_s[1:], end_s), strict=True):
            self.block_s.setdefault((path, names[path]), []).append(until_s - begin_s)

    def _mark(self, path: str) -> None:
        self._marks.append((path, self._now_s()))

    def _now_s(self) -> float:
        if self.images_nchw.is_cuda:
            torch.cuda.synchronize(self.images_nchw.device)
        return time.perf_counter()
