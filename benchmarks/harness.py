"""What every benchmark shares: interleaved samples, a table, and a JSON file with targets.

A benchmark is ``benchmarks/NAME.py [--quick]``. Samples of its variants are taken in turn in one
run, so that noise of a shared machine meets all of them; targets are ratios of their medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from pbkd.measure import this_machine

_RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Target:
    """A claim, and whether this run bears it out.

    Attributes:
        kind: "at least" or "at most": how ``value`` must stand to ``target``.
        value: as measured in this run; None: could not be measured.
    """

    name: str
    value: float | None
    kind: Literal["at least", "at most"]
    target: float
    unit: str

    @property
    def met(self) -> bool:
        """Whether the value keeps to the target; one that was not measured does not."""
        if self.value is None:
            return False
        return self.value >= self.target if self.kind == "at least" else self.value <= self.target


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser that knows ``--quick``; the first line of the docstring says what it is for."""
    made = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    made.add_argument("--quick", action="store_true", help="end within five minutes")
    return made


def interleaved(
    variants: Mapping[str, Callable[[], float]], repeats: int
) -> dict[str, list[float]]:
    """Samples by variant: each round runs every variant once, every other round backwards."""
    samples: dict[str, list[float]] = {name: [] for name in variants}
    for index in range(repeats):
        names = list(variants) if index % 2 == 0 else list(variants)[::-1]
        for name in names:
            samples[name].append(variants[name]())
    return samples


def median(samples: Sequence[float]) -> float:
    """The median."""
    return statistics.median(samples)


def spread(samples: Sequence[float]) -> str:
    """Smallest to largest sample, for a table."""
    return f"{min(samples):.3g}-{max(samples):.3g}"


def finish(
    name: str,
    settings: Mapping[str, Any],
    samples: Mapping[str, Any],
    rows: Sequence[Mapping[str, str]],
    targets: Sequence[Target],
) -> None:
    """Print a table of ``rows`` and one of ``targets``; write ``results/NAME.json``."""
    _show(name, rows)
    _show("targets", [_target_row(target) for target in targets])
    entries = [{**asdict(target), "met": target.met} for target in targets]
    result = {
        "benchmark": name,
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "machine": asdict(this_machine()),
        "settings": dict(settings),
        "samples": dict(samples),
        "rows": [dict(row) for row in rows],
        "targets": entries,
    }
    _RESULTS.mkdir(exist_ok=True)
    path = _RESULTS / f"{name}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"\nwritten: benchmarks/results/{path.name}")


def _target_row(target: Target) -> dict[str, str]:
    value = "not measured" if target.value is None else f"{target.value:.4g} {target.unit}"
    return {
        "name": target.name,
        "value": value,
        "target": f"{target.kind} {target.target:.4g} {target.unit}",
        "met": "yes" if target.met else "NO",
    }


def _show(title: str, rows: Sequence[Mapping[str, str]]) -> None:
    print(f"\n{title}\n{pd.DataFrame(rows).to_string(index=False)}")
