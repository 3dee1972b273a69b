"""The report: one self-contained page, from what the stages wrote."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import yaml

from pbkd._version import __version__
from pbkd.config import Params
from pbkd.report import pareto, plots
from pbkd.report.baselines import baseline_sentences, baseline_table
from pbkd.report.budgets import budget_table, damage_table, machine_sentence
from pbkd.report.choices import candidate_table, choice_matrix, choice_table
from pbkd.report.family import (
    MAX_COLUMNS,
    accuracy_table,
    final_table,
    summary_sentence,
)
from pbkd.report.results import (
    BlockPhase,
    MachineFigures,
    Measured,
    Metrics,
    TraineeFigures,
)
from pbkd.report.runtimes import export_sentence, export_table, runtime_table
from pbkd.report.shrinking import (
    file_sentence,
    shrink_table,
    times_sentence,
    zeros_sentence,
)
from pbkd.report.tables import (
    Table,
    block_phase_sentence,
    energy_sentences,
    job_table,
    stage_table,
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
    choices = {name: inputs.choices[name] for name in metrics.by_size}
    pictures = pareto.pictures(metrics, measured, inputs.network)
    num_models = 1 + len(metrics.students) + sum(map(len, metrics.baselines.values()))
    return fill(
        "page.html",
        network=inputs.network,
        summary=summary_sentence(metrics, measured, inputs.network),
        num_students=len(metrics.students),
        num_blocks=len({trainee.block for trainee in trainees}),
        num_trainees=len(trainees),
        max_damage=inputs.max_damage,
        repair=inputs.params.stitch.repair,
        finetuned=inputs.params.finetune.epochs > 0,
        final=final_table(metrics, measured),
        as_rows=len(metrics.students) > MAX_COLUMNS,
        latency=measured.headline["teacher"],
        repeats=_repeats(measured),
        runtimes=runtime_table(metrics, measured),
        exports=export_table(metrics, measured),
        parity=export_sentence(measured),
        pictures=pictures,
        are_small=num_models <= pareto.FEW,
        are_all_named=num_models <= pareto.MANY,
        marks=pareto.keys(metrics),
        accuracy=accuracy_table(metrics, measured),
        shrinking=shrink_table(metrics, measured),
        times=times_sentence(measured),
        files=file_sentence(metrics),
        zeros=next(filter(None, map(zeros_sentence, metrics.students.values())), None),
        baselines=baseline_table(metrics, measured),
        against_baselines=baseline_sentences(metrics),
        budgets=budget_table(metrics, measured),
        whole_damages=damage_table(metrics),
        machine_dependence=machine_sentence(metrics, inputs.params.stitch),
        blocks=choice_table(next(iter(choices.values())), trainees),
        matrix=choice_matrix(choices) if len(choices) > 1 else None,
        keys=plots.candidate_keys(trainees),
        candidates=candidate_table(trainees),
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
        *((("onnxruntime", machine.onnxruntime),) if machine.onnxruntime else ()),
    )
    return Table("Machine and versions", ("", "value"), rows)


def _repeats(measured: Measured) -> list[str]:
    """Per batch size: from how many passes a median comes; least and most of all models."""
    texts = []
    for entries in zip(*measured.headline.values(), strict=True):
        counts = [entry.repeats for entry in entries]
        low, high = min(counts), max(counts)
        texts.append(str(low) if low == high else f"{low} to {high}")
    return texts


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
