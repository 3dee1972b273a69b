"""Throughput of a student's training by where its soft labels come from.

A VGG-16 teacher and a VGG-16 of a tenth of its parameters (fewer channels everywhere), 32x32
images, one thread. ``none``: true labels alone; ``inline``: the teacher runs at every step;
``cached``: its labels were kept (``finetune.teachers: cached``). Weights are random: no figure of
time depends on them. Steps are those of the stage `finetune`; variants run in turns.

    .venv/bin/python benchmarks/elastic.py --quick
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import harness
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pbkd.config import AugmentConfig, FinetuneConfig
from pbkd.data import Split, Stream
from pbkd.data.batches import Batch
from pbkd.models import Classifier, NetworkSpec, Recipe, build_network
from pbkd.models.run import Loss, Run
from pbkd.students.finetune import distilling
from pbkd.elastic.soft_labels import SoftLabels, write_labels

_CLASSES, _PIXELS, _BATCH = 10, 32, 64
_STUDENT_WIDTH = 0.1**0.5
_AUGMENT = AugmentConfig(pad=4, flip=True)
_CONFIG = FinetuneConfig(batch_size=_BATCH, epochs=1000)


def main() -> None:
    """Measure, print, write the results."""
    options = harness.parser(__doc__).parse_args()
    torch.set_num_threads(1)
    num_images, rounds = (256, 4) if options.quick else (1024, 8)
    teacher = _classifier(1.0).eval().requires_grad_(False)
    train = _stream(num_images)
    with tempfile.TemporaryDirectory() as folder:
        began_s = time.perf_counter()
        write_labels(Path(folder), teacher, train, 0, None, _CONFIG.temperature)
        labelling = num_images / (time.perf_counter() - began_s)
        soft = SoftLabels([Path(folder)], _CLASSES, _CONFIG.temperature, "cpu")
        losses: dict[str, Loss] = {
            "none": _from_labels,
            "inline": distilling(teacher, _CONFIG),
            "cached": distilling(soft, _CONFIG),
        }
        students = {name: _classifier(_STUDENT_WIDTH) for name in losses}
        runs = {name: _epoch(students[name], train, loss) for name, loss in losses.items()}
        for run in runs.values():
            run()
        samples = harness.interleaved(runs, rounds)
    rates = {
        name: num_images / harness.median(durations_s) for name, durations_s in samples.items()
    }
    parameters = [sum(p.numel() for p in m.parameters()) for m in (students["none"], teacher)]
    rows = [
        {
            "labels": name,
            "images/s": f"{rate:.1f}",
            "to inline": f"{rate / rates['inline']:.2f}x",
            "spread (s)": harness.spread(samples[name]),
        }
        for name, rate in rates.items()
    ]
    rows.append({"labels": "(labelling)", "images/s": f"{labelling:.1f}"})
    settings = {
        "student_width": _STUDENT_WIDTH,
        "images": num_images,
        "batch_size": _BATCH,
        "share_of_parameters": parameters[0] / parameters[1],
        "teacher_over_step": rates["none"] / labelling,
        "labelling_images_per_s": labelling,
    }
    cached = rates["cached"]
    targets = [
        harness.Target("cached labels", cached / rates["inline"], "at least", 3.125, "x inline"),
        harness.Target("cached labels", cached / rates["none"], "at least", 0.95, "x no teacher"),
    ]
    harness.finish("elastic", settings, samples, rows, targets)


def _classifier(width: float) -> Classifier:
    torch.manual_seed(0)
    spec = NetworkSpec(name="cifar_vgg16", num_classes=_CLASSES, in_channels=3, width=width)
    return Classifier(build_network(spec), (0.5,) * 3, (0.25,) * 3)


def _stream(num_images: int) -> Stream:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (num_images, 3, _PIXELS, _PIXELS), dtype=np.uint8)
    split = Split(images, rng.integers(0, _CLASSES, num_images))
    return Stream(split, seed=0, augment=_AUGMENT, views=1)


def _from_labels(batch: Batch, logits_nk: Tensor) -> Tensor:
    return F.cross_entropy(logits_nk, batch.labels_n)


def _epoch(student: Classifier, train: Stream, loss: Loss) -> Callable[[], float]:
    """One epoch of a training; returns its seconds, validation left out."""
    run = Run(student, train, _stream(_BATCH), loss, Recipe.of(_CONFIG))

    def epoch() -> float:
        began_s = time.perf_counter()
        run._train()
        return time.perf_counter() - began_s

    return epoch


if __name__ == "__main__":
    main()
