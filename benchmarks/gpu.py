"""Blockwise distillation on one GPU by pbkd and by the published algorithm: time, energy, loss.

Claim: one H200 trains the replacements of VGG-16's 13 convolutions (two separable layers each, as
in Blakeney et al., arXiv 2012.03096) for 16 epochs of 45,000 32x32 images in at most 20 s; in at
most 3 times the least that the device allows (benchmarks/floor.py); and for at least 29 % less
energy than the published algorithm, to the same validation losses.

Variants, from equal weights, on equal batches and by equal steps (bfloat16 autocast):

- published: a job per block, each with its own pass of the teacher up to its block; one epoch;
- relay: pbkd, one teacher pass per batch for all blocks;
- cache: pbkd, activations resident in GPU memory; filling (through the disk) is counted. Where two
  views do not fit into 60 % of the free memory, onto the disk or into the call, one is taken, then
  a part of the images, and the note says so.

pbkd's steps are recorded as CUDA graphs. ``torch.compile`` of the candidates on top of that made a
step 4 % faster on an H200 and took 12 s to compile: it is no variant.

"16 epochs" is 16 times the median epoch, or the time of all 16 where the call has time for them; of
a part of the images, times the images left out. Validation is outside of every time. Joules are
NVML's, of the whole GPU, idle draw included. Losses are compared after the first epoch.

It needs the library alone, not the pipeline. Samples go to results/gpu.partial.json as they come.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from case import Cache, Case, Pbkd, Size, Variant, make_case, val_losses
from floor import floor_of, measure_rates
from harness import finish, parser
from outcome import CACHE, PUBLISHED, RELAY, Cost, Outcome, Result
from published import Published

from pbkd.activations import CacheSource, RelaySource
from pbkd.devices import best_device, is_mixed_on
from pbkd.measure import EnergyMeter, device_info, nvml_counters

_FULL = Size("cifar_vgg16", num_train=45_000, num_val=2048, batch_size=512)
_TOY = Size("cifar_vgg16", num_train=256, num_val=64, width=0.125, batch_size=64, epochs=2)
_LIMIT_S = 500.0
_SHARE_OF_GPU = 0.6  # as CacheSource has it
_SHARE_OF_DISK = 0.9
_PARTIAL = Path(__file__).parent / "results" / "gpu.partial.json"
_NOTE = (
    "Published (arXiv 2012.03096, VGG-16, CIFAR-10): 3,920 s on one RTX 2080 Ti, 1,275 s on four."
)
_CPU_NOTE = "On a CPU: a check of this script alone; no figure here says anything of pbkd."


def main() -> None:
    """Run what the time allows, print, write the results."""
    options = _options()
    device = torch.device(options.device)
    bench = _Bench(make_case(options.size, options.data, device), options)
    rates = measure_rates(device)
    floor = floor_of(bench.case, rates)
    bench.settings |= {"rates": asdict(rates), "floor": asdict(floor)}
    print(f"floor: {floor.duration_s:.3g} s", flush=True)
    with tempfile.TemporaryDirectory(prefix="pbkd-gpu-", dir=options.folder) as folder:
        bench.run(Path(folder))
    size = options.size
    result = Result(
        num_images=len(bench.case.train),
        epochs=size.epochs,
        floor_s=floor.duration_s,
        outcomes=bench.outcomes,
        skipped=bench.skipped,
    )
    targets = result.targets(on_gpu=bench.on_gpu, full_size=size == _FULL)
    finish("gpu", bench.settings, bench.samples(), result.rows(), targets)
    _PARTIAL.unlink(missing_ok=True)
    print(_NOTE if device.type == "cuda" else f"{_NOTE}\n{_CPU_NOTE}")


def _options() -> argparse.Namespace:
    arguments = parser(__doc__)
    arguments.add_argument("--device", choices=("cpu", "cuda"), default=best_device().type)
    arguments.add_argument("--data", type=Path, help="a folder of prepared 32x32 RGB images")
    arguments.add_argument("--folder", type=Path, help="where the cache lies while it is filled")
    arguments.add_argument("--images", type=int, help="training images (45,000; 256 on a CPU)")
    arguments.add_argument("--width", type=float, help="factor on channels (1; 0.125 on a CPU)")
    arguments.add_argument("--limit", type=float, help="seconds of the whole call, about")
    options = arguments.parse_args()
    if options.device == "cpu" and not options.quick:
        arguments.error("the full size needs a GPU; pass --quick")
    size = _TOY if options.device == "cpu" else _FULL
    num_train = options.images or size.num_train
    options.size = replace(
        size,
        num_train=num_train,
        width=options.width or size.width,
        batch_size=min(size.batch_size, num_train // 2),
    )
    options.limit = options.limit or (_LIMIT_S / 2 if options.quick else _LIMIT_S)
    return options


# ---------------------------------------------------------------- measuring


@dataclass
class _Bench:
    """One call: the case, what is left of its time, and what was measured so far."""

    case: Case
    options: argparse.Namespace
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.on_gpu = self.case.device.type == "cuda"
        self.deadline: float = time.perf_counter() + self.options.limit
        self.capture = self.case.capture()
        self.before = val_losses(self.case, self.capture, self.case.candidates)
        self.meter = EnergyMeter([c for c in nvml_counters() if c.name == _nvml_name(self.on_gpu)])
        self.settings = _settings(self.case, self.options)

    def run(self, folder: Path) -> None:
        """All variants, in turn; the cache goes last, as it may take what time is left."""
        case, batch_size = self.case, self.case.distill.batch_size
        few = case.smaller(2 * batch_size, 1)

        def published(case: Case) -> Variant:
            return Published(case.teacher, case.candidates, case.train, case.recipe)

        def relay(case: Case) -> Variant:
            source = RelaySource(self.capture, case.train, case.val, batch_size)
            return Pbkd(case, source, folder / "progress")

        published(few).epoch(0)  # warm-ups
        relay(few).epoch(0)
        self._train(PUBLISHED, published(case), share=0.0)
        self._train(RELAY, relay(case), share=0.4)
        self._optional(CACHE, lambda: self._cache(folder, few))

    def samples(self) -> dict[str, Any]:
        """Losses of the initial candidates, and what each variant took so far."""
        outcomes = {name: asdict(outcome) for name, outcome in self.outcomes.items()}
        return {"before": self.before, **outcomes}

    def _cache(self, folder: Path, few: Case) -> None:
        warm = self._timed(lambda: self._filled(few, folder / "few"))
        case, note = self._what_fits(folder, warm.duration_s / len(few.train))
        sources: list[CacheSource] = []
        fill = self._timed(lambda: sources.append(self._filled(case, folder / "cache")))
        shutil.rmtree(folder / "cache")  # all of it is on the device
        scale = len(self.case.train) / len(case.train)
        kept = {"fill": fill, "scale": scale, "note": note}
        variant = Pbkd(case, sources[0], folder / "progress")
        self._train(CACHE, variant, share=0.8, **kept)

    def _optional(self, name: str, run: Callable[[], None]) -> None:
        """Run what may fail without loss of the other variants' figures."""
        try:
            run()
        except Exception as error:  # noqa: BLE001 - whatever the compiler or the disk raises
            self.skipped[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            print(f"{name}: skipped: {self.skipped[name]}", flush=True)

    def _filled(self, case: Case, folder: Path) -> CacheSource:
        cache = Cache(case, self.capture)
        source = cache.source(cache.fill(folder), resident=True)
        for view in range(case.activations.views):  # the first batch of a view loads the view
            next(iter(source.epoch(view, case.paths)))
        return source

    def _what_fits(self, folder: Path, image_s: float) -> tuple[Case, str]:
        """The case with as many views and images as can be cached, and what it lacks, and why."""
        case, batch_size = self.case, self.case.distill.batch_size
        image = self.capture(case.train.plain(torch.arange(1)))
        image_bytes = sum(side.nbytes for pair in image.values() for side in vars(pair).values())
        room = {
            "the disk": int(_SHARE_OF_DISK * shutil.disk_usage(folder).free / image_bytes),
            "the call's time": int(0.5 * self._left_s() / image_s),
        }
        if self.on_gpu:
            torch.cuda.empty_cache()
            free_bytes, _ = torch.cuda.mem_get_info()
            room["60 % of GPU memory"] = int(_SHARE_OF_GPU * free_bytes / image_bytes)
        least = min(room, key=room.__getitem__)
        wanted = case.activations.views
        views = max(1, min(wanted, room[least] // len(case.train)))
        num = min(len(case.train), max(batch_size, room[least] // batch_size * batch_size))
        note = f"{views} of {wanted} views, {num} of {len(case.train)} images"
        note += f", {views * num * image_bytes / 1e9:.3g} GB"
        short = views < wanted or num < len(case.train)
        return case.smaller(num, views), f"{note}; limit: {least}" if short else note

    def _train(self, name: str, variant: Variant, share: float, **kept: Any) -> None:
        """One epoch, then as many of the others as a share of the time left allows."""
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        epochs = [self._timed(lambda: variant.epoch(0))]
        peak_bytes = torch.cuda.max_memory_allocated() if self.on_gpu else None
        losses = val_losses(self.case, self.capture, variant.candidates)
        more = int(share * self._left_s() / epochs[0].duration_s)
        for epoch in range(1, min(self.case.distill.epochs, 1 + more)):
            epochs += [self._timed(partial(variant.epoch, epoch))]
        self.outcomes[name] = Outcome(epochs, losses, peak_bytes, **kept)
        _PARTIAL.parent.mkdir(exist_ok=True)
        found = {"settings": self.settings, "samples": self.samples()}
        _PARTIAL.write_text(json.dumps(found, indent=2) + "\n")
        print(f"{name}: {len(epochs)} epochs, {self._left_s():.0f} s left", flush=True)

    def _timed(self, run: Callable[[], object]) -> Cost:
        self._synchronise()
        with self.meter.window("benchmark") as window:
            run()
            self._synchronise()
        return Cost(window.result.duration_s, window.result.total_j)

    def _synchronise(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def _left_s(self) -> float:
        return max(0.0, self.deadline - time.perf_counter())


def _nvml_name(on_gpu: bool) -> str | None:
    """Name of the counter of torch's GPU; None: there is none, or it cannot be told."""
    if not on_gpu:
        return None
    uuid = getattr(torch.cuda.get_device_properties("cuda"), "uuid", None)
    gpus = device_info()
    same = [gpu for gpu in gpus if gpu.uuid == f"GPU-{uuid}"] or (gpus if len(gpus) == 1 else [])
    return same[0].name if same else None


def _settings(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    return {
        "device": options.device,
        "gpus": [asdict(gpu) for gpu in device_info()],
        "size": asdict(options.size),
        "data": "synthetic" if options.data is None else "prepared",
        "views": case.activations.views,
        "dtype": case.activations.dtype,
        "mixed_precision": is_mixed_on(torch.device(options.device), case.distill.mixed_precision),
        "tf32_convolutions": torch.backends.cudnn.allow_tf32,
        "published": _NOTE,
        **({} if options.device == "cuda" else {"warning": _CPU_NOTE}),
    }


if __name__ == "__main__":
    main()
