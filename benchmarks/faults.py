"""Faults while elastic teachers label and while runs are on Ray: is all right, and how soon again?

- label_faults.py: something happens to the teachers, to the board, to the student that reads, or to
  the disk; every label is compared with the teacher's own, and must be there once per epoch.
- run_faults.py: a worker, a student or the flow of a whole run is killed; the weights must be those
  of a run that nobody disturbed.

What is done is not done again when the script was stopped.

    .venv/bin/python benchmarks/faults.py [--repeat 10] [--part labels|runs]
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping

import harness
import torch
from kept import Keep
from label_faults import Outcome as LabelOutcome
from label_faults import label_faults, node_joins
from run_faults import Outcome as RunOutcome
from run_faults import run_faults
from workspaces import ROOT

_MAX_S = 30.0  # of a wait


def main() -> None:
    """Every fault so many times, then the table and the targets."""
    arguments = harness.parser(__doc__)
    arguments.add_argument("--repeat", type=int, help="[default: 10; 1 with --quick]")
    arguments.add_argument("--part", choices=["labels", "runs"], help="one of the two only")
    options = arguments.parse_args()
    repeat = options.repeat or (1 if options.quick else 10)
    torch.set_num_threads(1)
    keep = Keep(ROOT / "benchmarks" / "results" / "faults", {"repeat": repeat})
    labels = {} if options.part == "runs" else label_faults(repeat, keep)
    joins = None if options.part == "runs" else keep("a node joins", node_joins)
    runs = {} if options.part == "labels" else run_faults(repeat, keep)
    samples = {name: vars(outcome) for part in (labels, runs) for name, outcome in part.items()}
    rows = [*_label_rows(labels), *_run_rows(runs)]
    targets = []
    if joins:
        late_s = max(0.0, joins["joined_s"] - joins["start_s"])
        name = "a new node has a teacher, after an actor's start"
        targets = [*_label_targets(labels), harness.Target(name, late_s, "at most", 10, "s")]
    if runs:
        targets += _run_targets(runs)
    harness.finish("faults", {"repeat": repeat, "node_joins": joins}, samples, rows, targets)


def _label_rows(outcomes: Mapping[str, LabelOutcome]) -> list[dict[str, str]]:
    return [
        _row(name, len(o.waits_s), o.wrong, o.doubled, o.waits_s)
        if o.waits_s
        else {"fault": f"{name} (not run: {o.why_not})"}
        for name, o in outcomes.items()
    ]


def _run_rows(outcomes: Mapping[str, RunOutcome]) -> list[dict[str, str]]:
    return [
        _row(f"{name}, {o.undisturbed_s:.0f} s without", len(o.lost_s), o.wrong, 0, o.lost_s)
        for name, o in outcomes.items()
    ]


def _row(name: str, times: int, wrong: int, doubled: int, lost_s: list[float]) -> dict[str, str]:
    return {
        "fault": name,
        "times": str(times),
        "wrong": str(wrong),
        "doubled or missing": str(doubled),
        "wait or time lost, median s": f"{statistics.median(lost_s):.2f}",
        "longest s": f"{max(lost_s):.2f}",
    }


def _label_targets(outcomes: Mapping[str, LabelOutcome]) -> list[harness.Target]:
    found = outcomes.values()
    bad = sum(outcome.wrong + outcome.doubled for outcome in found)
    longest_s = max(max(outcome.waits_s, default=0.0) for outcome in found)
    untried = sum(bool(outcome.why_not) for outcome in found)
    return [
        harness.Target("labels that are wrong, missing or shown twice", bad, "at most", 0, ""),
        harness.Target("longest wait for a label", longest_s, "at most", _MAX_S, "s"),
        harness.Target("kinds of faults that could not be tried", untried, "at most", 0, ""),
    ]


def _run_targets(outcomes: Mapping[str, RunOutcome]) -> list[harness.Target]:
    wrong = sum(outcome.wrong for outcome in outcomes.values())
    left = sum(outcome.left for outcome in outcomes.values())
    return [
        harness.Target("runs with other weights", wrong, "at most", 0, ""),
        harness.Target("processes left a minute later", left, "at most", 0, ""),
    ]


if __name__ == "__main__":
    main()
