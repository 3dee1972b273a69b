"""What the block phase costs on this device: measured shortly before it is planned.

Every worker measures at the same time, so that what they take from each other (memory bandwidth,
clock rate, the disk) is in the figures. Equal structures are measured once.
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

from pbkd.activations import Activation, Capture
from pbkd.activations.resume import find_cuts
from pbkd.artifacts import FILE_HASH, digest_of
from pbkd.blocks import build_candidate, init_candidate
from pbkd.config import DistillConfig
from pbkd.data import Stream, load_prepared
from pbkd.devices import best_device, is_out_of_memory
from pbkd.distill.trainee import ALGORITHM, Trainee, TraineeSpec
from pbkd.measure import processor_name, usable_cores
from pbkd.models import Classifier, load_teacher, read_card

_MIN_SAMPLES, _MAX_SAMPLES, _ENOUGH_S = 3, 9, 0.1
_DISK_SAMPLE_BYTES = 64 << 20
_ROW_BYTES = 64 << 10
_CUT_IMAGES = 2  # one image would take other kernels
_MEETING_S = 20.0
_USABLE = 0.6  # share of the free memory that a plan gives away
_NOISE = 1.1
_ADAM_STATE = 4  # weights, gradients and two moments


class StepCost(BaseModel):
    """One candidate of one block.

    Attributes:
        init_s: building it and inheriting weights, in seconds.
        step_s: an optimizer step, in seconds per image; None: it does not fit into memory.
        eval_s: a validation batch, in seconds per image.
        memory_bytes: weights, optimizer, activations and what autograd keeps, for one batch.
    """

    model_config = ConfigDict(frozen=True)

    init_s: float
    step_s: float | None
    eval_s: float
    memory_bytes: int


class DiskRates(BaseModel):
    """Bytes per second where the cache lies: writing with checksums, checking, reading again."""

    model_config = ConfigDict(frozen=True)

    write: float
    verify: float
    read: float


class Profile(BaseModel):
    """What one worker measured, or the mean of several; times are seconds per image.

    Attributes:
        num_workers: that measured at the same time.
        speeds: of each of them, the mean being 1; differences under a tenth are taken for noise.
        memory_bytes: that one worker's trainees may take.
        setup_s: reading teacher and data and finding what is overwritten, in seconds per job.
        teacher_s: block to the teacher's time from the end of the block before to its end,
            rounding included, in batches of ``batch_size``.
        whole_teacher_s: to the logits.
        capture_batch: images per pass at which the teacher was fastest.
        capture_gain: its time there over that at ``batch_size``.
        cuts: block to the module from whose input alone the teacher can go on.
        trainees: by name.
        duration_s: what measuring took, in seconds.
    """

    model_config = ConfigDict(frozen=True)

    device: str
    threads: int
    num_workers: int
    speeds: tuple[float, ...] = (1.0,)
    memory_bytes: int
    batch_size: int
    setup_s: float
    teacher_s: dict[str, float]
    whole_teacher_s: float
    capture_batch: int
    capture_gain: float
    cuts: dict[str, str]
    trainees: dict[str, StepCost]
    disk: DiskRates
    duration_s: float


class ProfileJob(BaseModel):
    """What a worker measures, as plain values; paths are absolute, of the stages' outputs.

    Attributes:
        trainees: all of them, in the order of the network.
        workers: the places that measure at the same time, described well enough to tell them from
            those of another machine.
        folder: where the cache will lie.
        meeting: a folder in which the workers wait for each other.
    """

    model_config = ConfigDict(frozen=True)

    trainees: tuple[TraineeSpec, ...]
    distill: DistillConfig
    dtype: str
    teacher: Path
    prepared: Path
    workers: tuple[str, ...]
    folder: Path
    meeting: Path

    @property
    def key(self) -> str:
        """Under which the profile is kept."""
        training = self.distill.model_dump(include={"loss", "optimizer", "batch_size"})
        return digest_of(
            {
                "algorithm": ALGORITHM,
                "machine": [processor_name(), usable_cores(), torch.__version__],
                "workers": self.workers,
                "teacher": read_card(self.teacher).digest,
                "candidates": [[trainee.block, trainee.config] for trainee in self.trainees],
                "training": training,
                "dtype": self.dtype,
            }
        )


def run_profile(job: ProfileJob, index: int) -> Profile:
    """Measure as the worker number ``index`` of those that measure at the same time."""
    start = time.perf_counter()
    device = best_device()
    teacher, card = load_teacher(job.teacher, allow_code=True)
    val = Stream(
        load_prepared(job.prepared).split("val"), seed=0, augment=card.augment, device=device
    )
    setup_s = time.perf_counter() - start
    _meet(job.meeting, index, len(job.workers))
    return measure_profile(
        teacher.to(device),
        job.trainees,
        job.distill,
        getattr(torch, job.dtype),
        val,
        job.folder,
        setup_s=setup_s,
        num_workers=len(job.workers),
    )


def _meet(folder: Path, index: int, num_workers: int) -> None:
    """Wait until all are here, but not for ever: one may have died."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / str(index)).touch()
    deadline = time.monotonic() + _MEETING_S
    while len(list(folder.iterdir())) < num_workers and time.monotonic() < deadline:
        time.sleep(0.01)


def measure_profile(
    teacher: Classifier,
    trainees: Iterable[TraineeSpec],
    config: DistillConfig,
    dtype: torch.dtype,
    val: Stream,
    folder: Path,
    *,
    setup_s: float,
    num_workers: int = 1,
) -> Profile:
    """Measure on the device of ``val``, where the teacher is.

    Args:
        trainees: all of them, in the order of the network.
        dtype: that of the activations.
        val: the images that are used; one batch of them.
        folder: where the cache will lie.
        setup_s: what reading teacher and data took.
    """
    started = time.perf_counter()
    specs = list(trainees)
    paths = tuple(dict.fromkeys(spec.block for spec in specs))
    images = val.plain(torch.arange(config.batch_size) % len(val))
    capture = Capture(teacher, paths, images, dtype)
    setup_s += time.perf_counter() - started
    teacher_s = _teacher_times(capture, images)
    capture_batch, gain = _best_capture_batch(capture, images)
    activations = capture(images)
    exact = Capture(teacher, paths, images[:_CUT_IMAGES], torch.float32)
    return Profile(
        device=str(images.device),
        threads=torch.get_num_threads(),
        num_workers=num_workers,
        memory_bytes=int(_free_memory(images.device) * _USABLE / num_workers),
        batch_size=config.batch_size,
        setup_s=setup_s,
        teacher_s=teacher_s,
        whole_teacher_s=_seconds(lambda: _forward(teacher, images), images.device) / len(images),
        capture_batch=capture_batch,
        capture_gain=gain,
        cuts=find_cuts(exact, images[:_CUT_IMAGES]),
        trainees=_step_costs(teacher, specs, config, activations),
        disk=measure_disk(folder),
        duration_s=time.perf_counter() - started,
    )


def merge_profiles(profiles: list[Profile]) -> Profile:
    """The mean of what several workers measured at the same time."""
    first = profiles[0]

    def mean(get: Callable[[Profile], float]) -> float:
        return statistics.fmean(get(profile) for profile in profiles)

    def trainee(name: str) -> StepCost:
        steps = [profile.trainees[name].step_s for profile in profiles]
        fitting = [step for step in steps if step is not None]
        return StepCost(
            init_s=mean(lambda p: p.trainees[name].init_s),
            step_s=statistics.fmean(fitting) if len(fitting) == len(steps) else None,
            eval_s=mean(lambda p: p.trainees[name].eval_s),
            memory_bytes=max(p.trainees[name].memory_bytes for p in profiles),
        )

    return first.model_copy(
        update={
            "speeds": _speeds(profiles),
            "memory_bytes": min(profile.memory_bytes for profile in profiles),
            "setup_s": mean(lambda p: p.setup_s),
            "teacher_s": {b: mean(lambda p, b=b: p.teacher_s[b]) for b in first.teacher_s},  # type: ignore[misc]
            "whole_teacher_s": mean(lambda p: p.whole_teacher_s),
            "trainees": {name: trainee(name) for name in first.trainees},
            "disk": DiskRates(
                write=mean(lambda p: p.disk.write),
                verify=mean(lambda p: p.disk.verify),
                read=mean(lambda p: p.disk.read),
            ),
            "duration_s": max(profile.duration_s for profile in profiles),
        }
    )


def _speeds(profiles: list[Profile]) -> tuple[float, ...]:
    times = [
        sum(profile.teacher_s.values()) + sum(t.step_s or 0.0 for t in profile.trainees.values())
        for profile in profiles
    ]
    if max(times) < _NOISE * min(times):
        return (1.0,) * len(profiles)
    mean = statistics.fmean(times)
    return tuple(mean / time_s for time_s in times)


def measure_disk(folder: Path) -> DiskRates:
    """Bytes per second of a cache in this folder, on a sample that the page cache holds."""
    block = os.urandom(1 << 20)
    num_blocks = _DISK_SAMPLE_BYTES // len(block)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder, prefix="profile-", suffix=".tmp") as file:
        digest = hashlib.new(FILE_HASH)
        start = time.perf_counter()
        for _ in range(num_blocks):
            file.write(block)
            digest.update(block)
        file.flush()
        wrote = time.perf_counter()
        file.seek(0)
        for _ in range(num_blocks):
            digest.update(file.read(len(block)))
        verified = time.perf_counter()
        row = bytearray(_ROW_BYTES)
        for offset in range(0, _DISK_SAMPLE_BYTES, _ROW_BYTES):
            os.preadv(file.fileno(), [row], offset)
        read = time.perf_counter()
    size = float(_DISK_SAMPLE_BYTES)
    return DiskRates(
        write=size / (wrote - start),
        verify=size / (verified - wrote),
        read=size / (read - verified),
    )


def _teacher_times(capture: Capture, images_nchw: Tensor) -> dict[str, float]:
    """Block to seconds per image; rounding is shared out by the blocks' sizes."""
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
        activations = capture(images_nchw)
        _synchronise(images_nchw.device)
        end = time.perf_counter()
    sizes = {path: a.input.numel() + a.output.numel() for path, a in activations.items()}
    rounding = (end - max(marks.values())) / sum(sizes.values())
    times, before = {}, start
    for path in capture.paths:
        times[path] = max(0.0, marks[path] - before) + rounding * sizes[path]
        before = marks[path]
    return times


def _best_capture_batch(capture: Capture, images_nchw: Tensor) -> tuple[int, float]:
    """Images per pass at which the teacher is fastest, and its time over that of the batch."""
    num = len(images_nchw)
    times = {}
    for factor in (1, 2) if images_nchw.device.type == "cpu" else (1, 2, 4, 8):
        batch = images_nchw.repeat(factor, 1, 1, 1)
        try:
            times[factor] = _seconds(lambda b=batch: capture(b), batch.device) / len(batch)  # type: ignore[misc]
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            break
    best = min(times, key=times.__getitem__)
    return best * num, times[best] / times[1]


def _step_costs(
    teacher: Classifier,
    specs: list[TraineeSpec],
    config: DistillConfig,
    activations: dict[str, Activation],
) -> dict[str, StepCost]:
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
    init_s = time.perf_counter() - start
    module.requires_grad_(True)
    size = sum(p.numel() * p.element_size() for p in module.parameters()) * _ADAM_STATE
    with tempfile.TemporaryDirectory() as folder:
        trainee = Trainee(spec, module, config, 1000, Path(folder) / "history.jsonl")
        eval_s = _seconds(lambda: trainee.batch_loss(activation), device) / num
        try:
            kept = _bytes_of_a_step(trainee, activation)
            step_s: float | None = _seconds(lambda: trainee.step(activation), device) / num
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            kept, step_s = 0, None
    return StepCost(init_s=init_s, step_s=step_s, eval_s=eval_s, memory_bytes=size + kept)


def _bytes_of_a_step(trainee: Trainee, activation: Activation) -> int:
    """The activations, and what one step allocates: measured on a GPU, else what autograd keeps."""
    pair = (activation.input, activation.output)
    given = sum(t.numel() * (t.element_size() + 4) for t in pair)  # as they come, and in float32
    if activation.input.device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        trainee.step(activation)
        return given + torch.cuda.max_memory_allocated() - before
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        trainee.step(activation)
    return given + sum(kept.values())


def _seconds(function: Callable[[], object], device: torch.device) -> float:
    """Median time of a call after a warm one; few samples of what is slow, more of what is fast."""
    function()
    samples: list[float] = []
    while len(samples) < _MIN_SAMPLES or (len(samples) < _MAX_SAMPLES and sum(samples) < _ENOUGH_S):
        _synchronise(device)
        start = time.perf_counter()
        function()
        _synchronise(device)
        samples.append(time.perf_counter() - start)
    return statistics.median(samples)


@torch.no_grad()
def _forward(teacher: Classifier, images_nchw: Tensor) -> Tensor:
    return teacher(images_nchw)  # type: ignore[no-any-return]


def _free_memory(device: torch.device) -> int:
    """Bytes that programs can still take."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
