"""The report: one self-contained page, from what the stages wrote."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources

import yaml

from pbkd._version import __version__
from pbkd.config import Params
from pbkd.errors import MissingExtraError
from pbkd.report import plots
from pbkd.report.results import MachineFigures, Measured, Metrics, TraineeFigures
from pbkd.report.tables import (
    Table,
    accuracy_table,
    block_phase_sentence,
    energy_sentences,
    final_table,
    job_table,
    stage_table,
    summary_sentence,
)
from pbkd.students import Choice


@dataclass(frozen=True)
class ReportInputs:
    """All that the page shows.

    Attributes:
        network: name of the teacher's network.
        params: of the run.
        choices: student to its choice per block.
        trainees: in the order of the network.
        max_damage: limit above which a block keeps the teacher's module, nats.
    """

    network: str
    params: Params
    metrics: Metrics
    measured: Measured
    choices: Mapping[str, Sequence[Choice]]
    trainees: Sequence[TraineeFigures]
    max_damage: float


def render(inputs: ReportInputs) -> str:
    """HTML of the report.

    Raises:
        MissingExtraError: jinja2 or matplotlib is not installed.
    """
    try:
        import jinja2
    except ImportError:
        raise MissingExtraError("jinja2", "pipeline", "the report") from None
    source = resources.files("pbkd.report").joinpath("page.html").read_text()
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    metrics, measured, trainees = inputs.metrics, inputs.measured, inputs.trainees
    phase = measured.block_phase
    return environment.from_string(source).render(
        network=inputs.network,
        summary=summary_sentence(metrics, measured, inputs.network),
        num_blocks=len({trainee.block for trainee in trainees}),
        num_trainees=len(trainees),
        max_damage=inputs.max_damage,
        finetuned=inputs.params.finetune.epochs > 0,
        final=final_table(metrics, measured),
        latency=measured.latency["teacher"],
        accuracy_by_size=plots.accuracy_by_size(metrics, inputs.network),
        accuracy=accuracy_table(metrics),
        blocks=block_table(inputs.choices, trainees),
        keys=plots.candidate_keys(trainees),
        damages=plots.damages(trainees, _chosen(inputs.choices), inputs.max_damage),
        loss=inputs.params.distill.loss,
        curves=plots.loss_curves(trainees),
        phase=block_phase_sentence(measured),
        jobs=job_table(phase) if phase and phase.jobs else None,
        gantt=plots.jobs(phase) if phase and phase.jobs else None,
        stages=stage_table(measured),
        energy=energy_sentences(measured),
        settings=_settings(inputs.params),
        machine=machine_table(measured.machine, measured.date),
    )


def block_table(
    choices: Mapping[str, Sequence[Choice]], trainees: Sequence[TraineeFigures]
) -> Table:
    """Per student and block: what stands there now, at which damage, and why."""
    dropped = {(t.block, t.candidate): t.damage.accuracy_drop for t in trainees}
    rows = []
    for student, entries in choices.items():
        for choice in entries:
            drop = dropped.get((choice.block, choice.candidate or ""))
            rows.append(
                (
                    choice.block,
                    student,
                    choice.candidate or "teacher's own",
                    "not finite" if choice.damage_kl is None else f"{choice.damage_kl:.4f}",
                    "" if drop is None else f"{100 * drop:.2f}",
                    choice.reason,
                )
            )
    heads = ("block", "student", "chosen", "damage (nats)", "accuracy lost (points)", "why")
    return Table("What was chosen", heads, tuple(rows))


def machine_table(machine: MachineFigures, date: str) -> Table:
    """Where and with what the figures were made."""
    rows = (
        ("latency measured", date),
        ("processor", f"{machine.processor}, {machine.cores} cores used"),
        ("GPUs", ", ".join(machine.gpus) or "none"),
        ("pbkd", __version__),
        ("Python", machine.python),
        ("PyTorch", machine.torch),
    )
    return Table("Machine and versions", ("", "value"), rows)


def _chosen(choices: Mapping[str, Sequence[Choice]]) -> set[tuple[str, str]]:
    return {
        (choice.block, choice.candidate)
        for entries in choices.values()
        for choice in entries
        if choice.candidate is not None
    }


def _settings(params: Params) -> dict[str, str]:
    """Section of params.yaml to its YAML, defaults filled in."""
    sections = params.model_dump(mode="json", by_alias=True)
    return {name: yaml.safe_dump(value, sort_keys=False) for name, value in sections.items()}
