"""Memory that is left, in made-up control groups."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from pbkd.measure.memory import free_memory, left_in_groups


def group(folder: Path, names: tuple[str, str], limit: str, taken: int, stat: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{taken}\n")
    (folder / "memory.stat").write_text(stat)


def test_the_tightest_group_counts_and_pages_of_files_are_free(tmp_path: Path) -> None:
    names = ("memory.max", "memory.current")
    stat = "anon 5\nactive_file 100\ninactive_file 50\n"
    group(tmp_path / "a" / "b", names, "1000", 400, stat)
    assert left_in_groups("0::/a/b\n", tmp_path) == 1000 - 400 + 150
    group(tmp_path / "a", names, "600", 450, stat)
    assert left_in_groups("0::/a/b\n", tmp_path) == 600 - 450 + 150
    group(tmp_path / "a", names, "max", 450, stat)
    group(tmp_path / "a" / "b", names, "300", 500, stat)
    assert left_in_groups("0::/a/b\n", tmp_path) == 0


def test_groups_of_version_1(tmp_path: Path) -> None:
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
    stat = "active_file 1\ninactive_file 1\ntotal_active_file 100\ntotal_inactive_file 50\n"
    group(tmp_path / "memory" / "a", names, "1000", 400, stat)
    assert left_in_groups("5:cpu:/a\n4:memory:/a\n0::/\n", tmp_path) == 750


@pytest.mark.parametrize("membership", ["", "0::/\n", "0::/out/of/sight\n", "4:memory:/x\n"])
def test_without_a_limit_there_is_none(tmp_path: Path, membership: str) -> None:
    assert left_in_groups(membership, tmp_path) == math.inf


def test_this_machine_has_memory() -> None:
    assert 1 << 20 < free_memory(torch.device("cpu")) < 1 << 50
