"""Runs that are large in one way: a network of 500 blocks, and images that exceed the memory.

- blocks: a residual network of 500 convolutions on the digits, a candidate for each, two workers;
- memory: prepared images of twice the memory that all processes of the run may take together, page
  cache included, held there by a control group of Linux (which needs root).

Both runs are `dvc repro`, from nothing to a registered model. Targets: all candidates are trained,
DVC finds all up to date, and the memory kept within its limit without a process killed for it.

    .venv/bin/python benchmarks/large.py [--part blocks|memory] [--quick]
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import harness
import numpy as np
from PIL import Image
from programs import output_of, run
from workspaces import make_workspace

MIB = 1 << 20
_MEMORY = Path("/sys/fs/cgroup/memory")  # version 1
_UNIFIED = Path("/sys/fs/cgroup")  # version 2
_CLASSES = 4
_LONGEST_S = 2 * 3600.0

NETWORK = """
from torch import nn


class Layer(nn.Module):
    def __init__(self, channels, share):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.share = share

    def forward(self, x):
        return x + self.share * self.conv(x).relu()


class Deep(nn.Module):
    def __init__(self, num_classes, in_channels, depth, channels, stride):
        super().__init__()
        self.stem = nn.Conv2d(in_channels, channels, stride, stride)
        self.layers = nn.Sequential(*(Layer(channels, depth**-0.5) for _ in range(depth)))
        self.head = nn.Linear(channels, num_classes)

    def forward(self, x):
        return self.head(self.layers(self.stem(x)).mean((2, 3)))


def deep(num_classes, in_channels):
    return Deep(num_classes, in_channels, {depth}, 16, {stride})
"""
_PARAMS: dict[str, dict[str, Any]] = {
    "teacher": {"model": "network:deep", "epochs": 1, "lr": 0.02, "min_accuracy": 0.0},
    "blocks": {
        "select": "paths",
        "paths": ["layers.*.conv"],
        "candidates": [{"kind": "separable"}],
    },
    "activations": {"source": "relay"},
    "distill": {"epochs": 1},
    "stitch": {"students": {"half": {"max_parameters": 0.6}}, "max_damage": 1e9},
    "finetune": {"epochs": 1},
    "shrink": {"recipe": []},
    "evaluate": {"latency_batch_sizes": [1], "latency_seconds": 0.05, "runtimes": ["pytorch"]},
    "register": {"name": "large"},
}


def main() -> None:
    """Run, print and write."""
    arguments = harness.parser(__doc__)
    arguments.add_argument("--part", choices=["blocks", "memory"], help="one of the two only")
    options = arguments.parse_args()
    rows: list[dict[str, str]] = []
    targets: list[harness.Target] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if options.part != "memory":
            depth = 50 if options.quick else 500
            row, found = blocks(folder / "blocks", depth)
            rows.append(row)
            targets += found
        if options.part != "blocks":
            row, found = memory(folder / "memory", 6000 if options.quick else 8000, pixels=512)
            rows.append(row)
            targets += found
    harness.finish("large", {"params": _PARAMS}, {}, rows, targets)


def blocks(root: Path, depth: int) -> tuple[dict[str, str], list[harness.Target]]:
    """A run with so many blocks."""
    _workspace(root, {"prepare": {"image_size": 8}}, depth, stride=1)
    duration_s = _repro(root)
    trained = len(list((root / ".pbkd" / "store" / "trainees").glob("[!.]*/result.json")))
    row = {"run": f"{depth} blocks", "seconds": f"{duration_s:.0f}", "trained": str(trained)}
    return row, [
        harness.Target(f"{depth} blocks: candidates trained", trained, "at least", depth, ""),
        _clean(f"{depth} blocks", root),
    ]


def memory(root: Path, num_images: int, pixels: int) -> tuple[dict[str, str], list[harness.Target]]:
    """A run whose images are larger than its memory."""
    images_bytes = num_images * 3 * pixels * pixels
    limit_bytes = images_bytes // 2
    _images(root.with_name("images"), num_images)
    prepare = {
        "source": "image_folder",
        "path": str(root.with_name("images")),
        "image_size": pixels,
    }
    _workspace(root, {"prepare": prepare, **_few_at_once()}, depth=30, stride=32)
    with _limited(limit_bytes) as group:
        duration_s = _repro(root, group.procs)
        peak_bytes, num_killed = group.peak_bytes(), group.num_killed()
    arrays = (root / "data" / "prepared").rglob("*.npy")
    prepared_bytes = sum(path.stat().st_size for path in arrays)
    row = {
        "run": f"{prepared_bytes / MIB:.0f} MiB of images in {limit_bytes / MIB:.0f} MiB",
        "seconds": f"{duration_s:.0f}",
        "peak MiB": f"{peak_bytes / MIB:.0f}",
    }
    return row, [
        harness.Target(
            "images over the memory of all processes", prepared_bytes / limit_bytes, "at least",
            1.5, "x",
        ),
        harness.Target("processes killed for their memory", num_killed, "at most", 0, ""),
        _clean("images larger than memory", root),
    ]  # fmt: skip


def _few_at_once() -> dict[str, Any]:
    """Batches of sixteen images of 3 MB each, as floats."""
    few = {"batch_size": 16}
    stitch = _PARAMS["stitch"] | {"repair": few}
    return {name: _PARAMS[name] | few for name in ("teacher", "distill", "finetune")} | {
        "stitch": stitch
    }


def _workspace(
    root: Path, changes: Mapping[str, Mapping[str, Any]], depth: int, stride: int
) -> None:
    make_workspace(root, _PARAMS | changes)
    text = NETWORK.replace("{depth}", str(depth)).replace("{stride}", str(stride))
    (root / "network.py").write_text(text)


def _repro(root: Path, procs: Path | None = None) -> float:
    began_s = time.monotonic()
    run(root, "dvc repro", procs=procs, longest_s=_LONGEST_S)
    return time.monotonic() - began_s


def _clean(name: str, root: Path) -> harness.Target:
    is_clean = "up to date" in output_of(root, "dvc status")
    registered = json.loads((root / "results" / "registered.json").read_text())["versions"]
    good = is_clean and "half" in registered
    return harness.Target(f"{name}: up to date and registered", float(good), "at least", 1, "")


def _images(folder: Path, num_images: int) -> None:
    """Small JPEGs of noise on four colours; prepared they are large."""
    random = np.random.default_rng(0)
    for number in range(num_images):
        label = number // 10 % _CLASSES  # each split has all
        noise = random.integers(0, 128, (32, 32, 3), dtype=np.uint8)
        noise[..., label % 3] += np.uint8(64 + 20 * label)
        path = folder / ("test" if number % 10 == 0 else "train") / f"class{label}"
        path.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise).save(path / f"{number:05d}.jpg")


class _Group:
    """A control group of the memory of some processes, of either version."""

    def __init__(self, limit_bytes: int) -> None:
        self._is_old = _MEMORY.is_dir()
        self._folder = (_MEMORY if self._is_old else _UNIFIED) / f"pbkd-{time.monotonic_ns()}"
        self._folder.mkdir()
        self.procs = self._folder / "cgroup.procs"
        limit = "memory.limit_in_bytes" if self._is_old else "memory.max"
        (self._folder / limit).write_text(str(limit_bytes))

    def peak_bytes(self) -> int:
        """Most that they took."""
        name = "memory.max_usage_in_bytes" if self._is_old else "memory.peak"
        return int((self._folder / name).read_text())

    def num_killed(self) -> int:
        """Processes that were killed because they took more."""
        name = "memory.oom_control" if self._is_old else "memory.events"
        counts = dict(line.split() for line in (self._folder / name).read_text().splitlines())
        return int(counts.get("oom_kill", 0))

    def remove(self) -> None:
        """Once the processes have ended."""
        self._folder.rmdir()


@contextmanager
def _limited(limit_bytes: int) -> Iterator[_Group]:
    group = _Group(limit_bytes)
    try:
        yield group
    finally:
        group.remove()


if __name__ == "__main__":
    main()
