"""The labels of a view as they come: a file per chunk, then an item of the store.

A chunk is a part of the order in which a view is shown first, so that a student can read on while
teachers label. Files appear by one rename: what is there is whole, and whoever comes second writes
the same again.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pbkd.artifacts import Store, load_tensors, new_array, save_tensors, write_json
from pbkd.data.batches import Stream
from pbkd.elastic.board import Chunk
from pbkd.elastic.label_plan import LABELS, LabelPlan
from pbkd.elastic.soft_labels import RECORD, kept_of
from pbkd.locks import file_lock
from pbkd.models import Classifier

_ROWS, _SECONDS = "rows", "seconds"
_KEEPING_S = 600.0  # of writing a view, at most


def label_chunk(
    plan: LabelPlan, teacher: Classifier, train: Stream, order: Tensor, chunk: Chunk
) -> None:
    """Write the labels of one chunk; ``teacher`` is on the stream's device.

    Raises:
        OSError: the disk is full.
    """
    began_s = time.perf_counter()
    rows = plan.rows(chunk, order)
    with torch.no_grad():
        logits_nk = teacher(train.view(chunk[0], rows)).float()
    kept = kept_of(logits_nk, plan.top, plan.temperature)
    tensors = {name: torch.from_numpy(values) for name, values in kept.items()}
    seconds = torch.tensor(time.perf_counter() - began_s, dtype=torch.float64)
    plan.path(chunk).parent.mkdir(parents=True, exist_ok=True)
    save_tensors(plan.path(chunk), tensors | {_ROWS: rows, _SECONDS: seconds})


def read_chunk(plan: LabelPlan, chunk: Chunk) -> tuple[Tensor, dict[str, Tensor]]:
    """Images of a chunk, and what is kept of them; ArtifactError where the file is damaged."""
    tensors = load_tensors(plan.path(chunk))
    del tensors[_SECONDS]
    return tensors.pop(_ROWS), tensors


def keep_view(plan: LabelPlan, view: int) -> bool:
    """Put a view into the store if all of its chunks are there; returns whether it is.

    Students come to a view's end at the same time: one of them does it, the others wait for it.
    """
    if plan.is_kept(view):
        return True
    chunks = [(view, number) for number in range(plan.num_chunks)]
    if not all(plan.path(chunk).is_file() for chunk in chunks):
        return plan.is_kept(view)
    key = plan.keys[view]
    with file_lock(plan.folder / f"{key}.lock", f"labels of view {view}", timeout_s=_KEEPING_S):
        if not plan.is_kept(view):
            Store(plan.store).put(LABELS, key, _assembling(plan, chunks))
            shutil.rmtree(plan.folder / key, ignore_errors=True)
    return True


def _assembling(plan: LabelPlan, chunks: list[Chunk]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        arrays: dict[str, np.memmap[Any, Any]] = {}
        duration_s = 0.0
        for chunk in chunks:
            tensors = load_tensors(plan.path(chunk))
            rows = tensors.pop(_ROWS).numpy()
            duration_s += float(tensors.pop(_SECONDS))
            for name, tensor in tensors.items():
                values = tensor.numpy()
                if name not in arrays:
                    shape = (plan.num_images, *values.shape[1:])
                    arrays[name] = new_array(folder / f"{name}.npy", values.dtype, shape)
                arrays[name][rows] = values
        for array in arrays.values():
            array.flush()
        write_json(folder / RECORD, {"duration_s": duration_s})

    return write
