"""How small a file gets, and at what accuracy: methods alone and combined, on CIFAR-10's images.

The whole pipeline runs in one process on a VGG with batch norm. A row is a student with a recipe of
its own: those of the teacher's whole structure show a method alone, those stitched from separable
candidates show distillation, alone and combined. Bytes are those of the `.pbkd` file on the disk,
ratios are to the teacher's float32 weights; accuracies are on the test split.

Everything goes on where it was stopped; only what a changed setting touches is done again.

    .venv/bin/python benchmarks/shrink.py --quick --images cifar10-images.tar.gz
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
from workspaces import ROOT, go_on, kept_workspace

from pbkd.artifacts import Workspace, digest_of
from pbkd.devices import best_device
from pbkd.report import Measured, Metrics, read_measured, read_metrics

_WHOLE = {"max_parameters": 1.0}
_CODE = {"method": "code"}


@dataclass(frozen=True)
class Row:
    """A student: its budget, its recipe, and what the table calls them."""

    label: str
    budget: Mapping[str, Any]
    recipe: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True)
class Claim:
    """A file that is so many times smaller, with so much of the teacher's accuracy.

    Attributes:
        kept: least percentage of the teacher's accuracy, or
        lost: most points below it.
    """

    smaller: float
    kept: float | None = None
    lost: float | None = None

    @property
    def words(self) -> str:
        """For the target's name."""
        if self.kept is not None:
            return f"at {self.kept:g} % or more of the teacher's accuracy"
        return f"within {self.lost:g} points of the teacher"

    def holds(self, accuracy: float, teacher: float) -> bool:
        """Whether an accuracy is high enough; percent."""
        if self.kept is not None:
            return 100 * accuracy / teacher >= self.kept
        assert self.lost is not None
        return teacher - accuracy <= self.lost


@dataclass(frozen=True)
class Case:
    """A teacher, the sections of params.yaml for it, the rows, and what is claimed."""

    name: str
    params: Mapping[str, Mapping[str, Any]]
    rows: Mapping[str, Row]
    claims: tuple[Claim, ...]
    faster: float = 8.0


@dataclass(frozen=True)
class Tuning:
    """How a step trains."""

    epochs: int
    batch_size: int = 128
    lr: float = 0.02

    def section(self, epochs: float = 1.0, lr: float = 1.0) -> dict[str, Any]:
        """The step's ``tune``; both arguments are factors."""
        num = round(epochs * self.epochs)
        return {
            "epochs": num,
            "batch_size": self.batch_size,
            "lr": lr * self.lr,
            "patience": max(num, 1),
        }


def _prune(sparsity: float, tune: Mapping[str, Any]) -> dict[str, Any]:
    return {"method": "prune", "sparsity": sparsity, "tune": tune}


def _quantize(bits: int, tune: Mapping[str, Any]) -> dict[str, Any]:
    return {"method": "quantize", "bits": bits, "tune": tune}


def _narrow(macs: float, tune: Mapping[str, Any]) -> dict[str, Any]:
    return {"method": "prune_channels", "max_macs": macs, "tune": tune}


def _low_rank(energy: float, tune: Mapping[str, Any]) -> dict[str, Any]:
    return {"method": "low_rank", "energy": energy, "tune": tune}


def _rows(tuning: Tuning, small: Mapping[str, Any], long: Mapping[str, Any]) -> dict[str, Row]:
    """Methods alone on the whole teacher, then combined.

    Args:
        small: the distilled students' budget.
        long: the ``tune`` of the one that is to be fast.
    """
    once, twice, slow = tuning.section(), tuning.section(epochs=2), tuning.section(lr=0.5)
    last = (_quantize(4, slow), _CODE)
    return {
        "prune-75": Row("prune 75 %", _WHOLE, (_prune(0.75, once), _CODE)),
        "lowrank": Row("low rank", _WHOLE, (_low_rank(0.8, once), _CODE)),
        "narrow": Row("fewer channels", _WHOLE, (_narrow(0.4, twice), _CODE)),
        "int8": Row("8 bits", _WHOLE, (_quantize(8, tuning.section(epochs=0)), _CODE)),
        "int4": Row("4 bits", _WHOLE, last),
        "small": Row("distill", small, (_CODE,)),
        "fast": Row("distill, 8 bits", small, (_quantize(8, long), _CODE)),
        "target": Row("distill, prune, 4 bits", small, (_prune(0.6, twice), *last)),
    }


def _more_rows(
    tuning: Tuning, small: Mapping[str, Any], middle: Mapping[str, Any]
) -> dict[str, Row]:
    """What a GPU has time for beside them: more shares of zeros, pairs, and all methods at once."""
    once, slow = tuning.section(), tuning.section(lr=0.5)
    last = (_quantize(4, slow), _CODE)
    near = (_prune(0.5, once), _quantize(5, slow), _CODE)
    rows = {
        f"prune-{percent:g}": Row(
            f"prune {percent:g} %", _WHOLE, (_prune(percent / 100, once), _CODE)
        )
        for percent in (40, 87.5, 95)
    }
    return rows | {
        "prune-int4": Row("prune, 4 bits", _WHOLE, (_prune(0.9, once), *last)),
        "lowrank-int4": Row("low rank, 4 bits", _WHOLE, (_low_rank(0.8, once), *last)),
        "small-int4": Row("distill, 4 bits", small, last),
        "small-prune": Row("distill, prune", small, (_prune(0.75, once), _CODE)),
        "near": Row("distill less, prune, 5 bits", middle, near),
        "all": Row(
            "distill, low rank, prune, 4 bits",
            small,
            (_low_rank(0.95, once), _prune(0.6, once), *last),
        ),
    }


_EVALUATE = {
    "latency_batch_sizes": [1, 256],
    "latency_seconds": 2.0,
    "runtimes": ["pytorch", "onnxruntime", "onnxruntime-int8"],
}

QUICK = Case(
    name="vgg16-half",
    params={
        "prepare": cifar.PREPARE,
        "teacher": {
            "model": "cifar_vgg16",
            "width": 0.5,
            "epochs": 8,
            "batch_size": 128,
            "lr": 0.1,
            "augment": cifar.AUGMENT,
            "min_accuracy": 0.0,
        },
        "blocks": {"candidates": [{"kind": "separable"}]},
        "activations": {"source": "relay", "views": 4},
        "distill": {"epochs": 2, "batch_size": 128},
        "stitch": {"max_damage": 5.0, "repair": {"epochs": 2, "batch_size": 128}},
        "finetune": {"epochs": 1, "batch_size": 128},
        "evaluate": _EVALUATE,
    },
    rows=_rows(Tuning(1), {"max_parameters": 0.125}, long=Tuning(1).section(epochs=8, lr=2.0)),
    claims=(Claim(100.0, kept=96.0),),
)

_SMALL, _MIDDLE = {"max_parameters": 0.04}, {"max_parameters": 0.1}
_GPU_BATCH = 512
_GPU_TUNING = Tuning(10, _GPU_BATCH, 0.05)
FULL = Case(
    name="vgg19",
    params={
        "prepare": cifar.PREPARE,
        "teacher": cifar.GPU_TEACHER | {"model": "cifar_vgg19"},
        "blocks": {"candidates": cifar.LIBRARY},
        "activations": {"source": "relay", "views": 4},
        "distill": {"epochs": 6, "batch_size": _GPU_BATCH, "lr": 4e-3},
        "stitch": {
            "max_damage": 5.0,
            "repair": {"epochs": 4, "batch_size": _GPU_BATCH, "lr": 5e-3},
        },
        "finetune": {"epochs": 20, "patience": 20, "batch_size": _GPU_BATCH, "lr": 0.02},
        "evaluate": _EVALUATE | {"latency_batch_sizes": [1], "latency_seconds": 0.5},
    },
    rows=_rows(_GPU_TUNING, _SMALL, long=_GPU_TUNING.section(lr=1.5))
    | _more_rows(_GPU_TUNING, _SMALL, _MIDDLE),
    claims=(Claim(250.0, kept=97.0), Claim(60.0, lost=0.5)),
)


def main() -> None:
    """Go on with the case, then report it."""
    options = _options()
    cifar.begin(options)
    case = QUICK if options.quick else FULL
    if options.rows:
        case = replace(case, rows={name: case.rows[name] for name in options.rows})
    workspace = _workspace(case, options.seed, options.images.resolve())
    go_on(workspace)
    signal.alarm(0)
    report(case, workspace)


def _options() -> argparse.Namespace:
    parser = harness.parser(__doc__)
    cifar.add_options(parser)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", nargs="+", choices=list(FULL.rows), help="some rows alone")
    return parser.parse_args()


def _workspace(case: Case, seed: int, images: Path) -> Workspace:
    """One folder per kind of device and teacher: other rows need no new teacher."""
    changes = {name: dict(section) for name, section in case.params.items()}
    changes["prepare"]["path"] = str(images)
    changes["stitch"]["students"] = {name: dict(row.budget) for name, row in case.rows.items()}
    recipes = {name: [dict(step) for step in row.recipe] for name, row in case.rows.items()}
    changes["shrink"] = {"overrides": recipes}
    teacher = digest_of([case.params["prepare"], case.params["teacher"]])[:8]
    results = ROOT / "benchmarks" / "results" / "shrink" / best_device().type
    return kept_workspace(results / case.name / teacher / f"seed-{seed}", changes, seed)


# ---------------------------------------------------------------- report


def report(case: Case, workspace: Workspace) -> None:
    """Table, targets and the file."""
    metrics, measured = read_metrics(workspace.results), read_measured(workspace.results)
    figures = {name: _figures(name, metrics, measured) for name in ("teacher", *case.rows)}
    labels = {"teacher": "teacher"} | {name: row.label for name, row in case.rows.items()}
    rows = [
        {"method": labels[name]} | {key: _text(key, value) for key, value in entry.items()}
        for name, entry in figures.items()
    ]
    settings = {"params": case.params, "rows": {n: list(r.recipe) for n, r in case.rows.items()}}
    samples = {"figures": figures, "steps": {n: s.steps for n, s in metrics.students.items()}}
    harness.finish(
        "shrink",
        json.loads(json.dumps(settings)),
        json.loads(json.dumps(samples, default=lambda record: record.model_dump(mode="json"))),
        rows,
        _targets(case, figures),
    )
    _plot(figures, labels)


def _plot(figures: Mapping[str, Mapping[str, float | None]], labels: Mapping[str, str]) -> None:
    """Accuracy against the bytes of the file, as a picture beside the results."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for name, entry in figures.items():
        is_teacher = name == "teacher"
        axes.plot(entry["bytes"] / 1e3, entry["accuracy"], "s" if is_teacher else "o", color="C0")
        axes.annotate(
            labels[name],
            (entry["bytes"] / 1e3, entry["accuracy"]),
            xytext=(6, 4),
            textcoords="offset points",
            fontsize=9,
        )
    axes.set_xscale("log")
    axes.set_xlabel("file (kB, as it lies on the disk)")
    axes.set_ylabel("accuracy on the test images (%)")
    axes.grid(visible=True, alpha=0.3)
    path = ROOT / "benchmarks" / "results" / "shrink.svg"
    figure.savefig(path)
    print(f"written: benchmarks/results/{path.name}")


def _figures(name: str, metrics: Metrics, measured: Measured) -> dict[str, float | None]:
    """Of one model; accuracies in percent, on the test split; latency at batch 1, one thread."""
    model = metrics.teacher if name == "teacher" else metrics.students[name]
    found: dict[str, float | None] = {
        "bytes": model.file_bytes,
        "smaller": metrics.teacher.file_bytes / model.file_bytes,
        "bits_per_weight": model.bits_per_weight,
        "parameters": model.num_parameters,
        "nonzero": model.num_nonzero,
        "macs": model.macs,
        "accuracy": 100 * model.test_accuracy,
        "val_accuracy": 100 * model.val_accuracy,
    }
    for entry in measured.latency[name]:
        if entry.threads == 1 and entry.device == "cpu" and entry.batch_size == 1:
            found[f"{entry.runtime} (ms)"] = entry.median_ms
    int8 = measured.exports.get(name, {}).get("onnxruntime-int8")
    if int8 is not None and int8.test_accuracy is not None:
        found["int8 accuracy"] = 100 * int8.test_accuracy
    return found


def _text(key: str, value: float | None) -> str:
    if value is None:
        return "not measured"
    if key in ("bytes", "parameters", "nonzero", "macs"):
        return f"{value:,.0f}"
    return f"{value:.2f}"


def _targets(case: Case, figures: Mapping[str, Mapping[str, float | None]]) -> list[harness.Target]:
    """The smallest file that keeps to each claim's accuracy."""
    teacher = figures["teacher"]
    targets = []
    for claim in case.claims:
        good = [
            entry["smaller"]
            for name, entry in figures.items()
            if name != "teacher" and claim.holds(entry["accuracy"], teacher["accuracy"])
        ]
        value = max(good) if good else None
        name = f"{case.name}: smallest file {claim.words}"
        targets.append(harness.Target(name, value, "at least", claim.smaller, "x smaller"))
    name = f"{case.name}: a student within 1 point, onnxruntime, batch 1, one thread"
    targets.append(harness.Target(name, _speedup(figures), "at least", case.faster, "x faster"))
    return targets


def _speedup(figures: Mapping[str, Mapping[str, float | None]]) -> float | None:
    """The teacher's float32 latency over that of the fastest student that is near it.

    A student counts in float32 and in int8, each time with the accuracy that it has there.
    """
    teacher = figures["teacher"]
    near = [
        entry[latency]
        for name, entry in figures.items()
        for latency, accuracy in (
            ("onnxruntime (ms)", "accuracy"),
            ("onnxruntime-int8 (ms)", "int8 accuracy"),
        )
        if name != "teacher" and latency in entry and teacher["accuracy"] - entry[accuracy] <= 1
    ]
    return teacher["onnxruntime (ms)"] / min(near) if near else None


if __name__ == "__main__":
    main()
