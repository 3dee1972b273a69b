"""The report's tables as rows of text, for the terminal and for the page alike."""

from __future__ import annotations

from dataclasses import dataclass

from pbkd.blocks import Discovery
from pbkd.report.results import BlockPhase, Measured

NOT_MEASURED = "not measured"
NOT_PREDICTED = "not predicted"


@dataclass(frozen=True)
class Table:
    """A title, column heads, and rows of text; the first column names the row."""

    title: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def stage_table(measured: Measured) -> Table:
    """Wall time and energy of each stage's last run on this machine."""
    rows = []
    for name, figures in measured.stages.items():
        counted = [value for value in figures.energy_j.values() if value is not None]
        missing = [device for device, value in figures.energy_j.items() if value is None]
        joules = joules_text(sum(counted) if counted else None)
        without = f" without {', '.join(missing)}" if counted and missing else ""
        rows.append((name, _seconds(figures.duration_s), joules + without))
    return Table("Wall time per stage", ("stage", "seconds", "energy (J)"), tuple(rows))


def job_table(phase: BlockPhase) -> Table:
    """The jobs of the block phase, in the order of their start.

    Predicted times have a column where there are any.
    """
    is_predicted = any(job.predicted_s is not None for job in phase.jobs)
    rows = []
    for number, job in enumerate(phase.in_order, start=1):
        predicted = NOT_PREDICTED if job.predicted_s is None else _seconds(job.predicted_s)
        rows.append(
            (
                str(number),
                job.worker,
                f"{job.started_s:.1f}",
                _seconds(job.duration_s),
                *((predicted,) if is_predicted else ()),
                joules_text(job.energy_j),
                ", ".join(job.trained) or "nothing: all was in the store",
            )
        )
    predicted_head = ("predicted (s)",) if is_predicted else ()
    heads = ("job", "worker", "start (s)", "duration (s)", *predicted_head, "energy (J)", "trained")
    return Table("Jobs", heads, tuple(rows))


def energy_sentences(measured: Measured) -> str:
    """Which devices the energy counts and what is in it, or why there is no figure."""
    figures = [stage.energy_j for stage in measured.stages.values()]
    devices = dict.fromkeys(device for energy_j in figures for device in energy_j)
    if not figures:
        return f"Energy: {NOT_MEASURED} (no stage ran on this machine)."
    if not devices:
        return (
            f"Energy: {NOT_MEASURED}. This machine has no counter that pbkd can read: no NVIDIA "
            "GPU that tells its energy or power (NVML), and no CPU package counter (RAPL; on most "
            "machines root alone may read it)."
        )
    told = [f"{device} ({_what_counts(device)})" for device in devices]
    failed = any(value is None for energy_j in figures for value in energy_j.values())
    gap = " A device without a figure: its counter failed or did not move." if failed else ""
    return (
        f"Energy counts {', '.join(told)}. A figure is all that these devices drew from start to "
        "end: idle power is in it, and so is what other programs used on them. Memory, disks, fans "
        "and power supplies are not counted. A job's own energy is known only where no other "
        f"program used its GPU; jobs on the CPU share it, so that theirs is not measured.{gap}"
    )


def discovery_tables(discovery: Discovery) -> list[Table]:
    """The blocks with their candidates, and what was refused."""
    rows = []
    for block in discovery.blocks:
        for index, candidate in enumerate(block.candidates):
            facts = (
                block.path,
                block.module,
                f"{_shape(block.input_shape)} to {_shape(block.output_shape)}",
                f"{block.num_parameters:,} ({block.share_of_parameters:.0%})",
                f"{block.macs:,} ({block.share_of_macs:.0%})",
            )
            smaller = f"{candidate.num_parameters:,} / {candidate.macs:,}"
            rows.append((*(facts if index == 0 else ("",) * 5), candidate.name, smaller))
    heads = ("block", "module", "shapes", "parameters", "MACs", "candidate", "parameters / MACs")
    tables = [Table("Blocks", heads, tuple(rows))]
    left_out = [(item.name, item.reason) for item in discovery.refused]
    for block in discovery.blocks:
        left_out += [(f"{block.path}: {item.name}", item.reason) for item in block.rejected]
    if left_out:
        tables.append(Table("Left out", ("what", "why"), tuple(left_out)))
    return tables


def block_phase_sentence(measured: Measured) -> str:
    """What the parallel block phase gained."""
    phase = measured.block_phase
    if phase is None:
        return f"Block phase: {NOT_MEASURED} (no workers trained blocks on this machine)."
    return (
        f"Block phase: {counted(phase.num_jobs, 'job')} on "
        f"{counted(phase.num_workers, 'worker')}, {phase.wall_s:.1f} s{_predicted(phase)}; "
        f"{phase.jobs_s:.1f} s of work{_scoring(phase)}, speed-up {phase.speedup:.2f}; energy "
        f"{NOT_MEASURED if phase.energy_j is None else joules_text(phase.energy_j) + ' J'}."
    )


def counted(number: int, noun: str) -> str:
    """A number with its noun, in the plural where it is not 1."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def duration_text(duration_s: float) -> str:
    """A time with the unit that reads best, to two or three digits."""
    if duration_s < 1:
        return f"{duration_s:.2g} s"
    for unit, size, enough in (("s", 1, 120), ("min", 60, 120), ("h", 3600, 48)):
        value = duration_s / size
        if value < enough:
            return f"{value:.1f} {unit}" if value < 9.95 else f"{value:.0f} {unit}"
    return f"{duration_s / 86400:,.1f} days"


def _predicted(phase: BlockPhase) -> str:
    if phase.predicted_s is None or not phase.wall_s:
        return ""
    percent = round(100 * (phase.predicted_s / phase.wall_s - 1))
    off = f"{abs(percent)} % {'more' if percent > 0 else 'less'} than it took"
    return f", predicted {phase.predicted_s:.1f} s ({off if percent else 'as it took'})"


def _scoring(phase: BlockPhase) -> str:
    if phase.score_s is None or not phase.jobs_s:
        return ""
    return f" ({phase.score_s / phase.jobs_s:.1%} of it scored the candidates)"


def joules_text(energy_j: float | None) -> str:
    """Joules without their unit; a figure that is absent is said to be."""
    if energy_j is None:
        return NOT_MEASURED
    return f"{energy_j:,.0f}" if energy_j >= 100 else f"{energy_j:.3g}"


def _seconds(duration_s: float) -> str:
    return f"{duration_s:,.1f}" if duration_s >= 1 else f"{duration_s:.2g}"


def _what_counts(device: str) -> str:
    """How a device of ``pbkd.measure`` is read, by its name."""
    if device.startswith("gpu"):
        return "the whole GPU, by NVML's energy counter or power samples"
    return "the processor package with its cores and caches, by RAPL"


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
