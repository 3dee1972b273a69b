"""The report: one self-contained page, from what the stages wrote."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import yaml

from pbkd._version import __version__
from pbkd.config import Params
from pbkd.report import plots
from pbkd.report.results import (
    BlockPhase,
    MachineFigures,
    Measured,
    Metrics,
    TraineeFigures,
)
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
from pbkd.report.template import fill
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
    metrics, measured, trainees = inputs.metrics, inputs.measured, inputs.trainees
    phase = measured.block_phase
    return fill(
        "page.html",
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
        predicted=prediction_note(phase, trainees, inputs.params.distill.epochs) if phase else None,
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


def prediction_note(
    phase: BlockPhase, trainees: Sequence[TraineeFigures], num_epochs: int
) -> str | None:
    """How to read the predicted bars; None where there are none."""
    if all(job.predicted_s is None for job in phase.jobs):
        return None
    text = (
        "The thin dashed bar below a job is the time that the plan had predicted for it, drawn "
        "from where the job began; all epochs are counted."
    )
    trained = {name for job in phase.jobs for name in job.trained}
    lasts = [
        max((epoch for epoch, _ in trainee.val_losses), default=-1)
        for trainee in trainees
        if f"{trainee.block}/{trainee.candidate}" in trained
    ]
    if early := sum(last + 1 < num_epochs for last in lasts):
        text += f" {early} of {len(lasts)} candidates stopped early, which no plan foresees."
    return text


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
