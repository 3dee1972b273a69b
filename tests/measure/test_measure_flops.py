"""MACs against counts by hand."""

import pytest
import torch
from torch import Tensor, nn

from pbkd.measure import count_macs


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    ("module", "shape", "macs"),
    [
        (nn.Conv2d(8, 12, 3, padding=1), (8, 9, 9), 81 * 12 * 8 * 9),
        (nn.Conv2d(8, 12, 3, stride=2, padding=1), (8, 9, 9), 25 * 12 * 8 * 9),
        (nn.Conv2d(8, 12, 3, padding=1, groups=4), (8, 9, 9), 81 * 12 * 2 * 9),
        (nn.Conv2d(8, 12, 3, dilation=2), (8, 9, 9), 25 * 12 * 8 * 9),
        (nn.Conv2d(8, 8, 5, padding=2, groups=8, bias=False), (8, 9, 9), 81 * 8 * 25),
        (nn.Conv2d(8, 12, (1, 3)), (8, 9, 9), 63 * 12 * 8 * 3),
        (nn.ConvTranspose2d(8, 4, 2, stride=2), (8, 5, 5), 25 * 8 * 4 * 4),
        (nn.Linear(10, 7), (10,), 70),
        (nn.Linear(10, 7), (6, 10), 6 * 70),
        (nn.Sequential(nn.Linear(10, 7), nn.ReLU(), nn.Linear(7, 2)), (10,), 70 + 14),
        (nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), nn.AvgPool2d(2)), (8, 4, 4), 0),
        (
            nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
            (4, 8),
            4 * 8 * 8 * 4 + 2 * 4 * 4 * 8 + 2 * 4 * 8 * 16,
        ),
    ],
)
def test_macs_equal_the_hand_count(
    module: nn.Module, shape: tuple[int, ...], macs: int, batch: int
) -> None:
    assert count_macs(module, torch.rand(batch, *shape)) == batch * macs


class Product(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x @ y


def test_several_inputs() -> None:
    assert count_macs(Product(), torch.rand(2, 3), torch.rand(3, 4)) == 24


class Restless(nn.Module):
    """Overwrites its input, draws random numbers, and holds parts in different modes."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(2)
        self.frozen = nn.BatchNorm2d(2).eval()
        self.conv = nn.Conv2d(2, 2, 1)

    def forward(self, x_nchw: Tensor) -> Tensor:
        assert not self.training
        assert not torch.is_grad_enabled()
        x_nchw.add_(torch.rand(()))
        return self.conv(self.frozen(self.norm(x_nchw)))


def test_counting_leaves_no_trace() -> None:
    net = Restless()
    state = {name: value.clone() for name, value in net.state_dict().items()}
    x_nchw = torch.ones(2, 2, 3, 3)
    random_state = torch.get_rng_state()

    assert count_macs(net, x_nchw) == 2 * 9 * 4

    assert net.training
    assert net.norm.training
    assert not net.frozen.training
    assert torch.equal(x_nchw, torch.ones_like(x_nchw))
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert torch.backends.mha.get_fastpath_enabled()
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in net.modules())


def test_modes_are_restored_where_the_forward_fails() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Dropout().eval())
    with pytest.raises(RuntimeError):
        count_macs(net, torch.rand(2, 4))
    assert [part.training for part in net.modules()] == [True, True, False]
    assert torch.backends.mha.get_fastpath_enabled()
