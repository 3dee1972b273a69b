"""The figures of a run as records: ``results/metrics.json`` and ``results/measured.json``.

``metrics.json`` is repeatable: equal inputs give equal numbers. ``measured.json`` holds what clocks
and counters say; what could not be measured is null.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from pbkd.artifacts import read_json
from pbkd.distill import Damage
from pbkd.errors import ArtifactError
from pbkd.measure import headline
from pbkd.shrink import StepFigures

METRICS = "metrics.json"
MEASURED = "measured.json"
MODELS = "models.json"
"""Teacher, students and baselines, a row each, for `dvc plots`."""
REPORT = "report.html"
REGISTERED = "registered.json"


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True)


class ModelFigures(_Record):
    """Figures of a teacher, or of a baseline.

    Attributes:
        val_accuracy, test_accuracy: 0 to 1.
        macs: multiply-accumulates of one image (1 MAC = 2 FLOPs).
        file_bytes: of the `.pbkd` file where the model was coded, else of the weights' safetensors
            file.
        num_nonzero: parameters that are not exactly 0; null in files of older versions.
    """

    val_accuracy: float
    test_accuracy: float
    num_parameters: int
    macs: int
    file_bytes: int
    num_nonzero: int | None = None

    @property
    def bits_per_weight(self) -> float:
        """Bits of the file per parameter, zeros counted."""
        return 8 * self.file_bytes / self.num_parameters

    @property
    def numbers(self) -> dict[str, float]:
        """The fields that are plain numbers, by name."""
        return {
            name: float(value)
            for name, value in self.model_dump().items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        }


class StudentFigures(ModelFigures):
    """Figures of a student; accuracies after each step are on the validation split.

    Attributes:
        limits: figure (parameters, macs, bytes, latency) to its limit; latency in milliseconds.
        predicted: sums over the chosen candidates: parameters, macs, bytes, latency_ms (null:
            not limited).
        stitched: parameters, macs and bytes of the stitched model, before anything shrank it.
        predicted_damage: sum of the chosen candidates' damage, nats.
        stitched_damage: KL(teacher || stitched student), nats; null where it is not finite.
        bytes_ratio: the teacher's file bytes over the student's.
        blocks_replaced, blocks_total: candidates in place, of the blocks that had one.
        steps: of `shrink`, the student as it came first; empty where its recipe is.
        is_coded: whether ``file_bytes`` is of a `.pbkd` file.
    """

    stitched_val_accuracy: float
    recalibrated_val_accuracy: float
    repaired_val_accuracy: float
    finetuned_val_accuracy: float
    limits: dict[str, float]
    predicted: dict[str, float | None]
    stitched: dict[str, float]
    predicted_damage: float
    stitched_damage: float | None
    bytes_ratio: float
    blocks_replaced: int
    blocks_total: int
    steps: tuple[StepFigures, ...] = ()
    is_coded: bool = False


BASELINES = {"scratch": "from scratch", "distill": "distilled whole"}
"""How the report calls the kinds of baselines."""


class Metrics(_Record):
    """``metrics.json``.

    Attributes:
        baselines: student, then kind (scratch, distill) to the figures of a baseline.
    """

    teacher: ModelFigures
    students: dict[str, StudentFigures]
    baselines: dict[str, dict[str, ModelFigures]] = {}

    @property
    def by_size(self) -> dict[str, StudentFigures]:
        """The students, largest file first."""
        ordered = sorted(self.students.items(), key=lambda item: (-item[1].file_bytes, item[0]))
        return dict(ordered)


def model_rows(metrics: Metrics) -> list[dict[str, str | float]]:
    """The models of ``metrics.json`` as rows; ``kind``: teacher, student, or that of a baseline."""
    models = [("teacher", "teacher", metrics.teacher)]
    models += [(name, "student", student) for name, student in metrics.by_size.items()]
    models += [
        (name, kind, model)
        for name, own in metrics.baselines.items()
        for kind, model in own.items()
    ]
    figures = ("val_accuracy", "test_accuracy", "num_parameters", "macs", "file_bytes")
    return [
        {"model": name, "kind": kind} | {figure: getattr(model, figure) for figure in figures}
        for name, kind, model in models
    ]


class LatencyFigures(_Record):
    """Milliseconds per batch: quartiles over ``repeats`` passes, models measured in turns.

    Attributes:
        threads: CPU threads within an operation.
        device: as torch names it, like ``cpu`` or ``cuda:0``.
        runtime: pytorch, onnxruntime or onnxruntime-int8.
    """

    median_ms: float
    p25_ms: float
    p75_ms: float
    repeats: int
    batch_size: int
    threads: int
    device: str
    runtime: str = "pytorch"


class ExportFigures(_Record):
    """A model's ONNX file, as one runtime runs it, against the model itself.

    Attributes:
        max_difference, max_logit: largest absolute difference of two logits, and the model's
            largest absolute logit, over ``num_images`` validation images.
        same_predictions: share of these images with the same answer, 0 to 1.
        val_accuracy, test_accuracy: 0 to 1; null for float32, whose answers are the model's.
    """

    file_bytes: int
    max_difference: float
    max_logit: float
    same_predictions: float
    num_images: int
    val_accuracy: float | None = None
    test_accuracy: float | None = None


class MachineFigures(_Record):
    """The machine on which the figures were taken; ``onnxruntime``: null where it was not used."""

    machine_id: str
    processor: str
    cores: int
    gpus: tuple[str, ...]
    python: str
    torch: str
    onnxruntime: str | None = None


class StageFigures(_Record):
    """A stage's last run here: seconds, and joules per counted device, idle included."""

    duration_s: float
    energy_j: dict[str, float | None]


class JobFigures(_Record):
    """One job of the block phase.

    Attributes:
        worker: name of the slot.
        trained: names of the trainees.
        started_s: seconds after the phase began.
        energy_j: joules of the job's device; null unless the job had it alone.
        predicted_s: the plan's duration; null in files of older versions.
    """

    job_id: str
    worker: str
    trained: tuple[str, ...]
    started_s: float
    duration_s: float
    energy_j: float | None
    predicted_s: float | None = None


class BlockPhase(_Record):
    """The last run in which blocks were trained.

    Attributes:
        jobs: in the order in which they ended.
        wall_s: from the first job's start to the last one's end, seconds.
        predicted_s: the plan's ``wall_s``, all epochs counted; null in files of older versions.
        jobs_s: all jobs' seconds on their workers, added up.
        score_s: of ``jobs_s``, what scoring the damages took; null in files of older versions.
        speedup: ``jobs_s / wall_s``.
        energy_j: of all counted devices over ``wall_s``; null where nothing could be read.
    """

    num_workers: int
    num_jobs: int
    wall_s: float
    jobs_s: float
    speedup: float
    energy_j: float | None
    predicted_s: float | None = None
    score_s: float | None = None
    jobs: tuple[JobFigures, ...] = ()

    @property
    def in_order(self) -> list[JobFigures]:
        """The jobs by their start, as the report numbers them from 1."""
        return sorted(self.jobs, key=lambda job: (job.started_s, job.worker))


class TraineeFigures(_Record):
    """A candidate of a block, as it was trained and scored; of the report alone.

    Attributes:
        val_losses: (epoch, validation loss); epoch -1 is before the first step.
    """

    block: str
    candidate: str
    damage: Damage
    val_losses: tuple[tuple[int, float], ...]


class BaselineSeconds(_Record):
    """Device seconds of a baseline: those that it was given, and those that it used."""

    given_s: float
    used_s: float


class Measured(_Record):
    """``measured.json``.

    Attributes:
        date: when the latency was measured.
        latency: model (teacher or student) to figures by batch size, threads and runtime; a
            baseline has its student's.
        exports: model, then runtime to what its file is; lacks those that were not made.
        step_latency: student, then number of a step of `shrink` to the latency after it, where a
            later step changed the structure; all steps after the last of these have the student's.
        stages: lacks those of which this machine has no record.
        block_phase: null where no block was ever trained here.
        device_s: student to the device seconds that it took: the whole block phase, repair
            and fine-tuning.
        baselines: student, then kind to the device seconds of a baseline.
        stitched_latency_ms: student to the latency that ``stitch`` measured of it, where it was
            limited.
    """

    machine: MachineFigures
    date: str
    latency: dict[str, tuple[LatencyFigures, ...]]
    stages: dict[str, StageFigures]
    block_phase: BlockPhase | None
    device_s: dict[str, float] = {}
    baselines: dict[str, dict[str, BaselineSeconds]] = {}
    stitched_latency_ms: dict[str, float] = {}
    exports: dict[str, dict[str, ExportFigures]] = {}
    step_latency: dict[str, dict[int, tuple[LatencyFigures, ...]]] = {}

    @property
    def headline(self) -> dict[str, tuple[LatencyFigures, ...]]:
        """Model to PyTorch's latency by batch size: on the GPU, else at its fastest."""
        return {name: headline(entries) for name, entries in self.latency.items()}

    def latency_after(self, student: str, step: int) -> tuple[LatencyFigures, ...]:
        """A student's latency after a step of its recipe, the first of which is 0: as it came."""
        kept = self.step_latency.get(student, {})
        later = [number for number in sorted(kept) if number >= step]
        return kept[later[0]] if later else self.latency[student]


def read_metrics(results: Path) -> Metrics:
    """Read ``metrics.json``; ArtifactError where it is missing."""
    return Metrics.model_validate(_read(results / METRICS))


def read_measured(results: Path) -> Measured:
    """Read ``measured.json``; ArtifactError where it is missing."""
    return Measured.model_validate(_read(results / MEASURED))


def _read(path: Path) -> Any:
    if not path.is_file():
        raise ArtifactError(f"{path} is missing; run: pbkd evaluate")
    return read_json(path)
