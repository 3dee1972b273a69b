"""What each variant of benchmarks/gpu.py took, as rows of its table and as its targets."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from harness import Target, median

PUBLISHED, RELAY, CACHE = "published", "relay", "cache"
_MAX_S, _MAX_OVER_FLOOR, _MIN_SAVED, _MAX_DIFFERENCE = 20.0, 3.0, 29.0, 2.0


@dataclass(frozen=True)
class Cost:
    """Time and energy; ``energy_j`` None: could not be read."""

    duration_s: float = 0.0
    energy_j: float | None = 0.0


@dataclass(frozen=True)
class Outcome:
    """What a variant took.

    Attributes:
        epochs: those really run.
        fill: before the first epoch.
        scale: training images of the case over those that the variant had.
        peak_bytes: most GPU memory allocated in the first epoch; None on a CPU.
        losses: validation loss per block after the first epoch.
    """

    epochs: list[Cost]
    losses: dict[str, float]
    peak_bytes: int | None
    fill: Cost = Cost()
    scale: float = 1.0
    note: str = ""

    def epoch_s(self) -> float:
        """The median epoch, of all images."""
        return self.scale * median([cost.duration_s for cost in self.epochs])

    def duration_s(self, epochs: int) -> float:
        """The whole training."""
        run_s = self.scale * sum(cost.duration_s for cost in self.epochs)
        training_s = run_s if len(self.epochs) == epochs else epochs * self.epoch_s()
        return self.scale * self.fill.duration_s + training_s

    def energy_j(self, epochs: int) -> float | None:
        """Joules of the whole training, by the mean epoch; None: one could not be read."""
        read = [cost.energy_j for cost in self.epochs if cost.energy_j is not None]
        if len(read) < len(self.epochs) or self.fill.energy_j is None:
            return None
        return self.scale * (self.fill.energy_j + epochs * statistics.fmean(read))


@dataclass(frozen=True)
class Result:
    """All variants of a call.

    Attributes:
        num_images, epochs: of the whole training.
        floor_s: least time of the whole training (benchmarks/floor.py).
        skipped: variant to why it was left out.
    """

    num_images: int
    epochs: int
    floor_s: float
    outcomes: Mapping[str, Outcome]
    skipped: Mapping[str, str]

    def rows(self) -> list[dict[str, str]]:
        """One per variant."""
        rows = [self._row(name) for name in self.outcomes]
        empty = dict.fromkeys(rows[0], "")
        return rows + [empty | {"variant": name, "note": why} for name, why in self.skipped.items()]

    def targets(self, *, on_gpu: bool, full_size: bool) -> list[Target]:
        """What is not of a GPU, or not of the full size, was not measured."""
        best = min(self._of_pbkd(), key=self._duration_s)
        best_s = self._duration_s(best)
        names, differs = self._compared(), self._largest_difference()
        return [
            Target(
                f"{self.epochs} epochs of all blocks, best mode ({best})",
                best_s if on_gpu and full_size else None,
                "at most",
                _MAX_S,
                "s",
            ),
            Target(
                f"over the floor ({best})",
                best_s / self.floor_s if on_gpu else None,
                "at most",
                _MAX_OVER_FLOOR,
                "x",
            ),
            Target(
                f"joules below the published algorithm's ({best})",
                self._saved(best) if on_gpu else None,
                "at least",
                _MIN_SAVED,
                "%",
            ),
            Target(
                f"validation losses of {'; '.join(names)}: largest difference from published",
                differs,
                "at most",
                _MAX_DIFFERENCE,
                "%",
            ),
        ]

    def _row(self, name: str) -> dict[str, str]:
        outcome, duration_s = self.outcomes[name], self._duration_s(name)
        energy_j, peak = outcome.energy_j(self.epochs), outcome.peak_bytes
        return {
            "variant": name,
            "run": str(len(outcome.epochs)),
            "s per epoch": f"{outcome.epoch_s():.3g}",
            "images/s": f"{self.num_images / outcome.epoch_s():.4g}",
            "fill, s": f"{outcome.scale * outcome.fill.duration_s:.3g}",
            f"{self.epochs} epochs, s": f"{duration_s:.4g}",
            "x": f"{self._duration_s(PUBLISHED) / duration_s:.2f}",
            "over floor": f"{duration_s / self.floor_s:.3g}",
            "J": "null" if energy_j is None else f"{energy_j:.4g}",
            "peak GB": "null" if peak is None else f"{peak / 1e9:.3g}",
            "loss": f"{statistics.fmean(outcome.losses.values()):.4f}",
            "differs": f"{self._difference(name):.2%}",
            "note": outcome.note,
        }

    def _duration_s(self, name: str) -> float:
        return self.outcomes[name].duration_s(self.epochs)

    def _saved(self, name: str) -> float | None:
        """Per cent of the published algorithm's joules."""
        published_j = self.outcomes[PUBLISHED].energy_j(self.epochs)
        energy_j = self.outcomes[name].energy_j(self.epochs)
        if published_j is None or energy_j is None:
            return None
        return 100 * (1 - energy_j / published_j)

    def _of_pbkd(self) -> list[str]:
        return [name for name in self.outcomes if name != PUBLISHED]

    def _compared(self) -> list[str]:
        """Variants that made the published one's steps: those on all images."""
        return [name for name in self._of_pbkd() if self.outcomes[name].scale == 1]

    def _largest_difference(self) -> float | None:
        return max((100 * self._difference(name) for name in self._compared()), default=None)

    def _difference(self, name: str) -> float:
        """Largest relative difference of a block's loss from the published one's."""
        wanted = self.outcomes[PUBLISHED].losses
        losses = self.outcomes[name].losses
        return max(abs(loss / wanted[path] - 1) for path, loss in losses.items())
