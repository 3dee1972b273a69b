"""The report: one self-contained page, from what the stages wrote."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources

from pbkd._version import __version__
from pbkd.distill import Damage
from pbkd.errors import MissingExtraError
from pbkd.report import plots
from pbkd.report.results import Measured, Metrics
from pbkd.report.tables import (
    Table,
    accuracy_table,
    block_phase_sentence,
    final_table,
    stage_table,
    summary_sentence,
)
from pbkd.students import Choice


def render(
    title: str,
    metrics: Metrics,
    measured: Measured,
    choices: Mapping[str, Sequence[Choice]],
    candidate_damages: Mapping[str, Damage],
    curves: Mapping[str, Sequence[tuple[int, float]]],
    max_damage: float,
) -> str:
    """HTML of the report.

    Args:
        choices: student to its choice per block.
        candidate_damages: ``block/candidate`` to damage.
        curves: ``block/candidate`` to (epoch, validation loss).
        max_damage: limit above which a block keeps the teacher's module, nats.
    """
    try:
        import jinja2
    except ImportError:
        raise MissingExtraError("jinja2", "pipeline", "the report") from None
    source = resources.files("pbkd.report").joinpath("page.html").read_text()
    template = jinja2.Environment(autoescape=True).from_string(source)
    finite = {name: d.kl for name, d in candidate_damages.items() if d.kl is not None}
    machine = measured.machine
    return template.render(
        title=title,
        summary=summary_sentence(metrics, measured),
        final=final_table(metrics, measured),
        accuracy=accuracy_table(metrics),
        blocks=block_table(choices, candidate_damages),
        curves=plots.loss_curves(curves),
        damages=plots.damages(finite, max_damage),
        stages=stage_table(measured),
        phase=block_phase_sentence(measured),
        machine=f"{', '.join([machine.processor, *machine.gpus])}, {machine.cores} cores, "
        f"torch {machine.torch}",
        date=measured.date,
        version=__version__,
    )


def block_table(
    choices: Mapping[str, Sequence[Choice]], candidate_damages: Mapping[str, Damage]
) -> Table:
    """Per student and block: what stands there now, at which damage, and why."""
    rows = []
    for student, entries in choices.items():
        for choice in entries:
            damage = candidate_damages.get(f"{choice.block}/{choice.candidate}")
            rows.append(
                (
                    choice.block,
                    student,
                    choice.candidate or "teacher's own",
                    "not finite" if choice.damage_kl is None else f"{choice.damage_kl:.4f}",
                    "" if damage is None else f"{100 * damage.accuracy_drop:.2f}",
                    choice.reason,
                )
            )
    heads = ("block", "student", "chosen", "damage (nats)", "accuracy lost (points)", "why")
    return Table("Blocks", heads, tuple(rows))
