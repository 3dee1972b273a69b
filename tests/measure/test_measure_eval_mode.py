"""Modes come back part by part."""

from torch import nn

from pbkd.measure import eval_mode


def test_each_part_gets_its_own_mode_back() -> None:
    shared = nn.Dropout().eval()
    net = nn.Sequential(nn.Sequential(shared, nn.Dropout()), nn.Sequential(shared))
    before = [part.training for part in net.modules()]
    with eval_mode(net):
        assert not any(part.training for part in net.modules())
    assert [part.training for part in net.modules()] == before
    assert not shared.training
