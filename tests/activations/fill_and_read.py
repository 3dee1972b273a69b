"""Fills a cache, or reads an epoch of it, in a process of its own; prints how its memory grew.

Usage: python -m tests.activations.fill_and_read (fill | read) FOLDER NUM_IMAGES LIMIT_BYTES
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path

import torch
from torch import nn

from pbkd.activations import (
    CacheSource,
    Capture,
    SideKeys,
    both_sides,
    cache_keys,
    fill_cache,
    finish_fill,
)
from pbkd.artifacts import Store
from pbkd.config import ActivationsConfig, AugmentConfig
from pbkd.data import Stream
from pbkd.models import Classifier
from pbkd.testing import random_split
from tests.activations.cached import CARD

NUM_VAL, BATCH_SIZE, CAPTURE_BATCH = 512, 64, 128


class WideNet(nn.Module):
    """One block, (N, 1, 32, 32) to (N, 64, 32, 32): 130 kB per image in float16."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv2d(1, 64, 3, padding=1)
        self.fc = nn.Linear(64, 3)

    def forward(self, x_nchw: torch.Tensor) -> torch.Tensor:
        return self.fc(self.wide(x_nchw).mean((2, 3)))


def peak_bytes() -> int:
    """Largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def fill(store: Store, keys: SideKeys, train: Stream, val: Stream) -> int:
    """Fill the cache; gives the peak before it, with the model loaded and run."""
    model = Classifier(WideNet(), CARD.mean, CARD.std)
    capture = Capture(model, ["wide"], val.plain(torch.arange(CAPTURE_BATCH)), torch.float16)
    before = peak_bytes()
    fill_cache(store, capture, keys, train, val, CAPTURE_BATCH)
    finish_fill(store, keys)
    return before


def read(store: Store, keys: SideKeys, train: Stream, limit_bytes: int) -> int:
    """Read an epoch, with a pause in which the queue fills up; gives the peak before it."""
    before = peak_bytes()
    source = CacheSource(store, keys, train, NUM_VAL, BATCH_SIZE, limit_bytes=limit_bytes)
    num = 0
    for batch in source.epoch(0, ["wide"]):
        time.sleep(2 if num == 0 else 0)
        num += len(batch["wide"].output)
    assert num == len(train) // BATCH_SIZE * BATCH_SIZE
    return before


def main(what: str, folder: Path, num_images: int, limit_bytes: int) -> None:
    torch.set_num_threads(1)
    config = ActivationsConfig(views=1, chunk=512)
    train, val = (
        Stream(random_split(num, size=32), seed=0, augment=AugmentConfig(), views=1, chunk=512)
        for num in (num_images, NUM_VAL)
    )
    keys = cache_keys(CARD, config, 0, both_sides(["wide"]))
    store, started_at = Store(folder), time.perf_counter()
    if what == "fill":
        before = fill(store, keys, train, val)
    else:
        before = read(store, keys, train, limit_bytes)
    found = {
        "before_bytes": before,
        "growth_bytes": peak_bytes() - before,
        "cache_bytes": sum(path.stat().st_size for path in folder.rglob("*.safetensors")),
        "duration_s": time.perf_counter() - started_at,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
