"""Capture against hooks by hand, also where operations overwrite what was captured."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pbkd.activations import Capture
from pbkd.errors import BlockError
from pbkd.models import Classifier, NetworkSpec, build_network
from pbkd.testing import OverwritingNet

IMAGES = torch.rand(5, 1, 8, 8)
PATHS = ("stem", "branch", "entry", "tail")


def _teacher(*, in_place: bool = True) -> Classifier:
    torch.manual_seed(0)
    return Classifier(OverwritingNet(in_place=in_place), (0.5,), (0.25,)).eval()


def _by_hand(model: Classifier, path: str, images: Tensor) -> tuple[Tensor, Tensor]:
    """A block's input and output, copied as they pass."""
    seen: list[Tensor] = []
    module = model.net.get_submodule(path)
    handles = [
        module.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone())),
        module.register_forward_hook(lambda _, args, out: seen.append(out.clone())),
    ]
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    return seen[0], seen[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_captured_tensors_equal_hooks_by_hand(dtype: torch.dtype) -> None:
    teacher = _teacher()
    captured = Capture(teacher, PATHS, IMAGES[:2], dtype)(IMAGES)
    assert tuple(captured) == PATHS
    for path in PATHS:
        x_nchw, y_nchw = _by_hand(teacher, path, IMAGES)
        assert captured[path].input.dtype == captured[path].output.dtype == dtype
        assert torch.equal(captured[path].input, x_nchw.to(dtype))
        assert torch.equal(captured[path].output, y_nchw.to(dtype))


def test_overwritten_tensors_are_those_of_the_network_that_overwrites_nothing() -> None:
    capture = Capture(_teacher(in_place=True), PATHS, IMAGES[:2], torch.float32)
    assert capture.overwritten == {("stem", "output"), ("branch", "output"), ("entry", "input")}
    clean = Capture(_teacher(in_place=False), PATHS, IMAGES[:2], torch.float32)
    assert clean.overwritten == set()
    captured, expected = capture(IMAGES), clean(IMAGES)
    for path in PATHS:
        assert torch.equal(captured[path].input, expected[path].input)
        assert torch.equal(captured[path].output, expected[path].output)
    assert (expected["stem"].output < 0).any()
    assert (expected["entry"].input < 0).any()


class Shuffled(nn.Module):
    """A block whose output comes out of a reshape, in no convolution's layout."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ChannelShuffle(2))
        self.next = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x_nchw: Tensor) -> Tensor:
        return self.next(self.block(x_nchw)).mean((2, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_images_are_handed_out_in_the_layout_of_the_cache(dtype: torch.dtype) -> None:
    teacher = Classifier(Shuffled(), (0.5,), (0.25,)).eval()
    found = Capture(teacher, ("block", "next"), IMAGES[:2], dtype)(IMAGES)
    for tensor in (found["block"].output, found["next"].input, found["next"].output):
        assert tensor.stride() == (256, 1, 32, 4)


@pytest.mark.parametrize("paths", [("branch",), ("entry", "stem")])
def test_a_part_of_the_blocks_is_as_in_the_whole(paths: tuple[str, ...]) -> None:
    capture = Capture(_teacher(), PATHS, IMAGES[:2], torch.float32)
    everything, part = capture(IMAGES), capture(IMAGES, paths)
    assert tuple(part) == paths
    for path in paths:
        assert torch.equal(part[path].input, everything[path].input)
        assert torch.equal(part[path].output, everything[path].output)


def test_a_block_captured_alone_is_as_in_the_whole() -> None:
    everything = Capture(_teacher(), PATHS, IMAGES[:2], torch.float32)(IMAGES)
    for path in PATHS:
        alone = Capture(_teacher(), [path], IMAGES[:2], torch.float32)(IMAGES)[path]
        assert torch.equal(alone.input, everything[path].input)
        assert torch.equal(alone.output, everything[path].output)


def test_the_pass_stops_after_the_last_wanted_block() -> None:
    teacher = _teacher()
    ran: list[str] = []
    for path in [*PATHS, "fc"]:
        teacher.net.get_submodule(path).register_forward_pre_hook(
            lambda _, args, path=path: ran.append(path)
        )
    capture = Capture(teacher, PATHS, IMAGES[:2], torch.float32)
    assert "fc" not in ran
    ran.clear()
    capture(IMAGES, ["branch", "stem"])
    assert ran == ["stem", "branch"]


def test_a_pass_leaves_no_hook_also_where_the_network_fails() -> None:
    teacher = _teacher()
    capture = Capture(teacher, PATHS, IMAGES[:2], torch.float32)
    capture(IMAGES)
    with pytest.raises(RuntimeError):
        capture(torch.rand(1, 2, 8, 8))
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in teacher.modules())


def test_the_teacher_is_in_evaluation_mode_and_no_gradient_is_kept() -> None:
    spec = NetworkSpec(name="vgg_small", num_classes=3, in_channels=1, width=0.1)
    teacher = Classifier(build_network(spec), (0.5,), (0.25,)).train()
    state = {name: value.clone() for name, value in teacher.state_dict().items()}
    captured = Capture(teacher, ["features.3"], IMAGES[:2], torch.float32)(IMAGES)
    assert not captured["features.3"].output.requires_grad
    assert all(torch.equal(value, state[name]) for name, value in teacher.state_dict().items())


def test_what_does_not_fit_the_dtype_is_named() -> None:
    teacher = _teacher()
    with torch.no_grad():
        teacher.net.get_submodule("branch").weight.mul_(1e6)
    with pytest.raises(BlockError) as caught:
        Capture(teacher, PATHS, IMAGES, torch.float16)
    assert "block branch: its output reaches" in str(caught.value)
    assert "torch.float16 does not hold; set `activations.dtype" in str(caught.value)
    Capture(teacher, PATHS, IMAGES, torch.bfloat16)


@pytest.mark.parametrize("num", [1, 2, 4])
def test_a_batch_that_is_filled_up_gives_what_a_full_one_gives(num: int) -> None:
    capture = Capture(_teacher(), PATHS, IMAGES[:2], torch.float32)
    full, filled = capture(IMAGES), capture(IMAGES[:num], fill_to=len(IMAGES))
    for path in PATHS:
        assert torch.equal(filled[path].input, full[path].input[:num])
        assert torch.equal(filled[path].output, full[path].output[:num])
