"""Measured costs: what they are made of, how they are kept, merged and turned into a plan's."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from pbkd.artifacts import Workspace, read_json
from pbkd.config import ActivationsConfig, DistillConfig
from pbkd.distill import Profile, merge_profiles, profile, run_profile
from pbkd.distill.costs import block_costs, teacher_score_s, trainee_costs
from pbkd.distill.timing import DiskRates, StepCost, SuffixCost, measure_disk
from pbkd.distill.trainee import Trainee
from pbkd.plan import Limits, plan_block_phase
from pbkd.stages import StageContext
from pbkd.stages.blocks import read_blocks
from pbkd.stages.distill import start
from pbkd.stages.planning import Subject, plan_of, plans_of, profile_here, profile_job, profiled


@pytest.fixture(scope="module")
def subject(_finished: Path) -> Subject:
    return start(StageContext.load(Workspace(_finished, _finished / ".pbkd")))


@pytest.fixture(scope="module")
def measured(_finished: Path, subject: Subject) -> Profile:
    return profile_here(profile_job(Workspace(_finished, _finished / ".pbkd"), subject, ["here"]))


def some_profile(**changes: object) -> Profile:
    """Round figures for the finished workspace's first two blocks."""
    step = StepCost(fixed_s=1.0, step_s=0.25, eval_s=0.125, held_bytes=1000, step_bytes=500)
    values: dict[str, object] = {
        "device": "cpu",
        "threads": 1,
        "num_workers": 1,
        "memory_bytes": 10_000,
        "batch_size": 64,
        "setup_s": 0.5,
        "teacher_s": {"features.0": 0.5, "features.3": 2.0},
        "whole_teacher_s": 4.0,
        "suffixes": {
            "features.0": SuffixCost(before_s=0.0, suffix_s=3.5),
            "features.3": SuffixCost(before_s=0.75, suffix_s=1.5),
        },
        "capture_batch": 128,
        "capture_gain": 0.5,
        "cuts": {"features.3": "features.3"},
        "trainees": {"features.0/separable": step, "features.3/separable": step},
        "disk": DiskRates(write=100.0, verify=50.0, read=200.0),
        "duration_s": 1.0,
    }
    return Profile.model_validate(values | changes)


def test_every_trainee_and_block_is_measured(measured: Profile, subject: Subject) -> None:
    assert set(measured.trainees) == {trainee.name for trainee in subject.trainees}
    assert list(measured.teacher_s) == [block.path for block in subject.discovery.blocks]
    assert all(0 <= time_s < 1 for time_s in measured.teacher_s.values())
    # per image, as the whole is (a batch is 64): microseconds on a busy machine are not exact
    assert sum(measured.teacher_s.values()) < 20 * measured.whole_teacher_s
    for cost in measured.trainees.values():
        assert cost.step_s is not None
        assert 0 < cost.eval_s < 1
        assert 0 < cost.step_s < 1
        assert 0 < cost.fixed_s < 1
    assert set(measured.suffixes) == set(measured.teacher_s)
    befores = [cost.before_s for cost in measured.suffixes.values()]
    assert befores == sorted(befores), "a chain"
    for cost in measured.suffixes.values():
        assert 0 < cost.before_s + cost.suffix_s < measured.whole_teacher_s
    assert measured.capture_batch in (64, 128)
    assert measured.disk.read > 1e6


def test_memory_is_that_of_weights_their_state_activations_and_a_step(
    measured: Profile, subject: Subject
) -> None:
    for block in subject.discovery.blocks:
        for candidate in block.candidates:
            batch = block.elements_per_image * measured.batch_size
            cost = measured.trainees[f"{block.path}/{candidate.name}"]
            # float32: weights, gradients, two moments, the best; float16: activations
            assert cost.held_bytes == candidate.num_parameters * 4 * 5 + batch * 2
            assert 4 * batch < cost.step_bytes < 40 * batch + 20 * candidate.num_parameters


def test_a_profile_is_kept_and_read_again(
    finished: Workspace, subject: Subject, measured: Profile
) -> None:
    job = profile_job(finished, subject, ["here"])
    calls: list[str] = []

    def measure(job: profile.ProfileJob) -> Profile:
        calls.append(job.key)
        return measured

    assert profiled(finished, job, measure) == measured
    assert profiled(finished, job, measure) == measured
    assert len(calls) == 1
    assert profiled(finished, profile_job(finished, subject, ["here", "there"]), measure)
    assert len(calls) == 2, "other workers take other times"


def test_a_candidate_that_does_not_fit_is_a_cost_and_no_crash(
    finished: Workspace, subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(trainee: Trainee, activation: object) -> None:
        if trainee.spec.block == "features.3":
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried ...")

    monkeypatch.setattr(Trainee, "step", full)
    found = run_profile(profile_job(finished, subject, ["here"]), 0)
    assert found.trainees["features.3/separable"].step_s is None
    assert found.trainees["features.7/separable"].step_s is not None
    costs = trainee_costs(subject.trainees, found, subject.distill, subject.num_images)
    blocks = block_costs(
        subject.discovery.blocks, found, subject.activations, subject.distill,
        subject.num_images, 1,
    )  # fmt: skip
    plan = plan_block_phase(blocks, costs, [1.0], Limits(memory_bytes=found.memory_bytes))
    assert plan.too_large == ("features.3/separable",)
    (alone,) = [job for job in plan.jobs if "features.3/separable" in job.trainees]
    assert len(alone.trainees) == 1


def test_other_errors_are_not_taken_for_a_lack_of_memory(
    finished: Workspace, subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(trainee: object, activation: object) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(Trainee, "step", broken)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        run_profile(profile_job(finished, subject, ["here"]), 0)


def test_workers_wait_for_each_other(tmp_path: Path) -> None:
    arrived: list[int] = []

    def come(index: int) -> None:
        profile._meet(tmp_path / "meeting", index, 2)
        arrived.append(index)

    first = threading.Thread(target=come, args=(0,))
    first.start()
    first.join(0.3)
    assert arrived == []
    come(1)
    first.join(5)
    assert sorted(arrived) == [0, 1]


def test_merging_takes_means_and_the_least_memory() -> None:
    slow = some_profile(whole_teacher_s=8.0, memory_bytes=5000, teacher_s={"features.0": 1.5})
    fast = some_profile(whole_teacher_s=4.0, teacher_s={"features.0": 0.5})
    merged = merge_profiles([slow, fast])
    assert merged.whole_teacher_s == 6.0
    assert merged.teacher_s == {"features.0": 1.0}
    assert merged.memory_bytes == 5000
    assert merged.speeds == pytest.approx((1.5 / 2, 1.5 / 1))
    assert merge_profiles([fast, fast]).speeds == (1.0, 1.0)


def test_a_trainees_cost_by_hand(subject: Subject) -> None:
    trainees = [t for t in subject.trainees if t.block == "features.3"]
    config = DistillConfig(epochs=3, batch_size=64, score_images=10)
    (cost,) = trainee_costs(trainees, some_profile(), config, {"train": 130, "val": 20})
    steps = 3 * 128 * 0.25  # the last, smaller batch is left out
    validations = 4 * 20 * 0.125
    score = 10 * (1.5 + 0.125)
    assert cost.own_s == pytest.approx(1.0 + steps + validations + score)
    (scored,) = trainee_costs(
        trainees, some_profile(), config, {"train": 130, "val": 20}, {"features.3/separable"}
    )
    assert scored.own_s == pytest.approx(score)
    assert teacher_score_s(some_profile(), config, 20) == pytest.approx(10 * 4.0)


def test_a_planned_phase_has_the_teachers_own_pass_in_it(
    subject: Subject, measured: Profile
) -> None:
    plans = plans_of(subject, measured, [1, 2], "relay", float("inf"))
    extra_s = teacher_score_s(measured, subject.distill, subject.num_images["val"])
    for number, plan in plans.items():
        bare = plan_of(subject, measured, number, source="relay")
        assert plan.wall_s == pytest.approx(bare.wall_s + extra_s)
        assert plan.bound_s == pytest.approx(bare.bound_s + extra_s)
        parts = plan.work
        whole_s = parts.own_s + parts.teacher_s + parts.read_s + parts.fill_s + parts.jobs_s
        assert plan.work_s == pytest.approx(whole_s)


def test_a_blocks_cost_by_hand(finished: Workspace) -> None:
    blocks = read_blocks(finished).blocks
    config, distill = ActivationsConfig(views=2, dtype="float16"), DistillConfig(epochs=3)
    held = [("features.3", "cut")]
    costs = block_costs(
        blocks, some_profile(), config, distill, {"train": 100, "val": 10}, 210, held
    )  # fmt: skip
    assert [cost.path for cost in costs] == ["features.3"]
    (cost,) = costs
    (block,) = [block for block in blocks if block.path == "features.3"]
    size = torch.Size(block.input_shape).numel()
    passes = 3 * 100 + 4 * 10
    stored = 2 * 100 + 10
    assert cost.teacher_s == pytest.approx(2.0 * (passes + 3 * 10))  # dry passes of a batch
    assert cost.before_score_s == pytest.approx(0.75 * 10)
    assert cost.fill_teacher_s == pytest.approx(2.0 * 0.5 * stored)
    assert cost.input_bytes == size * 2 * stored
    assert cost.cut_bytes == size * 4 * stored
    assert cost.write_input_s == pytest.approx(size * 2 * stored / 100)
    assert cost.read_input_s == pytest.approx(size * 2 * (passes / 200 + stored / 50))
    assert (cost.is_cut, cost.has_cut, cost.has_input) == (True, True, False)


def test_the_disks_rates_leave_nothing_behind(tmp_path: Path) -> None:
    rates = measure_disk(tmp_path / "new")
    assert min(rates.write, rates.verify, rates.read) > 1e6
    assert list((tmp_path / "new").iterdir()) == []


def test_the_key_knows_candidates_workers_and_batch_and_nothing_else(
    finished: Workspace, subject: Subject
) -> None:
    job = profile_job(finished, subject, ["here"])
    again = profile_job(finished, subject, ["here"])
    assert job.key == again.key
    other = job.model_copy(update={"distill": job.distill.model_copy(update={"batch_size": 8})})
    assert other.key != job.key
    longer = job.model_copy(update={"distill": job.distill.model_copy(update={"epochs": 99})})
    assert longer.key == job.key
    assert read_json(finished.prepared / "meta.json")["num_images"] == subject.num_images


def test_a_profile_of_another_version_is_measured_anew(
    finished: Workspace, subject: Subject, measured: Profile
) -> None:
    job = profile_job(finished, subject, ["elsewhere"])
    path = finished.state / "profiles" / f"{job.key}.json"
    path.parent.mkdir(exist_ok=True)
    for text in ('{"device": "cpu"}', "half a fi"):
        path.write_text(text)
        assert profiled(finished, job, lambda _: measured) == measured
