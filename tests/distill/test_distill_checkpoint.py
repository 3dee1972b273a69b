"""Jobs that are killed and go on: no trainee takes a batch twice or misses one."""

from __future__ import annotations

import logging
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook

from pbkd.artifacts import read_json
from pbkd.distill import TRAINEES, TraineeSpec, checkpoint
from pbkd.distill.trainee import RESULT
from pbkd.errors import ArtifactError
from tests.distill.small_job import BATCHES_PER_EPOCH, Outcome, SmallJob, assert_equal

SOURCES = ("relay", "cache", "cut")


@pytest.fixture(autouse=True)
def _checkpoint_after_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "_CHECKPOINT_EVERY_S", 0.0)
    monkeypatch.setattr(checkpoint, "_SAVING_SHARE", math.inf)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Outcome, int]]:
    """Of every source, what comes out and the steps that it takes."""
    found = {}
    for source in SOURCES:
        small = SmallJob(tmp_path_factory.mktemp(source), source)
        with counted() as steps:
            small.run()
        found[source] = small.outcome(), len(steps)
    return found


class Killed(BaseException):
    """Ends a job where no one catches it."""


@contextmanager
def counted(kill_after: int | None = None, *, in_validation: bool = False) -> Iterator[list[int]]:
    """Collects the optimizers' steps; after so many, the job is killed.

    Args:
        in_validation: only by the next pass without gradients.
    """
    steps: list[int] = []

    def step(*_: Any) -> None:
        steps.append(1)
        if len(steps) == kill_after and not in_validation:
            raise Killed

    def forward(*_: Any) -> None:
        if in_validation and len(steps) == kill_after and not torch.is_grad_enabled():
            raise Killed

    with ExitStack() as hooks:
        hooks.callback(register_optimizer_step_post_hook(step).remove)
        hooks.callback(register_module_forward_pre_hook(forward).remove)
        yield steps


def kill(small: SmallJob, after: int, *args: Any, **more: Any) -> None:
    with counted(after, **more), pytest.raises(Killed):
        small.run(*args)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


# ---------------------------------------------------------------- going on


def test_the_trainees_end_at_different_epochs(
    tmp_path: Path, undisturbed: dict[str, tuple[Outcome, int]]
) -> None:
    """The other tests are worth nothing where this fails."""
    outcome, num_steps = undisturbed["relay"]
    ends: list[Any] = [result for _, _, result, _ in outcome.values()]
    assert [end["num_epochs"] for end in ends] == [4, 5, 5, 2, 5, 4]
    assert {end["stopped"] for end in ends} == {"epochs", "plateau"}
    assert num_steps == 25 * BATCHES_PER_EPOCH
    assert_equal(undisturbed["cache"][0], outcome)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(
    ("epochs", "batches", "in_validation"),
    [
        (0, 0, False),
        (0, 3, False),
        (0, 5, True),  # after the last step, before it is validated
        (2, 0, False),  # when one trainee has stopped
        (2, 2, False),  # in the middle of another's plateau
        (4, 4, False),
    ],
)
def test_a_killed_job_ends_as_one_that_was_not(
    tmp_path: Path,
    undisturbed: dict[str, tuple[Outcome, int]],
    source: str,
    epochs: int,
    batches: int,
    in_validation: bool,
) -> None:
    expected, num_steps = undisturbed[source]
    small = SmallJob(tmp_path, source)
    ends = [result["num_epochs"] for _, _, result, _ in expected.values()]  # type: ignore[index]
    done = sum(min(end, epochs) * BATCHES_PER_EPOCH + batches * (end > epochs) for end in ends)
    # within a batch that some trainees have taken and others have not
    kill(small, done if in_validation else done + 1, in_validation=in_validation)
    with counted() as steps:
        small.run()
    assert len(steps) == num_steps - done
    assert_equal(small.outcome(), expected)
    assert small.checkpoints() == []


def test_killed_again_and_again(
    tmp_path: Path, undisturbed: dict[str, tuple[Outcome, int]]
) -> None:
    expected, num_steps = undisturbed["relay"]
    small = SmallJob(tmp_path, "relay")
    kills = 0
    while True:
        with counted(7):  # one batch of all six, and a part of the next
            try:
                small.run()
            except Killed:
                kills += 1
            else:
                break
    assert kills > num_steps / 7
    assert_equal(small.outcome(), expected)


@pytest.mark.parametrize("source", ["relay", "cache"])
@pytest.mark.parametrize("size", [1, 2, 6])
def test_other_groups_and_another_source_go_on_from_where_each_trainee_is(
    tmp_path: Path, undisturbed: dict[str, tuple[Outcome, int]], source: str, size: int
) -> None:
    expected, num_steps = undisturbed["cache"]
    small = SmallJob(tmp_path, "cache")
    one, two, three, four, five, six = small.trainees
    kill(small, 8, [one, two, three])  # in the third batch of epoch 0
    kill(small, 23, [four, five])  # in epoch 2: one of them has stopped
    # the last trainee has not begun
    done = 3 * 2 + 2 * 10 + 2
    with counted() as steps:
        trainees = [six, four, one, five, two, three]
        for index in range(0, 6, size):
            small.run(trainees[index : index + size], source)
    assert len(steps) == num_steps - done
    assert_equal(small.outcome(), expected)
    assert small.checkpoints() == []


def test_a_kill_between_the_files_of_one_go_does_no_harm(
    tmp_path: Path, undisturbed: dict[str, tuple[Outcome, int]]
) -> None:
    small = SmallJob(tmp_path, "relay")
    kill(small, 9)
    first = {t.key: small.checkpoint(t).read_bytes() for t in small.trainees[2:4]}
    kill(small, 8)  # a batch further
    for key, content in first.items():
        (small.job.checkpoints / f"{key}.pt").write_bytes(content)
    with counted() as steps:
        small.run()
    assert len(steps) == undisturbed["relay"][1] - 4 * 2 - 2 * 1
    assert_equal(small.outcome(), undisturbed["relay"][0])


def test_a_result_counts_the_time_before_and_after_but_not_what_was_lost(tmp_path: Path) -> None:
    small = SmallJob(tmp_path, "relay")
    began_at = time.time()
    slow = register_optimizer_step_post_hook(lambda *_: time.sleep(0.05))
    kill(small, 20)
    slow.remove()
    killed_at = time.time()
    time.sleep(1.0)
    again_at = time.time()
    small.run()
    least_s = 18 * 0.05
    most_s = time.time() - again_at + killed_at - began_at
    for trainee in small.trainees:
        item = small.setup.store.path(TRAINEES, trainee.key)
        result = read_json(item / RESULT)
        assert least_s < result["finished_at"] - result["started_at"] < most_s


# ---------------------------------------------------------------- files


def test_short_trainings_write_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    small = SmallJob(tmp_path, "relay")
    kill(small, 50)
    assert not small.job.checkpoints.exists()


def test_writing_takes_a_small_share_of_the_time(
    tmp_path: Path,
    undisturbed: dict[str, tuple[Outcome, int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(checkpoint, "_SAVING_SHARE", 1e-9)
    small = SmallJob(tmp_path, "relay")
    kill(small, 50)
    with counted() as steps:
        small.run()
    assert len(steps) == undisturbed["relay"][1] - 6, "a second one was written"
    assert_equal(small.outcome(), undisturbed["relay"][0])


def test_none_stays_of_a_finished_trainee(tmp_path: Path) -> None:
    small = SmallJob(tmp_path, "relay")
    kill(small, 9)
    kept = {path: path.read_bytes() for path in small.checkpoints()}
    assert len(kept) == 6
    small.run()
    for path, content in kept.items():  # a kill after the trainee was put into the store
        path.write_bytes(content)
    small.run()
    assert small.checkpoints() == []


def test_what_a_killed_writer_left_is_swept(tmp_path: Path) -> None:
    small = SmallJob(tmp_path, "relay")
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    small.job.checkpoints.mkdir()
    left = small.job.checkpoints / f".a.pt.{os.uname().nodename}-{gone.pid}-1.tmp"
    left.write_bytes(b"half")
    small.run()
    assert small.checkpoints() == []


Damage = Callable[[SmallJob, TraineeSpec], None]


def _cut_off(kept: int) -> Damage:
    def damage(small: SmallJob, trainee: TraineeSpec) -> None:
        path = small.checkpoint(trainee)
        path.write_bytes(path.read_bytes()[:kept])

    return damage


def _flip_a_bit(small: SmallJob, trainee: TraineeSpec) -> None:
    path = small.checkpoint(trainee)
    weights = torch.load(path, weights_only=True)["trainee"]["module"]
    content = bytearray(path.read_bytes())
    content[content.index(next(iter(weights.values())).numpy().tobytes())] ^= 1
    path.write_bytes(content)


def _of_another_trainee(small: SmallJob, trainee: TraineeSpec) -> None:
    small.checkpoint(small.trainees[2]).replace(small.checkpoint(trainee))


def _change(**changes: object) -> Damage:
    def damage(small: SmallJob, trainee: TraineeSpec) -> None:
        path = small.checkpoint(trainee)
        content = torch.load(path, weights_only=True)
        torch.save(content | changes, path)

    return damage


def _of_another_module(small: SmallJob, trainee: TraineeSpec) -> None:
    other = torch.load(small.checkpoint(small.trainees[1]), weights_only=True)
    _change(trainee=other["trainee"])(small, trainee)


def _of_another_optimizer(small: SmallJob, trainee: TraineeSpec) -> None:
    content = torch.load(small.checkpoint(trainee), weights_only=True)
    content["trainee"] |= {"optimizer": {0: torch.zeros(3)}, "best": {}}
    torch.save(content, small.checkpoint(trainee))


def _not_a_dict(small: SmallJob, trainee: TraineeSpec) -> None:
    torch.save([1, 2], small.checkpoint(trainee))


class _Code:
    ran: Path

    def __reduce__(self) -> Any:
        return Path.touch, (self.ran,)


def _code(small: SmallJob, trainee: TraineeSpec) -> None:
    code = _Code()
    code.ran = small.folder / "ran"
    torch.save({"format": checkpoint._FORMAT, "key": code}, small.checkpoint(trainee))


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(_cut_off(0), id="empty"),
        pytest.param(_cut_off(700), id="begun"),
        pytest.param(_cut_off(-1), id="a byte too few"),
        _flip_a_bit,
        _of_another_trainee,
        pytest.param(_change(format=0), id="older"),
        pytest.param(_change(key="other"), id="another key"),
        pytest.param(_change(trainee={}), id="nothing in it"),
        _of_another_module,
        _of_another_optimizer,
        _not_a_dict,
        _code,
    ],
)
def test_a_useless_checkpoint_is_left_aside_with_a_warning(
    tmp_path: Path,
    undisturbed: dict[str, tuple[Outcome, int]],
    caplog: pytest.LogCaptureFixture,
    damage: Damage,
) -> None:
    expected, num_steps = undisturbed["relay"]
    small = SmallJob(tmp_path, "relay")
    kill(small, 20)  # three batches and a part of the fourth
    first = small.trainees[0]
    damage(small, first)
    begun = [t for t in small.trainees if not small.checkpoint(t).exists()]
    path = small.checkpoint(first)
    with counted() as steps:
        small.run()
    (warning,) = warnings(caplog)
    assert warning.startswith(f"checkpoint {path} is of no use (")
    assert warning.endswith(f"; {first.name} begins again")
    assert len(steps) == num_steps - (5 - len(begun)) * 3
    assert not (tmp_path / "ran").exists()
    assert_equal(small.outcome(), expected)
    assert small.checkpoints() == []


def test_a_full_disk_is_explained_and_leaves_nothing_half(tmp_path: Path, small_disk: Path) -> None:
    small = SmallJob(tmp_path, "relay")
    small.job = small.job.model_copy(update={"checkpoints": small_disk / "checkpoints"})
    kill(small, 8)
    whole = {path: path.read_bytes() for path in small.checkpoints()}
    assert len(whole) == 6
    with (small_disk / "other").open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))
    with pytest.raises(ArtifactError, match="No space left on device; free some space"):
        small.run()
    assert {path: path.read_bytes() for path in small.checkpoints()} == whole
    (small_disk / "other").unlink()
    small.run()
    assert small.checkpoints() == []


# ---------------------------------------------------------------- a real kill

KILLED = """
import sys, time
from pathlib import Path
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from pbkd.distill import checkpoint
from pbkd.errors import ArtifactError
from tests.distill.small_job import SmallJob
torch.set_num_threads(1)
checkpoint._CHECKPOINT_EVERY_S = 0.0
register_optimizer_step_post_hook(lambda *_: time.sleep(0.03))
SmallJob(Path(sys.argv[1]), "relay").run()
"""


def test_a_process_that_was_killed(
    tmp_path: Path, undisturbed: dict[str, tuple[Outcome, int]]
) -> None:
    expected, num_steps = undisturbed["relay"]
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)])
    deadline = time.monotonic() + 60
    while not list((tmp_path / "checkpoints").glob("*.pt")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    small = SmallJob(tmp_path, "relay")
    with counted() as steps:
        small.run()
    assert 0 < len(steps) < num_steps
    assert_equal(small.outcome(), expected)
    assert small.checkpoints() == []
