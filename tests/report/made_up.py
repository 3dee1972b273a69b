"""Families of students made up for the report's tests: any number, with baselines and limits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pbkd.config import Params, SeparableConfig
from pbkd.distill import Damage
from pbkd.report import Measured, Metrics, ReportInputs, TraineeFigures
from pbkd.students import Choice

CANDIDATES = ("separable", "low_rank-ratio.0.25", "bottleneck-batch_norm.true")
FIGURES = ("parameters", "macs", "bytes", "latency")


def latency(batch_size: int, median_ms: float) -> dict[str, Any]:
    """Figures of one batch size."""
    values: dict[str, Any] = dict.fromkeys(("median_ms", "p25_ms", "p75_ms"), median_ms)
    return values | {"repeats": 9, "batch_size": batch_size, "threads": 2, "device": "cpu"}


def model(share: float, accuracy: float) -> dict[str, Any]:
    """Figures of a model with this share of the teacher's parameters."""
    return {
        "val_accuracy": accuracy + 0.002,
        "test_accuracy": accuracy,
        "num_parameters": round(3_800_000 * share),
        "macs": round(80_000_000 * (0.1 + 0.9 * share)),
        "file_bytes": round(15_200_000 * share) + 9_000,
    }


def family(
    num_students: int, baselines: Sequence[str] = (), *, limits: int = 0, seed: int = 0
) -> tuple[Metrics, Measured]:
    """A teacher and students of falling size.

    Args:
        baselines: kinds that every student has.
        limits: each student has as many of parameters, macs, bytes, latency.
    """
    students: dict[str, dict[str, Any]] = {}
    others: dict[str, dict[str, Any]] = {}
    for index in range(num_students):
        share = 0.5 * 0.82**index
        wave = ((index * 7 + seed) % 5 - 2) / 1000
        accuracy = 0.931 - 0.003 * (0.5 / share) ** 0.6 + wave
        own = model(share, accuracy)
        sums = {
            "parameters": own["num_parameters"],
            "macs": own["macs"],
            "bytes": own["file_bytes"],
        }
        limit = {figure: 1.01 * sums[figure] for figure in FIGURES[:3]} | {"latency": 2.5}
        name = "half" if num_students == 1 else f"sweep-{num_students - index}"
        students[name] = own | {
            "stitched_val_accuracy": accuracy - 0.4,
            "recalibrated_val_accuracy": accuracy - 0.12,
            "repaired_val_accuracy": accuracy - 0.03,
            "finetuned_val_accuracy": accuracy + 0.002,
            "limits": {figure: limit[figure] for figure in FIGURES[:limits]},
            "predicted": sums | {"latency_ms": 2.4 if limits == 4 else None},
            "stitched": sums,
            "predicted_damage": 0.2 + 0.01 * index,
            "stitched_damage": 0.5 + 0.02 * index,
            "bytes_ratio": 1 / share,
            "blocks_replaced": 3,
            "blocks_total": 4,
        }
        if baselines:
            offsets = {"scratch": -0.021, "distill": -0.008 if index != 1 else 0.002}
            others[name] = {kind: model(share, accuracy + offsets[kind]) for kind in baselines}
    metrics = Metrics.model_validate(
        {"teacher": model(1, 0.933), "students": students, "baselines": others}
    )
    machine = {"machine_id": "m", "processor": "a processor", "cores": 2, "gpus": [], "python": "3"}
    names = ["teacher", *students]
    measured = Measured.model_validate(
        {
            "machine": machine | {"torch": "2"},
            "date": "2030-01-02",
            "latency": {
                name: [latency(1, 4.1 * 0.93**index), latency(256, 310 * 0.85**index)]
                for index, name in enumerate(names)
            },
            "stages": {"teacher": {"duration_s": 1234.5, "energy_j": {}}},
            "block_phase": None,
            "device_s": dict.fromkeys(students, 812.25),
            "baselines": {
                name: {kind: {"given_s": 812.25, "used_s": 640.5} for kind in own}
                for name, own in others.items()
            },
            "stitched_latency_ms": dict.fromkeys(students, 2.45) if limits == 4 else {},
        }
    )
    return metrics, measured


def trainees(blocks: Sequence[str]) -> list[TraineeFigures]:
    """Three candidates per block."""
    return [
        TraineeFigures(
            block=block,
            candidate=candidate,
            damage=Damage(kl=_kl(row, column), accuracy_drop=0.01 * column, num_images=9),
            val_losses=((-1, 1.0), (0, 0.5), (1, 0.25 / (column + 1))),
        )
        for row, block in enumerate(blocks)
        for column, candidate in enumerate(CANDIDATES)
    ]


def choices(students: Sequence[str], blocks: Sequence[str]) -> dict[str, list[Choice]]:
    """Every student has another mixture; each fourth block keeps the teacher's module."""
    chosen = {}
    for number, student in enumerate(students):
        own = []
        for row, block in enumerate(blocks):
            column = (row + number) % 4
            own.append(
                Choice(block=block, candidate=None, config=None, damage_kl=2.0, reason="too much")
                if column == 3
                else Choice(
                    block=block,
                    candidate=CANDIDATES[column],
                    config=SeparableConfig(),
                    damage_kl=_kl(row, column),
                    reason="least damage within the limits",
                )
            )
        chosen[student] = own
    return chosen


def inputs(
    metrics: Metrics, measured: Measured, num_blocks: int = 4, network: str = "vgg16_bn"
) -> ReportInputs:
    """What the page of such a family shows."""
    blocks = [f"features.{3 * index}" for index in range(num_blocks)]
    return ReportInputs(
        network=network,
        params=Params(),
        metrics=metrics,
        measured=measured,
        choices=choices(list(metrics.students), blocks),
        trainees=trainees(blocks),
        max_damage=1.0,
    )


def _kl(row: int, column: int) -> float:
    return 0.0011 * (1 + row % 13) * (1 + 3 * column)
