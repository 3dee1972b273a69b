"""Sizes against counts by hand and against the file itself."""

from pathlib import Path

import torch
from torch import nn

from pbkd.artifacts import save_tensors
from pbkd.measure import num_parameters, state_dict_bytes


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(5, 5, bias=False)
        self.decoder = nn.Linear(5, 5)
        self.decoder.weight = self.encoder.weight


def test_parameters_equal_the_hand_count() -> None:
    net = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6), nn.Linear(7, 3))
    assert num_parameters(net) == (6 * 2 * 9 + 6) + 2 * 6 + (7 * 3 + 3)


def test_a_shared_parameter_counts_once_and_frozen_ones_count() -> None:
    net = Tied()
    net.requires_grad_(False)
    assert num_parameters(net) == 25 + 5


def test_bytes_equal_the_written_file(tmp_path: Path) -> None:
    for net in (nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).half(), Tied()):
        save_tensors(tmp_path / "weights", net.state_dict())
        assert state_dict_bytes(net) == (tmp_path / "weights").stat().st_size


def test_bytes_include_the_header_and_each_dtype() -> None:
    net = nn.Linear(100, 10, bias=False)
    assert 4 * 1000 < state_dict_bytes(net) < 4 * 1000 + 200
    assert state_dict_bytes(net) - state_dict_bytes(net.to(torch.float16)) == 2 * 1000
