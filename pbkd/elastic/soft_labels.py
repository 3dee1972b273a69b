"""A teacher's logits for augmented views of the images: computed once, read by every student.

A view is labelled as a whole and kept in half precision: all K logits of an image, or its k largest
ones and one number for the rest. Fine-tuning with ``teachers: cached`` reads them instead of
running the teacher at every step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pbkd.artifacts import digest_of, new_array
from pbkd.config import FinetuneConfig
from pbkd.data.batches import Batch, Stream
from pbkd.models import Classifier, ModelCard

ALGORITHM = 1
"""Raised whenever the same settings would give other labels."""

RECORD = "labels.json"

_BATCH = 256
_LARGEST = float(np.finfo(np.float16).max)
_ON_DEVICE_BYTES = 1 << 30
"""Labels of a view that take more are read from their file batch by batch."""


def labels_key(teacher: ModelCard, config: FinetuneConfig, seed: int, view: int) -> str:
    """Key of the labels of one view, which every student of this teacher reads."""
    top = {"top": config.top_labels, "temperature": config.temperature}
    return digest_of(
        {
            "algorithm": ALGORITHM,
            "teacher": teacher.digest,
            "data": teacher.data_digest,
            "augment": teacher.augment,
            "seed": seed,
            "view": view,
            # the temperature comes into them only where logits are summed up
            **(top if config.top_labels is not None else {}),
        }
    )


def write_labels(
    folder: Path,
    teacher: Classifier,
    train: Stream,
    view: int,
    top: int | None,
    temperature: float,
    after_batch: Callable[[], None] = lambda: None,
) -> None:
    """Label one view of all images into ``folder``.

    Args:
        teacher: on the stream's device.
        top: logits that are kept of an image, the largest; None, or at least K: all of them.
        temperature: at which the rest is summed up.
        after_batch: called after each batch, as a sign of life.

    Raises:
        OSError: the disk is full.
    """
    teacher.eval()
    files: dict[str, NDArray[np.generic]] = {}
    size = train.pass_size(_BATCH)
    for start in range(0, len(train), size):
        rows = torch.arange(start, min(start + size, len(train)))
        with torch.no_grad():
            logits_nk = teacher(train.view(view, rows)).float()
        kept = kept_of(logits_nk, top, temperature)
        if not files:
            files = {
                name: new_array(
                    folder / f"{name}.npy", values.dtype, (len(train), *values.shape[1:])
                )
                for name, values in kept.items()
            }
        for name, values in kept.items():
            files[name][rows.numpy()] = values
        after_batch()
    for array in files.values():
        assert isinstance(array, np.memmap)
        array.flush()


class SoftLabels:
    """The labels of some views, read on demand.

    Args:
        folders: of view 0, 1, ..., as ``write_labels`` wrote them.
        num_classes: K.
        temperature: that of the loss; it must be the one at which the rest was summed up.
    """

    def __init__(
        self,
        folders: Sequence[Path],
        num_classes: int,
        temperature: float,
        device: torch.device | str,
    ) -> None:
        self._folders = tuple(folders)
        self._num_classes = num_classes
        self._temperature = temperature
        self._device = torch.device(device)
        self._view: int | None = None
        self._files: dict[str, Tensor] = {}

    def __call__(self, batch: Batch) -> Tensor:
        """(B, K) float32 logits of the teacher for a batch of a view, on the device."""
        assert batch.view is not None, "images without augmentation have no kept labels"
        if batch.view != self._view:
            self._view, self._files = batch.view, self._read(self._folders[batch.view])
        kept = {
            name: values[batch.rows.to(values.device)].to(self._device)
            for name, values in self._files.items()
        }
        return logits_of(kept, self._num_classes, self._temperature)

    def _read(self, folder: Path) -> dict[str, Tensor]:
        arrays = {
            path.stem: np.load(path, mmap_mode="c", allow_pickle=False)  # "c": torch wants to write
            for path in sorted(folder.glob("*.npy"))
        }
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        if sum(array.nbytes for array in arrays.values()) > _ON_DEVICE_BYTES:
            return tensors
        return {name: tensor.to(self._device) for name, tensor in tensors.items()}


def kept_of(
    logits_nk: Tensor, top: int | None, temperature: float
) -> dict[str, NDArray[np.generic]]:
    """What is written of some images: all logits, or the ``top`` largest and their rest."""
    if top is None or top >= logits_nk.shape[1]:
        return {"logits": _half(logits_nk)}
    values, classes = logits_nk.topk(top)
    others = logits_nk.scatter(1, classes, -math.inf)
    # one logit that, given to each of the other classes, has their share of the distribution
    num_others = logits_nk.shape[1] - top
    rest = temperature * ((others / temperature).logsumexp(1) - math.log(num_others))
    return {
        "values": _half(values),
        "classes": classes.to(torch.int32).cpu().numpy(),
        "rest": _half(rest),
    }


def logits_of(kept: Mapping[str, Tensor], num_classes: int, temperature: float) -> Tensor:
    """(B, K) float32 logits out of what was kept of some images."""
    if "logits" in kept:
        return kept["logits"].float()
    spread = kept["rest"].float()[:, None].expand(-1, num_classes)
    return spread.scatter(1, kept["classes"].long(), kept["values"].float())


def _half(values: Tensor) -> NDArray[np.generic]:
    half: NDArray[np.generic] = values.clamp(-_LARGEST, _LARGEST).half().cpu().numpy()
    return half
