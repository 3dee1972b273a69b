"""Short measurements on one device: the teacher's blocks, a candidate's step, the cache's disk.

Warm, synchronised, repeated; medians.
"""

from __future__ import annotations

import hashlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from pbkd.activations import Activation, Capture, Suffixes
from pbkd.activations.suffix import FROM_IMAGES
from pbkd.artifacts import FILE_HASH
from pbkd.blocks import build_candidate, init_candidate
from pbkd.config import DistillConfig
from pbkd.data import Stream
from pbkd.devices import is_out_of_memory
from pbkd.distill.score import SCORE_BATCH
from pbkd.distill.steps import WARM_STEPS, Steps
from pbkd.distill.trainee import Trainee, TraineeSpec
from pbkd.models import Classifier

_MIN_SAMPLES, _MAX_SAMPLES, _ENOUGH_S = 3, 9, 0.1
_DISK_SAMPLE_BYTES = 64 << 20
_WRITE_BYTES, _ROW_BYTES = 4 << 20, 64 << 10
_SLOW_PASS_S = 0.5
_OTHER_BYTES = 32 << 20  # more than a core's share of the processor's caches
_COPIES = 5  # weights, gradients, two moments, the best weights


class StepCost(BaseModel):
    """One candidate of one block.

    Attributes:
        fixed_s: building it, inheriting weights, what its first step and validation take above
            later ones, and writing it, in seconds.
        step_s: an optimizer step, in seconds per image; None: it does not fit into memory.
        eval_s: a validation batch, in seconds per image.
        held_bytes: while it trains: weights, optimizer, best weights, one batch's activations.
        step_bytes: on top of that, during one step: co-trained trainees step one by one.
    """

    model_config = ConfigDict(frozen=True)

    fixed_s: float
    step_s: float | None
    eval_s: float
    held_bytes: int
    step_bytes: int


class SuffixCost(BaseModel):
    """What the score of one block's candidates takes beside them, in seconds per image.

    Attributes:
        before_s: the teacher from the images to the start of the block's suffix.
        suffix_s: from there to the logits, without the block itself.
    """

    model_config = ConfigDict(frozen=True)

    before_s: float
    suffix_s: float


class DiskRates(BaseModel):
    """Bytes per second where the cache lies: writing with checksums, checking, reading again."""

    model_config = ConfigDict(frozen=True)

    write: float
    verify: float
    read: float


def warm_up() -> None:
    """The first optimizer of a process imports seconds of torch: no job's time, and no plan's."""
    torch.optim.AdamW([torch.zeros(1, requires_grad=True)])


def measure_disk(folder: Path) -> DiskRates:
    """Bytes per second of a cache in this folder, on a sample that the page cache holds."""
    sample = torch.rand(_DISK_SAMPLE_BYTES // 4).numpy().data.cast("B")  # not in any cache
    steps = range(0, _DISK_SAMPLE_BYTES, _WRITE_BYTES)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:  # without a name: a kill leaves nothing
        digest = hashlib.new(FILE_HASH)
        start = time.perf_counter()
        for offset in steps:
            piece = sample[offset : offset + _WRITE_BYTES]
            file.write(piece)
            digest.update(piece)
        file.flush()
        wrote = time.perf_counter()
        file.seek(0)
        for _ in steps:
            digest.update(file.read(_WRITE_BYTES))
        verified = time.perf_counter()
        for offset in range(0, _DISK_SAMPLE_BYTES, _ROW_BYTES):
            os.preadv(file.fileno(), [bytearray(_ROW_BYTES)], offset)
        read = time.perf_counter()
    return DiskRates(
        write=_DISK_SAMPLE_BYTES / (wrote - start),
        verify=_DISK_SAMPLE_BYTES / (verified - wrote),
        read=_DISK_SAMPLE_BYTES / (read - verified),
    )


def teacher_times(capture: Capture, images_nchw: Tensor) -> dict[str, float]:
    """Block to seconds per image, from the end of the block before to its end, with rounding."""
    capture(images_nchw)
    samples = [_times_of_a_pass(capture, images_nchw) for _ in range(_MIN_SAMPLES)]
    return {
        path: statistics.median(sample[path] for sample in samples) / len(images_nchw)
        for path in capture.paths
    }


def _times_of_a_pass(capture: Capture, images_nchw: Tensor) -> dict[str, float]:
    marks: dict[str, float] = {}

    def mark(path: str) -> None:
        _synchronise(images_nchw.device)
        marks[path] = time.perf_counter()

    with ExitStack() as hooks:
        for path in capture.paths:
            module = capture.net.get_submodule(path)
            hook = module.register_forward_hook(lambda *_, path=path: mark(path))
            hooks.callback(hook.remove)
        start = time.perf_counter()
        capture(images_nchw)
        mark(capture.paths[-1])
    times, before = {}, start
    for path in capture.paths:
        times[path] = max(0.0, marks[path] - before)
        before = marks[path]
    return times


def best_capture_batch(capture: Capture, images_nchw: Tensor, largest: int) -> tuple[int, float]:
    """Images per pass at which the teacher is fastest, and its time over that of the batch.

    Args:
        largest: images of a pass on a CPU, unless the batch is larger; a GPU says what it holds.
    """
    num = len(images_nchw)
    times = {}
    is_cpu = images_nchw.device.type == "cpu"
    for factor in (1, 2) if is_cpu else (1, 2, 4, 8):
        if is_cpu and factor > 1 and factor * num > largest:
            break
        batch = images_nchw.repeat(factor, 1, 1, 1)
        try:
            times[factor] = _seconds(lambda b=batch: capture(b), batch.device) / len(batch)  # type: ignore[misc]
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            break
    best = min(times, key=times.__getitem__)
    return best * num, times[best] / times[1]


def step_costs(
    teacher: Classifier,
    specs: Iterable[TraineeSpec],
    config: DistillConfig,
    activations: dict[str, Activation],
) -> dict[str, StepCost]:
    """Trainee's name to its cost; equal structures are measured once."""
    known: dict[tuple[object, ...], StepCost] = {}
    costs = {}
    for spec in specs:
        block = teacher.net.get_submodule(spec.block)
        activation = activations[spec.block]
        structure = (spec.config, repr(block), activation.input.shape)
        if structure not in known:
            known[structure] = _step_cost(spec, block, config, activation)
        costs[spec.name] = known[structure]
    return costs


def _step_cost(
    spec: TraineeSpec, block: nn.Module, config: DistillConfig, activation: Activation
) -> StepCost:
    device, num = activation.input.device, len(activation.input)
    start = time.perf_counter()
    module = build_candidate(spec.config, block).to(device)
    init_candidate(spec.config, module, block, activation.input.float())
    module.requires_grad_(True)
    batch_bytes = activation.input.nbytes + activation.output.nbytes
    held_bytes = batch_bytes * (2 if activation.input.is_cuda else 1)  # a recorded step's own
    held_bytes += _COPIES * sum(parameter.nbytes for parameter in module.parameters())
    eval_s, step_s, step_bytes = 0.0, None, 0
    with tempfile.TemporaryDirectory() as folder:
        trainee = Trainee(spec, module, config, 1000, Path(folder) / "history.jsonl")
        fixed_s = time.perf_counter() - start
        try:
            first_s = _first_s(trainee, activation)
            eval_s = _seconds(lambda: trainee.batch_loss(activation), device, cold=True) / num
            step_bytes = _bytes_of_a_step(trainee, activation)
            step_s = _seconds(_step_of_a_job(trainee, activation), device, cold=True) / num
            fixed_s += max(0.0, first_s - (eval_s + step_s) * num)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        start = time.perf_counter()
        trainee.write(Path(folder))
        fixed_s += time.perf_counter() - start
    return StepCost(
        fixed_s=fixed_s, step_s=step_s, eval_s=eval_s, held_bytes=held_bytes, step_bytes=step_bytes
    )


def _step_of_a_job(trainee: Trainee, activation: Activation) -> Callable[[], None]:
    """A step as a job takes it; on a GPU the next one is recorded, and those after it replayed."""
    steps = Steps()

    def take() -> None:
        steps([trainee], {trainee.spec.block: activation})

    for _ in range(WARM_STEPS if activation.input.is_cuda else 0):
        take()
    return take


def _first_s(trainee: Trainee, activation: Activation) -> float:
    """Seconds of the first validation and the first step, which prepare their kernels."""
    start = time.perf_counter()
    trainee.batch_loss(activation)
    trainee.step(activation)
    _synchronise(activation.input.device)
    return time.perf_counter() - start


def _bytes_of_a_step(trainee: Trainee, activation: Activation) -> int:
    """What one step allocates: measured on a GPU, else float32 copies and what autograd keeps."""
    if activation.input.device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        trainee.step(activation)
        return torch.cuda.max_memory_allocated() - before
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        trainee.step(activation)
    return 4 * (activation.input.numel() + activation.output.numel()) + sum(kept.values())


def _seconds(function: Callable[[], object], device: torch.device, *, cold: bool = False) -> float:
    """Median time of a call after a warm one; few samples of what is slow, more of what is fast.

    Args:
        cold: with other data in the processor's caches before each call, as other trainees and the
            next batch leave them.
    """
    function()
    other = torch.zeros(_OTHER_BYTES if cold and device.type == "cpu" else 0, dtype=torch.uint8)
    samples: list[float] = []
    while len(samples) < _MIN_SAMPLES or (len(samples) < _MAX_SAMPLES and sum(samples) < _ENOUGH_S):
        other.add_(1)
        _synchronise(device)
        start = time.perf_counter()
        function()
        _synchronise(device)
        samples.append(time.perf_counter() - start)
    return statistics.median(samples)


def score_images(val: Stream, images_nchw: Tensor, teacher: Classifier) -> Tensor:
    """A batch as a score runs it, or the given one where the teacher takes seconds for that."""
    size = val.pass_size(SCORE_BATCH)
    more = -(-size // len(images_nchw))
    with torch.no_grad():
        time_s = _seconds(lambda: teacher(images_nchw), images_nchw.device)
    if more <= 1 or time_s * more > _SLOW_PASS_S:
        return images_nchw
    return val.plain(torch.arange(size) % len(val))


def score_costs(
    teacher: Classifier, suffixes: Suffixes, images_nchw: Tensor
) -> tuple[float, dict[str, SuffixCost]]:
    """Seconds per image of the whole teacher, and what the score of each block takes beside it."""
    passes = [_marks_of_a_pass(teacher, suffixes, images_nchw) for _ in range(1 + _MIN_SAMPLES)]
    passes = passes[1:]  # the first one prepares the kernels

    def cost(path: str, start: str) -> SuffixCost:
        before_s = 0.0
        if start != FROM_IMAGES:
            before_s = statistics.median(at[start][0] - at[FROM_IMAGES][0] for at in passes)
        block_s = statistics.median(at[path][1] - at[path][0] for at in passes)
        after_s = max(0.0, whole_s - before_s - block_s)
        return SuffixCost(before_s=before_s / num, suffix_s=after_s / num)

    num = len(images_nchw)
    whole_s = statistics.median(at[FROM_IMAGES][1] - at[FROM_IMAGES][0] for at in passes)
    return whole_s / num, {path: cost(path, start) for path, start in suffixes.starts.items()}


_Marks = dict[str, list[float]]
"""Module to the times at which its first call began and its last one ended; FROM_IMAGES: all."""


@torch.no_grad()
def _marks_of_a_pass(teacher: Classifier, suffixes: Suffixes, images_nchw: Tensor) -> _Marks:
    marks: _Marks = {}

    def begin(path: str) -> None:
        _synchronise(images_nchw.device)
        marks.setdefault(path, [time.perf_counter()] * 2)

    def end(path: str) -> None:
        _synchronise(images_nchw.device)
        marks[path][1] = time.perf_counter()

    with ExitStack() as hooks:
        for path in {*suffixes.starts, *suffixes.starts.values()} - {FROM_IMAGES}:
            module = teacher.net.get_submodule(path)
            before = module.register_forward_pre_hook(lambda *_, path=path: begin(path))
            after = module.register_forward_hook(lambda *_, path=path: end(path))
            hooks.callback(before.remove)
            hooks.callback(after.remove)
        begin(FROM_IMAGES)
        teacher(images_nchw)
        end(FROM_IMAGES)
    return marks


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
