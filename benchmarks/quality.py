"""What blockwise distillation keeps of the teacher's accuracy, on CIFAR-10's images.

The whole pipeline runs in one process: teacher, library of candidates, students under budgets,
repair, fine-tuning, and for each student the same architecture trained from scratch and distilled
end to end for as many device seconds (``finetune.baselines``). Accuracies are on the test split.

Everything goes on where it was stopped, and results of several calls are merged: call it again,
with ``--limit-s`` where a call must be short, or with other seeds. Results of a GPU and of a CPU,
and of other settings, lie in folders of their own and are never mixed.

    .venv/bin/python benchmarks/quality.py --quick --images cifar10-images.tar.gz
"""

from __future__ import annotations

import argparse
import json
import signal
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cifar
import harness
import torch
from workspaces import ROOT, go_on, kept_workspace

from pbkd.artifacts import Workspace, digest_of, read_json, write_json
from pbkd.config import AugmentConfig
from pbkd.data import Stream, load_prepared
from pbkd.devices import best_device
from pbkd.measure import measure_interleaved
from pbkd.models import predict
from pbkd.report import Metrics, read_measured, read_metrics
from pbkd.stages.context import student_folders
from pbkd.students import load_model

_BATCH = 512
_LATENCY_S = 5.0


@dataclass(frozen=True)
class Case:
    """A network, its settings, and what is claimed of its students.

    Attributes:
        params: sections of params.yaml, as far as they differ from the repository's.
        kept: student to the percentage of the teacher's accuracy that it keeps when repaired.
        within: student to the points of accuracy that it may lose when fine-tuned.
        faster: how many times lower some student's latency is, at batch 1 on one CPU thread.
    """

    name: str
    params: Mapping[str, Mapping[str, Any]]
    kept: Mapping[str, float]
    within: Mapping[str, float]
    faster: float | None = None


_NO_RECIPE: dict[str, Any] = {"recipe": []}
_EVALUATE = {"latency_batch_sizes": [1, 256], "latency_seconds": 2.0, "runtimes": ["pytorch"]}

QUICK = Case(
    name="vgg16-half",
    params={
        "prepare": cifar.PREPARE,
        "teacher": {
            "model": "cifar_vgg16",
            "width": 0.5,
            "epochs": 14,
            "batch_size": 128,
            "lr": 0.1,
            "augment": cifar.AUGMENT,
            "min_accuracy": 0.0,
        },
        "blocks": {"candidates": [{"kind": "separable"}]},
        "activations": {"source": "relay", "views": 4},
        "distill": {"epochs": 2, "batch_size": 128},
        "stitch": {
            "max_damage": 5.0,
            "students": {"12": {"max_parameters": 0.125}, "25": {"max_parameters": 0.25}},
            "repair": {"epochs": 3, "batch_size": 128},
        },
        "finetune": {"epochs": 2, "batch_size": 128, "baselines": ["scratch", "distill"]},
        "shrink": _NO_RECIPE,
        "evaluate": _EVALUATE,
    },
    kept={"12": 96.0},
    within={"25": 1.0},
)

_ON_GPU: dict[str, dict[str, Any]] = {
    "prepare": cifar.PREPARE,
    "activations": {"source": "relay", "views": 4},
    "distill": {"epochs": 8, "batch_size": 512, "lr": 4e-3},
    "finetune": {
        "epochs": 20,
        "patience": 20,
        "batch_size": 512,
        "lr": 0.02,
        "baselines": ["scratch", "distill"],
    },
    "shrink": _NO_RECIPE,
    "evaluate": {"latency_batch_sizes": [1], "latency_seconds": 0.5, "runtimes": ["pytorch"]},
}
_GPU_REPAIR = {"epochs": 8, "batch_size": 512, "lr": 5e-3}
FULL = (
    Case(
        name="vgg16",
        params=_ON_GPU
        | {
            "teacher": cifar.GPU_TEACHER | {"model": "cifar_vgg16"},
            "blocks": {"candidates": cifar.LIBRARY},
            "stitch": {
                "max_damage": 5.0,
                "students": {"10": {"max_parameters": 0.1}, "25": {"max_parameters": 0.25}},
                "repair": _GPU_REPAIR,
            },
        },
        kept={"10": 98.0},
        within={"25": 0.3, "10": 1.0},
        faster=2.0,
    ),
    Case(
        name="resnet20",
        params=_ON_GPU
        | {
            "teacher": cifar.GPU_TEACHER | {"model": "cifar_resnet20"},
            "blocks": {"candidates": [{"kind": "separable"}]},
            "stitch": {
                "max_damage": 5.0,
                "students": {"25": {"max_parameters": 0.25}, "50": {"max_parameters": 0.5}},
                "repair": _GPU_REPAIR,
            },
        },
        kept={"25": 90.0},
        within={"50": 1.0},
    ),
)


def main() -> None:
    """Go on with the cases of some seeds, then report all that is finished."""
    options = _options()
    cifar.begin(options)
    cases = (QUICK,) if options.quick else FULL
    if options.bfloat16:
        cases = tuple(_in_bfloat16(case) for case in cases)
    for case in cases:
        if options.case not in (None, case.name):
            continue
        seeds = options.seed if case is cases[0] else options.seed[:1]
        for seed in seeds:
            _go_on(_workspace(case, seed, options))
    signal.alarm(0)
    finished = [
        (case, folder)
        for case in cases
        for folder in sorted(_folder(case).glob("*"))
        if (folder / "quality.json").is_file()
    ]
    report(finished, cases)


def _options() -> argparse.Namespace:
    parser = harness.parser(__doc__)
    cifar.add_options(parser)
    parser.add_argument("--case", choices=[case.name for case in FULL], help="one network only")
    parser.add_argument("--seed", type=int, nargs="+", default=[0], help="seeds to work on")
    parser.add_argument(
        "--without-baselines", action="store_true", help="leave them to another call"
    )
    parser.add_argument(
        "--bfloat16", action="store_true", help="every training under autocast, on a CPU, too"
    )
    return parser.parse_args()


def _in_bfloat16(case: Case) -> Case:
    always = {"mixed_precision": "always"}
    params = {name: dict(section) for name, section in case.params.items()}
    for name in ("teacher", "distill", "finetune"):
        params[name] |= always
    params["stitch"]["repair"] = params["stitch"]["repair"] | always
    return replace(case, params=params)


# ---------------------------------------------------------------- running


def _folder(case: Case) -> Path:
    """Where this case's workspaces lie: one folder per kind of device and settings."""
    settings = digest_of({name: dict(section) for name, section in case.params.items()})[:8]
    return ROOT / "benchmarks" / "results" / "quality" / best_device().type / case.name / settings


def _workspace(case: Case, seed: int, options: argparse.Namespace) -> Workspace:
    changes = {name: dict(section) for name, section in case.params.items()}
    changes["prepare"]["path"] = str(options.images.resolve())
    if options.without_baselines:
        changes["finetune"]["baselines"] = []
    return kept_workspace(_folder(case) / f"seed-{seed}", changes, seed)


def _go_on(workspace: Workspace) -> None:
    """Run the stages that are not finished, then measure what they do not."""
    go_on(workspace)
    if not (workspace.root / "quality.json").is_file():
        write_json(workspace.root / "quality.json", _measured(workspace))


def _measured(workspace: Workspace) -> dict[str, Any]:
    """Test accuracy of repaired students, and latency at batch 1 on one CPU thread."""
    prepared = load_prepared(workspace.prepared)
    device = best_device()
    test = Stream(prepared.split("test"), seed=0, augment=AugmentConfig(), device=device)
    repaired = {}
    for folder in student_folders(workspace, "stitch"):
        model, _ = load_model(folder)
        repaired[folder.name] = predict(model.to(device), test, batch_size=_BATCH).accuracy
    nets = {"teacher": load_model(workspace.artifacts("teacher"))[0]}
    nets |= {f.name: load_model(f)[0] for f in student_folders(workspace, "finetune")}
    latencies = measure_interleaved(
        nets,
        torch.rand(1, *prepared.image_shape),
        batch_size=1,
        threads=1,
        min_duration_s=_LATENCY_S,
    )
    latency_ms = {name: latency.median_ms for name, latency in latencies.items()}
    return {"repaired_test_accuracy": repaired, "latency_ms": latency_ms}


# ---------------------------------------------------------------- report


def report(finished: list[tuple[Case, Path]], cases: tuple[Case, ...]) -> None:
    """Table, targets and the file, from all that is finished."""
    rows, found = [], {}
    values: dict[str, list[float]] = {}
    for case, folder in finished:
        metrics = read_metrics(folder / "results")
        extra = read_json(folder / "quality.json")
        device_s = read_measured(folder / "results").device_s
        entries = {
            name: _figures(metrics, name, extra, device_s[name]) for name in metrics.students
        }
        found[f"{case.name} {folder.name}"] = entries
        for name, entry in entries.items():
            rows.append({"case": case.name, "run": folder.name, "student": name} | _texts(entry))
        _collect(values, case, entries)
    targets = [_target(name, values.get(name, []), *claim) for name, claim in _claims(cases)]
    settings = {case.name: case.params for case in cases}
    harness.finish("quality", json.loads(json.dumps(settings)), found, rows, targets)


def _figures(
    metrics: Metrics, name: str, extra: Mapping[str, Any], device_s: float
) -> dict[str, float]:
    """All of one student; accuracies in percent, on the test split."""
    student, teacher = metrics.students[name], metrics.teacher
    figures = {
        "teacher": 100 * teacher.test_accuracy,
        "share_of_parameters": 100 * student.num_parameters / teacher.num_parameters,
        "stitched_val": 100 * student.stitched_val_accuracy,
        "recalibrated_val": 100 * student.recalibrated_val_accuracy,
        "repaired": 100 * extra["repaired_test_accuracy"][name],
        "finetuned": 100 * student.test_accuracy,
        "device_s": device_s,
        "speedup": extra["latency_ms"]["teacher"] / extra["latency_ms"][name],
    }
    baselines = metrics.baselines.get(name, {})
    return figures | {kind: 100 * entry.test_accuracy for kind, entry in baselines.items()}


def _texts(entry: Mapping[str, float]) -> dict[str, str]:
    return {key: f"{value:.2f}" for key, value in entry.items()}


def _claims(cases: tuple[Case, ...]) -> list[tuple[str, tuple[str, float, str]]]:
    """Names of the targets with the way they must stand, the figure and its unit."""
    claims: list[tuple[str, tuple[str, float, str]]] = []
    for case in cases:
        claims += [(_kept(case, name), ("at least", kept, "%")) for name, kept in case.kept.items()]
        claims += [
            (_lost(case, name), ("at most", points, "points"))
            for name, points in case.within.items()
        ]
        claims += [
            (_ahead(case, name, kind), ("at least", 0.0, "points"))
            for name in case.params["stitch"]["students"]
            for kind in case.params["finetune"]["baselines"]
        ]
        if case.faster is not None:
            claims.append((_faster(case), ("at least", case.faster, "x")))
    return claims


def _collect(
    values: dict[str, list[float]], case: Case, entries: Mapping[str, Mapping[str, float]]
) -> None:
    """Add one run's figures to those of the other seeds."""

    def add(name: str, value: float) -> None:
        values.setdefault(name, []).append(value)

    for name, entry in entries.items():
        add(_kept(case, name), 100 * entry["repaired"] / entry["teacher"])
        add(_lost(case, name), entry["teacher"] - entry["finetuned"])
        for kind in set(case.params["finetune"]["baselines"]) & set(entry):
            add(_ahead(case, name, kind), entry["finetuned"] - entry[kind])
    add(_faster(case), max(entry["speedup"] for entry in entries.values()))


def _kept(case: Case, student: str) -> str:
    return f"{case.name}, {student} % of the parameters: kept when repaired"


def _lost(case: Case, student: str) -> str:
    return f"{case.name}, {student} % of the parameters: lost when fine-tuned"


def _ahead(case: Case, student: str, kind: str) -> str:
    return f"{case.name}, {student} % of the parameters: ahead of {kind}, equal seconds"


def _faster(case: Case) -> str:
    return f"{case.name}: a student's latency, batch 1, one CPU thread"


def _target(name: str, values: list[float], kind: Any, target: float, unit: str) -> harness.Target:
    value = sum(values) / len(values) if values else None
    return harness.Target(name, value, kind, target, unit)


if __name__ == "__main__":
    main()
