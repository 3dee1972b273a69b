"""Repair of a stitched student by each method: accuracy kept, at equal images and seconds.

Claim: gradients through the whole student (``joint``) repair more per second than blocks that
learn alone on the student's inputs (``local``) or on a mixture with the teacher's (``mixed``).

Every candidate of the first kind is put into the teacher, batch norm is recalibrated, and each
method begins with that student. "Equal images": one pass over the same images each. "Equal
seconds": as many images as take each method as long as the dearest one took for those. Accuracies
and KL divergences are of validation images; seconds are the CPU's on a CPU, which other users of
the machine disturb less, and of the clock on a GPU.

``--workspace`` takes a workspace whose stage `distill` is done; without it a small one is made: the
digits in scikit-learn and vgg_small.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from harness import Target, finish, parser
from torch import Tensor
from workspaces import make_workspace, run_stages

from pbkd.artifacts import Workspace, load_tensors
from pbkd.config import RepairConfig
from pbkd.data import Split, Stream
from pbkd.devices import best_device
from pbkd.distill import TRAINEES, damage_kl
from pbkd.distill.trainee import WEIGHTS
from pbkd.models import Classifier, predict
from pbkd.stages.distill import read_distilled
from pbkd.stages.teacher import read_teacher
from pbkd.students import recalibrate, repair, stitch
from pbkd.students.repair import Repair

_METHODS = ("mixed", "local", "joint")
_RECALIBRATED = "recalibrated alone"
_BATCH = 256
_CASE = {
    "teacher": {"model": "vgg_small", "epochs": 8},
    "blocks": {"exclude": ["features.0"]},
    "distill": {"epochs": 2},
}


@dataclass(frozen=True)
class Figures:
    """Of one student, on the validation images.

    Attributes:
        kept: accuracy over the teacher's.
        kl: KL(teacher || student), nats.
        num_images: that it was repaired with.
        duration_s: of the repair.
    """

    kept: float
    kl: float
    num_images: int = 0
    duration_s: float = 0.0


class Mixed(Repair):
    """Blocks learn alone on a half-and-half mixture of inputs, as in QDrop (arXiv 2203.05740)."""

    def local_input(self, path: str, x: Tensor) -> Tensor:
        """Each element is the teacher's or the student's."""
        return torch.where(torch.rand_like(x) < 0.5, self.targets[path].input.to(x.dtype), x)


class Case:
    """A teacher, the stitched and recalibrated student, and images."""

    def __init__(self, workspace: Workspace, num_images: int, seed: int) -> None:
        teacher, card, prepared = read_teacher(workspace)
        distilled = {item.result.block: item for item in reversed(read_distilled(workspace))}
        items = workspace.artifacts("distill") / TRAINEES
        weights = {
            path: load_tensors(items / item.key / WEIGHTS) for path, item in distilled.items()
        }
        configs = {path: item.result.config for path, item in distilled.items()}
        device = best_device()
        self.teacher = teacher.to(device)
        self.paths = list(distilled)
        self.network = f"{card.network.name}, width {card.network.width:g}"
        self.train, val = prepared.split("train"), prepared.split("val")
        self.num_images = min(num_images, len(self.train))
        self.seed, self.augment, self.device = seed, card.augment, device
        self.val = Stream(val, seed=seed, augment=card.augment, device=device)
        self.logits_nk = predict(self.teacher, self.val, batch_size=_BATCH)
        self.stitched = stitch(teacher, configs, weights).to(device)
        self.student = copy.deepcopy(self.stitched)
        recalibrate(self.student, self.stream(len(self.train)), num_batches=16, batch_size=_BATCH)

    @property
    def share(self) -> float:
        """The student's parameters over the teacher's."""
        counts = [sum(p.numel() for p in m.parameters()) for m in (self.student, self.teacher)]
        return counts[0] / counts[1]

    def stream(self, num_images: int) -> Stream:
        """The first training images."""
        split = Split(self.train.images[:num_images], self.train.labels[:num_images])
        return Stream(split, seed=self.seed, augment=self.augment, device=self.device)

    def figures(self, student: Classifier, num_images: int = 0, duration_s: float = 0) -> Figures:
        """How well a student does."""
        found = predict(student, self.val, batch_size=_BATCH)
        kl = float(damage_kl(self.logits_nk.logits_nk, found.logits_nk))
        return Figures(found.accuracy / self.logits_nk.accuracy, kl, num_images, duration_s)

    def repaired(self, method: str, num_images: int, history: Path) -> Figures:
        """One pass over so many images."""
        student = copy.deepcopy(self.student)
        name = "local" if method == "mixed" else method
        config = RepairConfig.model_validate({"method": name, "epochs": 1})
        train = self.stream(num_images)
        began_at = self._now()
        if method == "mixed":
            Mixed(student, self.teacher, self.paths, train, config).run(history, self.val)
        else:
            repair(student, self.teacher, self.paths, train, config, history, val=self.val)
        return self.figures(student, num_images, self._now() - began_at)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()


def main() -> None:
    """Compare on the given workspace or on a small one of our own; print, write the results."""
    arguments = parser(__doc__)
    arguments.add_argument("--workspace", type=Path, help="one whose stage `distill` is done")
    arguments.add_argument("--images", type=int, help="training images of a pass")
    arguments.add_argument("--seed", type=int, default=0)
    options = arguments.parse_args()
    num_images = options.images or (2000 if options.quick else 10_000)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pbkd-repair-")))
        workspace = _own(folder / "case")
        if options.workspace is not None:
            root = options.workspace.resolve()
            workspace = Workspace(root, root / ".pbkd")
        else:
            run_stages(workspace, "prepare", "teacher", "blocks", "activations", "distill")
        case = Case(workspace, num_images, options.seed)
        before = {
            "stitched": case.figures(case.stitched),
            _RECALIBRATED: case.figures(case.student),
        }
        history = folder / "repair.jsonl"
        equal_images = {m: case.repaired(m, case.num_images, history) for m in _METHODS}
        equal_seconds = _equal_seconds(case, equal_images, history)
    settings = {
        "network": case.network,
        "teacher_val_accuracy": case.logits_nk.accuracy,
        "share_of_parameters": case.share,
        "blocks": len(case.paths),
        "val_images": len(case.val),
        "repair": RepairConfig(epochs=1).model_dump(exclude={"method"}),
        "threads": torch.get_num_threads(),
        "device": case.device.type,
        "torch": torch.__version__,
        "seed": options.seed,
    }
    groups = {"": before, "images": equal_images, "seconds": equal_seconds}
    rows = [
        _row(case, equal, name, f) for equal, found in groups.items() for name, f in found.items()
    ]
    samples = {f"equal {k}": {n: asdict(f) for n, f in g.items()} for k, g in groups.items()}
    finish("repair", settings, samples, rows, _targets(before[_RECALIBRATED], equal_seconds))


def _own(folder: Path) -> Workspace:
    return make_workspace(folder, _CASE)


def _equal_seconds(
    case: Case, equal_images: Mapping[str, Figures], history: Path
) -> dict[str, Figures]:
    """A pass over as many images as take the dearest method's seconds, or all share a smaller."""
    per_image = {name: found.duration_s / found.num_images for name, found in equal_images.items()}
    seconds = min(
        max(per_image.values()) * case.num_images, min(per_image.values()) * len(case.train)
    )
    return {
        name: case.repaired(name, int(seconds / cost), history) for name, cost in per_image.items()
    }


def _row(case: Case, equal: str, name: str, found: Figures) -> dict[str, str]:
    return {
        "network": f"{case.network}, {case.share:.0%} of the parameters",
        "equal": equal,
        "method": name,
        "images": str(found.num_images or ""),
        "s": f"{found.duration_s:.3g}" if found.duration_s else "",
        "accuracy kept": f"{found.kept:.1%}",
        "KL": f"{found.kl:.3f}",
    }


def _targets(before: Figures, found: Mapping[str, Figures]) -> list[Target]:
    joint = found["joint"].kept
    gains = {
        _RECALIBRATED: 100 * (joint - before.kept),
        **{name: 100 * (joint - found[name].kept) for name in ("mixed", "local")},
    }
    return [
        Target(f"joint over {name}, equal seconds", gain, "at least", 0.0, "points kept")
        for name, gain in gains.items()
    ]


if __name__ == "__main__":
    main()
