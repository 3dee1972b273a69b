"""Blockwise distillation by pbkd, by the published algorithm, and by plain PyTorch: time and loss.

Claim: on one CPU core, training every 3x3 convolution's replacement (two separable layers, as in
Blakeney et al., arXiv 2012.03096) for 16 epochs of VGG-16 takes pbkd at most 1/3.5 of the time of
the published algorithm, which runs the teacher's prefix again for every block; and no longer than
one joint loss over all blocks in plain PyTorch; to the same validation losses.

Variants, all with the same teacher, images, order, augmentation, initial candidates, batch,
optimizer, schedule, rounding of activations and memory layout (benchmarks/published.py):

- published: a job per block, each with its own pass of the teacher up to its block;
- published, NCHW: the same in PyTorch's default layout, as plain users run it (no target);
- joint: one teacher pass and one loss over all blocks;
- torchdistill: the same by that library, where it is installed (no target);
- relay: pbkd, one teacher pass per batch for all blocks;
- cache: pbkd, activations from disk; filling is counted, for all views.

An epoch is the training of all candidates on all training images; validation is left out of every
variant's time. Samples are single epochs, taken in turn. "16 epochs" is 16 times the median epoch,
and the filling for the cache; the ResNet case of the full run goes through all 16 epochs and
compares. One process on one CPU core, the cache's reader included.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from case import Cache, Case, Pbkd, Size, Variant, make_case, val_losses
from harness import Target, finish, interleaved, median, parser, spread
from published import Joint, Published, Torchdistill

from pbkd.activations import CacheSource, Capture, RelaySource
from pbkd.allocator import keep_freed_memory

_EPOCHS = 16
_PUBLISHED, _JOINT, _RELAY, _CACHE, _FILL = "published", "joint", "relay", "cache", "fill"


def main() -> None:
    """Run both cases, print, write the results."""
    arguments = parser(__doc__)
    arguments.add_argument("--data", type=Path, help="a folder of prepared 32x32 RGB images")
    arguments.add_argument("--epochs", type=int, help="epochs really run, for both networks")
    options = arguments.parse_args()
    _use_one_core()
    num_train = 256 if options.quick else 512
    plan = {"cifar_vgg16": 2 if options.quick else 6, "cifar_resnet20": 4 if options.quick else 16}
    rows: list[dict[str, str]] = []
    samples: dict[str, Any] = {}
    targets: list[Target] = []
    for network, epochs in plan.items():
        case = make_case(Size(network, num_train, epochs=_EPOCHS), options.data)
        measured = _measure(case, options.epochs or epochs)
        samples[network] = asdict(measured)
        rows += _rows(case, measured)
        targets += _targets(case, measured)
    settings = {
        "images": num_train,
        "batch": case.distill.batch_size,
        "views": case.activations.views,
        "dtype": case.activations.dtype,
        "loss": case.distill.loss,
        "optimizer": case.distill.optimizer,
        "threads": 1,
        "torch": torch.__version__,
        "data": "synthetic" if options.data is None else "prepared",
    }
    finish("blocks", settings, samples, rows, targets)


def _use_one_core() -> None:
    keep_freed_memory()  # as pbkd's workers do; all variants gain
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):  # the cache's reader has a thread of its own
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


# ---------------------------------------------------------------- measuring


@dataclass(frozen=True)
class Measured:
    """What ``interleaved`` gave, the CPU's share of it, and losses by variant and block.

    ``losses["before"]`` is of the initial candidates.
    """

    seconds: dict[str, list[float]]
    cpu_s: dict[str, list[float]]
    losses: dict[str, dict[str, float]]

    def projected_s(self, name: str, num_samples: int | None = None, *, cpu: bool = False) -> float:
        """Time of the whole training, by the median of the first samples (default: of all)."""
        samples = self.cpu_s if cpu else self.seconds
        fill = median(samples[_FILL][:num_samples]) if name == _CACHE else 0.0
        return fill + _EPOCHS * median(samples[name][:num_samples])

    def run_s(self, name: str) -> float | None:
        """Time of the whole training as it was; None: not all epochs were run."""
        if len(self.seconds[name]) != _EPOCHS:
            return None
        fill = self.seconds[_FILL][0] if name == _CACHE else 0.0
        return fill + sum(self.seconds[name])

    def mean_loss(self, name: str) -> float:
        """Of the blocks."""
        return sum(self.losses[name].values()) / len(self.losses[name])

    def deviation(self, name: str) -> float:
        """Largest relative difference of a block's validation loss from the published one's."""
        wanted = self.losses[_PUBLISHED]
        return max(abs(loss / wanted[path] - 1) for path, loss in self.losses[name].items())


def _measure(case: Case, epochs: int) -> Measured:
    capture = case.capture()
    cache = Cache(case, capture)
    with tempfile.TemporaryDirectory(prefix="pbkd-blocks-") as folder:
        source = cache.source(cache.fill(Path(folder, "read")))
        variants = _variants(case, capture, source, Path(folder, "progress"))
        clocks = {name: _Clock(variant.epoch) for name, variant in variants.items()}
        spare = Path(folder, "spare")
        clocks[_FILL] = _Clock(lambda _: cache.fill(spare), after=lambda: shutil.rmtree(spare))
        seconds = interleaved(clocks, epochs)
    trained = {name: variant.candidates for name, variant in variants.items()}
    losses = {
        name: val_losses(case, capture, candidates)
        for name, candidates in {"before": case.candidates, **trained}.items()
    }
    return Measured(seconds, {name: clock.cpu_s for name, clock in clocks.items()}, losses)


def _variants(
    case: Case, capture: Capture, cache: CacheSource, progress: Path
) -> dict[str, Variant]:
    recipe = case.recipe
    plain = replace(recipe, layout=torch.contiguous_format)
    relay = RelaySource(capture, case.train, case.val, case.distill.batch_size)
    start = (case.teacher, case.candidates, case.train)
    variants: dict[str, Variant] = {
        _PUBLISHED: Published(*start, recipe),
        f"{_PUBLISHED}, NCHW": Published(*start, plain),
        _JOINT: Joint(*start, recipe),
    }
    if Torchdistill.installed():
        variants["torchdistill"] = Torchdistill(*start, recipe)
    return variants | {
        _RELAY: Pbkd(case, relay, progress / _RELAY),
        _CACHE: Pbkd(case, cache, progress / _CACHE),
    }


@dataclass
class _Clock:
    """Calls ``run(k)`` for k = 0, 1, ...; gives the seconds, keeps those of the CPU aside.

    CPU seconds leave out waiting, for the disk and for other users of the machine.
    """

    run: Callable[[int], object]
    after: Callable[[], object] = lambda: None
    cpu_s: list[float] = field(default_factory=list)

    def __call__(self) -> float:
        began, cpu_began = time.perf_counter(), time.process_time()
        self.run(len(self.cpu_s))
        took = time.perf_counter() - began
        self.cpu_s.append(time.process_time() - cpu_began)
        self.after()
        return took


# ---------------------------------------------------------------- reporting


def _rows(case: Case, measured: Measured) -> list[dict[str, str]]:
    rows = []
    for name, seconds in measured.seconds.items():
        row = {
            "network": f"{case.network}, {len(case.paths)} blocks",
            "variant": "cache: filling, once" if name == _FILL else name,
            "s per epoch": f"{median(seconds):.3g} ({spread(seconds)})",
            "CPU s": f"{median(measured.cpu_s[name]):.3g}",
        }
        rows.append(row | (_NO_TRAINING if name == _FILL else _training(measured, name)))
    return rows


_NO_TRAINING = dict.fromkeys(
    (f"{_EPOCHS} epochs, s", "x", "x, CPU", "x, all run", "loss, was", "loss differs by"), ""
)


def _training(measured: Measured, name: str) -> dict[str, str]:
    projected_s, run_s = measured.projected_s(name), measured.run_s(name)
    published_s, published_run_s = measured.projected_s(_PUBLISHED), measured.run_s(_PUBLISHED)
    cpu_s = [measured.projected_s(each, cpu=True) for each in (_PUBLISHED, name)]
    all_run = f"{published_run_s / run_s:.2f}" if published_run_s and run_s else "not run"
    return {
        f"{_EPOCHS} epochs, s": f"{projected_s:.4g}",
        "x": f"{published_s / projected_s:.2f}",
        "x, CPU": f"{cpu_s[0] / cpu_s[1]:.2f}",
        "x, all run": all_run,
        "loss, was": f"{measured.mean_loss(name):.3f}, {measured.mean_loss('before'):.3f}",
        "loss differs by": f"{measured.deviation(name):.2%}",
    }


def _targets(case: Case, measured: Measured) -> list[Target]:
    best = min((_RELAY, _CACHE), key=measured.projected_s)
    ratio = {
        name: measured.projected_s(name) / measured.projected_s(best)
        for name in (_PUBLISHED, _JOINT)
    }
    differs = 100 * max(measured.deviation(name) for name in (_JOINT, _RELAY, _CACHE))
    net = case.network
    targets = [
        Target(f"{net}: pbkd ({best}) over joint", ratio[_JOINT], "at least", 1.0, "x"),
        Target(f"{net}: validation losses, largest difference", differs, "at most", 2.0, "%"),
    ]
    if net == "cifar_vgg16":
        name = f"{net}: pbkd ({best}) over published, {_EPOCHS} epochs"
        targets.insert(0, Target(name, ratio[_PUBLISHED], "at least", 3.5, "x"))
    runs = [measured.run_s(name) for name in (_PUBLISHED, best)]
    if runs[0] and runs[1]:
        early = [measured.projected_s(name, _EPOCHS // 4) for name in (_PUBLISHED, best)]
        off = 100 * abs((runs[0] / runs[1]) / (early[0] / early[1]) - 1)
        name = f"{net}: ratio of whole runs, off the one projected from {_EPOCHS // 4} epochs"
        targets.append(Target(name, off, "at most", 10.0, "%"))
    return targets


if __name__ == "__main__":
    main()
