"""Doubles that ship with the library, for its tests and for those of its users."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from torch import Tensor, nn
from torch.nn import functional as F

from pbkd.data import Split
from pbkd.measure import Unwrapped


def random_split(
    num_images: int, *, channels: int = 1, size: int = 8, num_classes: int = 3, seed: int = 0
) -> Split:
    """Images of noise, (num_images, channels, size, size); the labels go round the classes."""
    rng = np.random.default_rng(seed)
    return Split(
        images=rng.integers(0, 256, (num_images, channels, size, size), dtype=np.uint8),
        labels=np.arange(num_images) % num_classes,
    )


class OverwritingNet(nn.Module):
    """A residual network whose operations overwrite their neighbours' activations.

    The output of ``stem`` by a ReLU, the output of ``branch`` by the addition of the skip, the
    input of ``entry`` by its own first operation; nothing overwrites those of ``tail``.

    Args:
        in_place: False: the same function, without overwriting.
    """

    def __init__(self, *, in_place: bool = True, channels: int = 4, num_classes: int = 3) -> None:
        super().__init__()
        self.in_place = in_place
        self.stem = nn.Conv2d(1, channels, 3, padding=1)
        self.relu = nn.ReLU(in_place)
        self.branch = nn.Conv2d(channels, channels, 3, padding=1)
        self.entry = nn.Sequential(
            nn.LeakyReLU(0.5, in_place), nn.Conv2d(channels, channels, 3, padding=1)
        )
        self.tail = nn.Conv2d(channels, channels, 3, padding=1)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x_nchw: Tensor) -> Tensor:
        """(N, 1, H, W) to (N, num_classes) logits."""
        skip = self.relu(self.stem(x_nchw))
        x = self.branch(skip)
        x = x.add_(skip) if self.in_place else x + skip
        x = F.relu(self.tail(self.entry(x)))
        return self.fc(x.mean((2, 3)))  # type: ignore[no-any-return]


class ReplayedCounter:
    """An energy counter that replays a list of readings.

    Args:
        name: of the device.
        readings_j: what the device says, in joules, one per reading; an exception is raised in its
            turn (an OSError is what a meter expects of a device).
        range_j: where the device wraps to 0, joules; None: a fall means that it was reset.
        source: as the reading will state it.
        poll_interval_s: as in ``EnergyCounter``; a polled counter is read once more as polling
            begins.
    """

    def __init__(
        self,
        name: str,
        readings_j: Iterable[float | Exception],
        *,
        range_j: float | None = None,
        source: str = "replayed",
        poll_interval_s: float | None = None,
    ) -> None:
        self.name = name
        self.source = source
        self.poll_interval_s = poll_interval_s
        self._readings = iter(readings_j)
        self._unwrapped = Unwrapped(range_j)

    def read_j(self) -> float:
        """The next reading, made monotone; AssertionError where none is left."""
        reading = next(self._readings, None)
        assert reading is not None, f"{self.name}: no reading is left"
        if isinstance(reading, Exception):
            raise reading
        return self._unwrapped.update(reading)
