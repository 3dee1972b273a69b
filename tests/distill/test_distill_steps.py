"""Steps of a job's trainees: one by one on the CPU, recorded and replayed on a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pbkd.activations import Activation
from pbkd.config import DistillConfig, SeparableConfig
from pbkd.distill import TraineeSpec
from pbkd.distill.steps import WARM_STEPS, Steps
from pbkd.distill.trainee import Trainee

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class Overwriting(nn.Module):
    """Ends and begins with an operation in place."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x.relu_())).relu_()


class Unsteady(nn.Module):
    """Asks the device a question at every step, which no recording can hold."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) * (1 if float(x.sum()) > 0 else 2)


def trainee(
    folder: Path, module: nn.Module, block: str, device: str, **settings: object
) -> Trainee:
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.1)
    config = DistillConfig.model_validate({"batch_size": 8, "lr": 0.01, **settings})
    number = 1 + len(list(folder.iterdir()))  # names differ by it
    candidate = SeparableConfig(depth=1 + number % 2)
    spec = TraineeSpec(block=block, config=candidate, seed=0, key=f"{number}", score_key="s")
    return Trainee(spec, module.to(device), config, 20, folder / f"{number}.jsonl")


def batches(device: str, num: int = 8) -> list[dict[str, Activation]]:
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(num):
        x = torch.randn(8, 3, 6, 6, generator=generator).half().to(device)
        y = torch.randn(8, 4, 6, 6, generator=generator).half().to(device)
        found.append({"a": Activation(x, y), "b": Activation(-x, -y)})
    return found


def weights(trainees: list[Trainee]) -> list[Tensor]:
    return [t.cpu() for trainee in trainees for t in trainee.module.state_dict().values()]


def three(folder: Path, device: str, **settings: object) -> list[Trainee]:
    folder.mkdir()
    conv = nn.Conv2d(3, 4, 3, padding=1)
    return [
        trainee(folder, Overwriting(), "a", device, **settings),
        trainee(folder, conv, "a", device, **settings),
        trainee(folder, Overwriting(), "b", device, **settings),
    ]


def test_on_the_cpu_they_are_the_trainees_own_steps(tmp_path: Path) -> None:
    one, other = (three(tmp_path / name, "cpu") for name in "ab")
    take_steps = Steps()
    for batch in batches("cpu"):
        take_steps(one, batch)
        for t in other:
            t.step(batch[t.spec.block])
    assert all(torch.equal(a, b) for a, b in zip(weights(one), weights(other), strict=True))
    assert [t.lr for t in one] == [t.lr for t in other]


def test_on_the_cpu_bfloat16_is_taken_where_it_is_always_wanted(tmp_path: Path) -> None:
    found, losses = {}, {}
    for setting in (False, True, "always"):
        trainees = three(tmp_path / str(setting), "cpu", mixed_precision=setting)
        take_steps = Steps()
        for batch in batches("cpu"):
            take_steps(trainees, batch)
        found[setting] = weights(trainees)
        losses[setting] = torch.tensor([t._losses for t in trainees])
    assert all(torch.equal(a, b) for a, b in zip(found[False], found[True], strict=True))
    for exact, rounded in zip(found[False], found["always"], strict=True):
        assert exact.dtype == rounded.dtype
        assert not exact.is_floating_point() or not torch.equal(exact, rounded)
    torch.testing.assert_close(losses[False], losses["always"], rtol=1e-2, atol=0)


@needs_gpu
@pytest.mark.parametrize("optimizer", ["adamw", "rmsprop"])
@pytest.mark.parametrize("mixed_precision", [True, False])
def test_recorded_steps_learn_what_steps_one_by_one_learn(
    tmp_path: Path, optimizer: str, mixed_precision: bool
) -> None:
    settings = {"optimizer": optimizer, "mixed_precision": mixed_precision}
    one, other = (three(tmp_path / name, "cuda", **settings) for name in "ab")
    take_steps = Steps()
    for number, batch in enumerate(batches("cuda", 2 * WARM_STEPS + 2)):
        first = 0 if number < 2 * WARM_STEPS else 1  # one of them is finished early
        take_steps(one[first:], batch)
        for t in other[first:]:
            t.step(batch[t.spec.block])
    assert all(recording is not None for recording in take_steps._recorded.values())
    assert len(take_steps._recorded) == 3
    tolerance = 2e-2 if mixed_precision else 2e-3
    for a, b in zip(weights(one), weights(other), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    for t, u in zip(one, other, strict=True):
        assert t.lr == u.lr
        losses = torch.stack(t._losses).cpu(), torch.stack(u._losses).cpu()
        torch.testing.assert_close(*losses, rtol=tolerance, atol=tolerance)


@needs_gpu
def test_what_cannot_be_recorded_is_trained_step_by_step(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one, other = [], []
    for trainees, name in ((one, "a"), (other, "b")):
        (tmp_path / name).mkdir()
        trainees.append(trainee(tmp_path / name, Unsteady(), "a", "cuda"))
        trainees.append(trainee(tmp_path / name, Overwriting(), "a", "cuda"))
    take_steps = Steps()
    for batch in batches("cuda"):
        take_steps(one, batch)
        for t in other:
            t.step(batch[t.spec.block])
    assert [r.message for r in caplog.records if "step by step" in r.message]
    assert len([r for r in take_steps._recorded.values() if r is not None]) == 1
    for a, b in zip(weights(one), weights(other), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


@needs_gpu
@pytest.mark.parametrize("optimizer", ["adamw", "rmsprop"])
@pytest.mark.parametrize("before", ["cpu", "cuda"])
def test_a_restored_trainee_is_recorded_with_its_state_on_the_gpu(
    tmp_path: Path, optimizer: str, before: str
) -> None:
    settings = {"optimizer": optimizer, "mixed_precision": False}
    one = three(tmp_path / "a", before, **settings)
    for batch in batches(before, 2):
        for t in one:
            t.step(batch[t.spec.block])
    other = three(tmp_path / "b", "cuda", **settings)
    for t, u in zip(one, other, strict=True):
        torch.save(t.snapshot(), tmp_path / "snapshot")
        u.restore(torch.load(tmp_path / "snapshot", map_location="cpu", weights_only=True))
        assert u.optimizer.param_groups[0]["lr"].is_cuda
        assert u.optimizer.param_groups[0]["capturable"]
        states = [x for state in u.optimizer.state.values() for x in state.values()]
        assert states
        assert all(x.is_cuda for x in states)
    take_steps = Steps()
    for batch in batches("cuda", 2 * WARM_STEPS):
        take_steps(other, batch)
        for t in one:
            activation = batch[t.spec.block]
            own = Activation(activation.input.to(before), activation.output.to(before))
            t.step(own)
    assert all(recording is not None for recording in take_steps._recorded.values())
    assert len(take_steps._recorded) == 3
    # AdamW makes much of the last bits of a gradient near 0, and the CPU has others
    tolerance = 2e-2 if before == "cpu" else 2e-3
    for a, b in zip(weights(one), weights(other), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    for t, u in zip(one, other, strict=True):
        assert t.lr == u.lr
        assert float(u.optimizer.param_groups[0]["lr"]) == pytest.approx(u.lr)
        assert t.num_taken == u.num_taken
