"""What the block phase costs on this device: measured shortly before it is planned.

Every worker measures at the same time, so that what they take from each other (memory bandwidth,
clock rate, the disk) is in the figures. Equal structures are measured once.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict

from pbkd.activations import Capture, Suffixes
from pbkd.activations.resume import find_cuts
from pbkd.artifacts import digest_of
from pbkd.config import DistillConfig
from pbkd.data import Stream, load_prepared
from pbkd.devices import best_device, enough_memory
from pbkd.distill.timing import (
    DiskRates,
    StepCost,
    SuffixCost,
    best_capture_batch,
    measure_disk,
    score_costs,
    score_images,
    step_costs,
    teacher_times,
    warm_up,
)
from pbkd.distill.trainee import TraineeSpec
from pbkd.measure import free_memory, processor_name, usable_cores
from pbkd.models import Classifier, load_teacher, read_card

_CUT_IMAGES = 2  # one image would take other kernels
_MEETING_S = 20.0
_VERSION = 2
_USABLE = {"cpu": 0.6, "cuda": 0.35}
"""Share of the free memory that a plan gives away; on a GPU a cache takes another part."""
_NOISE = 1.1


class Profile(BaseModel):
    """What one worker measured, or the mean of several; times are seconds per image.

    Attributes:
        num_workers: that measured at the same time.
        speeds: of each of them, the mean being 1; differences under a tenth are taken for noise.
        memory_bytes: that one worker's trainees may take.
        setup_s: reading teacher and data, and finding the suffixes, in seconds per job.
        teacher_s: block to the teacher's time from the end of the block before to its end,
            rounding included, in batches of ``batch_size``.
        whole_teacher_s: to the logits, as a score runs it.
        suffixes: block to what its candidates' scores take beside them.
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
    suffixes: dict[str, SuffixCost] = {}
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
        named = {"loss", "optimizer", "batch_size", "mixed_precision"}
        return digest_of(
            {
                "version": _VERSION,
                "machine": [processor_name(), usable_cores(), torch.__version__],
                "workers": self.workers,
                "teacher": read_card(self.teacher).digest,
                "candidates": [[trainee.block, trainee.config] for trainee in self.trainees],
                "training": self.distill.model_dump(include=named),
                "dtype": self.dtype,
            }
        )


def run_profile(job: ProfileJob, index: int) -> Profile:
    """Measure as the worker number ``index`` of those that measure at the same time.

    Raises:
        TrainingError: the teacher's own pass does not fit into memory.
    """
    device, setup_s = best_device(), 0.0
    for _ in range(2):  # a worker does it once per job, the first time with cold caches
        start = time.perf_counter()
        teacher, card = load_teacher(job.teacher, allow_code=True)
        teacher.to(device)
        val = Stream(
            load_prepared(job.prepared).split("val"), seed=0, augment=card.augment, device=device
        )
        setup_s = time.perf_counter() - start
    _meet(job.meeting, index, len(job.workers))
    what = f"the costs of batches of {job.distill.batch_size} images"
    with enough_memory(what, "lower `distill.batch_size`"):
        return measure_profile(
            teacher,
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
    if num_workers == 1:
        return
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
    warm_up()
    started = time.perf_counter()
    specs = list(trainees)
    paths = tuple(dict.fromkeys(spec.block for spec in specs))
    images = val.plain(torch.arange(config.batch_size) % len(val))
    capture = Capture(teacher, paths, images, dtype)
    teacher_s = teacher_times(capture, images)
    largest = val.pass_size(2 * config.batch_size)
    capture_batch, gain = best_capture_batch(capture, images, largest)
    activations = capture(images)
    exact = Capture(teacher, paths, images[:_CUT_IMAGES], torch.float32)
    cuts = find_cuts(exact, images[:_CUT_IMAGES])
    start = time.perf_counter()
    suffixes = Suffixes(teacher, paths, images[:_CUT_IMAGES])
    setup_s += time.perf_counter() - start
    scored = score_images(val, images, teacher)
    whole_teacher_s, suffix_costs = score_costs(teacher, suffixes, scored)
    return Profile(
        device=str(images.device),
        threads=torch.get_num_threads(),
        num_workers=num_workers,
        memory_bytes=_usable_memory(images.device, num_workers),
        batch_size=config.batch_size,
        setup_s=setup_s,
        teacher_s=teacher_s,
        whole_teacher_s=whole_teacher_s,
        suffixes=suffix_costs,
        capture_batch=capture_batch,
        capture_gain=gain,
        cuts=cuts,
        trainees=step_costs(teacher, specs, config, activations),
        disk=measure_disk(folder),
        duration_s=time.perf_counter() - started,
    )


def _usable_memory(device: torch.device, num_workers: int) -> int:
    """Bytes for one worker's trainees; a GPU is one worker's alone, the machine is shared."""
    sharing = num_workers if device.type == "cpu" else 1
    return int(free_memory(device) * _USABLE[device.type] / sharing)


def merge_profiles(profiles: list[Profile]) -> Profile:
    """The mean of what several workers measured at the same time."""
    first = profiles[0]

    def mean(get: Callable[[Profile], float]) -> float:
        return statistics.fmean(get(profile) for profile in profiles)

    def trainee(name: str) -> StepCost:
        steps = [profile.trainees[name].step_s for profile in profiles]
        fitting = [step for step in steps if step is not None]
        return StepCost(
            fixed_s=mean(lambda p: p.trainees[name].fixed_s),
            step_s=statistics.fmean(fitting) if len(fitting) == len(steps) else None,
            eval_s=mean(lambda p: p.trainees[name].eval_s),
            held_bytes=max(p.trainees[name].held_bytes for p in profiles),
            step_bytes=max(p.trainees[name].step_bytes for p in profiles),
        )

    def suffix(path: str) -> SuffixCost:
        return SuffixCost(
            before_s=mean(lambda p: p.suffixes[path].before_s),
            suffix_s=mean(lambda p: p.suffixes[path].suffix_s),
        )

    return first.model_copy(
        update={
            "speeds": _speeds(profiles),
            "memory_bytes": min(profile.memory_bytes for profile in profiles),
            "setup_s": mean(lambda p: p.setup_s),
            "teacher_s": {b: mean(lambda p, b=b: p.teacher_s[b]) for b in first.teacher_s},  # type: ignore[misc]
            "whole_teacher_s": mean(lambda p: p.whole_teacher_s),
            "suffixes": {path: suffix(path) for path in first.suffixes},
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
