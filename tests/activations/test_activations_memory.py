"""Filling and reading take a few batches of memory, whatever the size of the cache."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

MIB = 2**20


def growth_of(what: str, folder: Path, num_images: int, limit_bytes: int) -> tuple[int, int]:
    """(growth of the resident memory, size of the cache), bytes, in a new process."""
    arguments = [what, str(folder), str(num_images), str(limit_bytes)]
    done = subprocess.run(
        [sys.executable, "-m", "tests.activations.fill_and_read", *arguments],
        capture_output=True,
        text=True,
        check=True,
    )
    print(f"{what}: {done.stdout}")
    found = json.loads(done.stdout)
    return found["growth_bytes"], found["cache_bytes"]


@pytest.mark.parametrize(
    ("num_images", "limit_bytes"),
    [
        pytest.param(3_000, 32 * MIB, id="400 MB"),
        pytest.param(24_000, 256 * MIB, id="3 GB", marks=pytest.mark.slow),
    ],
)
def test_memory_does_not_grow_with_the_cache(
    tmp_path: Path, num_images: int, limit_bytes: int
) -> None:
    growth, size = growth_of("fill", tmp_path, num_images, limit_bytes)
    assert size > num_images * 130_000
    assert growth < 100 * MIB
    growth, _ = growth_of("read", tmp_path, num_images, limit_bytes)
    assert growth < limit_bytes + 64 * MIB
