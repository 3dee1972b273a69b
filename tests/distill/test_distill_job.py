"""Jobs: whatever the source, the grouping, the process, the weights are the same bits."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from pbkd.activations import FillJob, finish_fill, run_fill
from pbkd.activations.cache import VAL, cache_key
from pbkd.activations.shards import KIND
from pbkd.artifacts import (
    MARKER,
    Store,
    Workspace,
    load_tensors,
    save_tensors,
    write_marker,
)
from pbkd.config import DistillConfig, SeparableConfig, load_params
from pbkd.distill import SCORES, TRAINEES, Damage, JobSpec, TraineeResult, TraineeSpec, run_job
from pbkd.distill.score import SCORE
from pbkd.distill.trainee import HISTORY, RESULT, WEIGHTS, read_history
from pbkd.errors import ArtifactError
from pbkd.models import read_card
from pbkd.stages import StageContext, run_stage
from pbkd.stages.distill import DistillPlan, finish_distill, plan_distill, plan_here, start
from pbkd.stages.planning import profile_here, profile_job, profiled

Weights = dict[str, dict[str, torch.Tensor]]

TWO_CANDIDATES = [{}, {"depth": 2, "batch_norm": True, "init": "random"}]


def change(workspace: Workspace, section: str, **values: object) -> None:
    params = yaml.safe_load(workspace.params.read_text())
    params[section].update(values)
    workspace.params.write_text(yaml.safe_dump(params))


def copy_of(workspace: Workspace, root: Path) -> Workspace:
    shutil.copytree(workspace.root, root)
    return Workspace(root, root / ".pbkd")


def job_of(workspace: Workspace, source: str = "cache") -> JobSpec:
    """One job with every trainee that the workspace has to train."""
    jobs = plan_here(StageContext.load(workspace)).jobs
    trainees = sorted((t for job in jobs for t in job.trainees), key=lambda t: t.name)
    return jobs[0].model_copy(update={"trainees": tuple(trainees), "source": source})


def part(job: JobSpec, trainees: Iterable[TraineeSpec], name: str = "job-part") -> JobSpec:
    return job.model_copy(update={"trainees": tuple(trainees), "job_id": name})


def weights_of(job: JobSpec) -> Weights:
    store = Store(job.store)
    return {t.name: load_tensors(store.path(TRAINEES, t.key) / WEIGHTS) for t in job.trainees}


def scores_of(job: JobSpec) -> dict[str, Damage]:
    store = Store(job.store)
    return {
        t.name: Damage.model_validate_json((store.path(SCORES, t.score_key) / SCORE).read_text())
        for t in job.trainees
    }


def result_of(job: JobSpec, trainee: TraineeSpec) -> TraineeResult:
    path = Store(job.store).path(TRAINEES, trainee.key) / RESULT
    return TraineeResult.model_validate_json(path.read_text())


def assert_equal(got: Weights, expected: Weights) -> None:
    assert got.keys() == expected.keys()
    for name, tensors in expected.items():
        assert got[name].keys() == tensors.keys()
        for key, tensor in tensors.items():
            assert torch.equal(got[name][key], tensor), f"{name}: {key}"


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Equal results need equal threads; one is the fastest where other tests run beside."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def _untrained(_finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Three blocks with two candidates each, activations cached, nothing trained."""
    root = tmp_path_factory.mktemp("untrained") / "workspace"
    shutil.copytree(_finished, root)
    workspace = Workspace(root, root / ".pbkd")
    for kind in (TRAINEES, SCORES):
        shutil.rmtree(workspace.store.root / kind)
    shutil.rmtree(workspace.artifacts("distill"))
    shutil.rmtree(workspace.state / "progress")
    exclude = ["features.0", "features.3", "features.7"]
    change(workspace, "blocks", candidates=TWO_CANDIDATES, exclude=exclude)
    run_stage("blocks", StageContext.load(workspace))
    return workspace


@pytest.fixture
def untrained(_untrained: Workspace, tmp_path: Path) -> Workspace:
    return copy_of(_untrained, tmp_path / "untrained")


@pytest.fixture(scope="module")
def _trained(_untrained: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """The same after one job that held every trainee and read the cache."""
    workspace = copy_of(_untrained, tmp_path_factory.mktemp("trained") / "workspace")
    run_job(job_of(workspace))
    return workspace


@pytest.fixture
def trained(_trained: Workspace, tmp_path: Path) -> Workspace:
    return copy_of(_trained, tmp_path / "trained")


@pytest.fixture(scope="module")
def relay_reference(
    _untrained: Workspace, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Weights, dict[str, Damage]]:
    workspace = copy_of(_untrained, tmp_path_factory.mktemp("relayed") / "workspace")
    job = job_of(workspace, source="relay")
    shutil.rmtree(workspace.store.root / KIND)  # nothing to read
    run_job(job)
    return weights_of(job), scores_of(job)


@pytest.fixture(scope="module")
def reference(_untrained: Workspace, _trained: Workspace) -> tuple[Weights, dict[str, Damage]]:
    job = job_of(_untrained).model_copy(update={"store": _trained.store.root})
    return weights_of(job), scores_of(job)


# ---------------------------------------------------------------- equivalences


def test_training_changes_the_inherited_weights_and_lowers_the_loss(untrained, reference):
    job = job_of(untrained)
    assert len(job.trainees) == 6
    run_job(job)
    for trainee in job.trainees:
        result = result_of(job, trainee)
        assert (result.stopped, result.num_epochs) == ("epochs", 2)
        assert result.best_val_loss < result.initial_val_loss
    assert_equal(weights_of(job), reference[0])


def test_a_relay_gives_what_the_cache_gives_bit_for_bit(relay_reference, reference):
    assert_equal(relay_reference[0], reference[0])
    assert relay_reference[1] == reference[1]


def test_a_relay_from_a_cut_gives_the_same_bits(untrained, reference):
    job = job_of(untrained, "relay")
    later = [t for t in job.trainees if t.block != "features.10"]
    cut, cuts = "features.14", {"features.14": "features.14"}
    job = part(job, later).model_copy(update={"start": cut, "cuts": cuts})
    subject = start(StageContext.load(untrained))
    fill = FillJob(
        sides=((cut, "cut"),),
        cuts=cuts,
        activations=job.activations,
        seed=job.seed,
        capture_batch=32,
        teacher=job.teacher,
        prepared=job.prepared,
        store=job.store,
    )
    run_fill(fill)
    finish_fill(Store(job.store), subject.keys([(cut, "cut")], cuts))
    run_job(job)
    assert_equal(weights_of(job), {t.name: reference[0][t.name] for t in later})


@pytest.mark.parametrize("source", ["cache", "relay"])
@pytest.mark.parametrize("grouping", ["a job per block", "a job per trainee", "shuffled halves"])
def test_grouping_and_order_change_neither_weights_nor_scores(
    untrained, reference, relay_reference, source, grouping
):
    weights, scores = reference if source == "cache" else relay_reference
    job = job_of(untrained, source)
    trainees = list(job.trainees)
    if grouping == "a job per block":
        blocks = sorted({t.block for t in trainees}, reverse=True)
        groups = [[t for t in trainees if t.block == block] for block in blocks]
    elif grouping == "a job per trainee":
        groups = [[t] for t in reversed(trainees)]
    else:
        random.Random(5).shuffle(trainees)
        groups = [trainees[:4], trainees[4:]]
    for index, group in enumerate(groups):
        report = run_job(part(job, group, f"job-{index}"))
        assert report.trained == tuple(t.name for t in group)
    assert_equal(weights_of(job), weights)
    assert scores_of(job) == scores


def test_another_process_with_as_many_threads_gives_the_same_bits(untrained, reference):
    job = job_of(untrained)
    code = (
        "import sys, torch; from pbkd.distill import JobSpec, run_job\n"
        f"torch.set_num_threads({torch.get_num_threads()}); torch.manual_seed(99)\n"
        "run_job(JobSpec.model_validate_json(sys.stdin.read()))\n"
    )
    subprocess.run([sys.executable, "-c", code], input=job.model_dump_json(), text=True, check=True)
    assert_equal(weights_of(job), reference[0])
    assert scores_of(job) == reference[1]


def test_the_global_random_state_does_not_matter(untrained, reference):
    job = job_of(untrained)
    torch.manual_seed(1234)
    np.random.seed(5)
    run_job(job)
    assert_equal(weights_of(job), reference[0])


def test_a_trainees_seed_drives_its_random_initialisation(untrained, reference):
    job = job_of(untrained)
    chosen = [t for t in job.trainees if t.config.init == "random"][:1]
    other = [t.model_copy(update={"seed": t.seed + 1, "key": "other"}) for t in chosen]
    run_job(part(job, other))
    got = load_tensors(Store(job.store).path(TRAINEES, "other") / WEIGHTS)
    expected = reference[0][chosen[0].name]
    assert not torch.equal(got["pointwise1.weight"], expected["pointwise1.weight"])


# ---------------------------------------------------------------- nothing is done twice


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_what_is_finished_is_not_trained_again(trained, untrained):
    job = job_of(untrained).model_copy(update={"store": trained.store.root})
    before = contents(trained.store.root)
    report = run_job(job)
    assert report.trained == ()
    assert contents(trained.store.root) == before
    assert plan_here(StageContext.load(trained)).jobs == ()


def test_a_missing_trainee_is_trained_alone(trained, reference):
    plan = plan_here(StageContext.load(trained))
    lost, *others = plan.trainees
    for kind, key in ((TRAINEES, lost.key), (SCORES, lost.score_key)):
        shutil.rmtree(trained.store.path(kind, key))
    before = {t.name: contents(trained.store.path(TRAINEES, t.key)) for t in others}
    (job,) = plan_here(StageContext.load(trained)).jobs
    assert run_job(job).trained == (lost.name,)
    assert {t.name: contents(trained.store.path(TRAINEES, t.key)) for t in others} == before
    assert_equal(weights_of(job), {lost.name: reference[0][lost.name]})


def test_the_end_of_the_stage_removes_what_is_left_of_other_trainings(trained):
    context = StageContext.load(trained)
    left = trained.checkpoint("distill", "of-other-parameters")
    left.parent.mkdir(parents=True)
    left.write_bytes(b"")
    finish_distill(context, plan_here(context), [])
    assert not left.parent.exists()


def test_a_changed_score_setting_scores_anew_and_trains_nothing(trained, tmp_path):
    before = contents(trained.store.root / TRAINEES)
    change(trained, "distill", score_images=50)
    plan = plan_here(StageContext.load(trained))
    jobs = [
        # a fresh state folder has no folder for the progress
        job.model_copy(update={"progress": tmp_path / "new" / "progress"})
        for job in plan.jobs
    ]
    assert {run_job(job).trained for job in jobs} == {()}
    assert contents(trained.store.root / TRAINEES) == before
    assert {d.num_images for job in jobs for d in scores_of(job).values()} == {50}
    assert len(list((trained.store.root / SCORES).iterdir())) == 12


def test_what_a_killed_run_left_behind_does_no_harm(untrained, reference):
    job = job_of(untrained)
    job.progress.mkdir(parents=True)
    for trainee in job.trainees:
        (job.progress / f"{trainee.key}.jsonl").write_text('{"epoch": 7, "val')
        partial = job.store / TRAINEES / f".{trainee.key}.999.tmp"
        partial.mkdir(parents=True)
        (partial / WEIGHTS).write_bytes(b"half")
    run_job(job)
    assert_equal(weights_of(job), reference[0])
    for trainee in job.trainees:
        history = read_history(Store(job.store).path(TRAINEES, trainee.key) / HISTORY)
        assert [line.epoch for line in history] == [-1, 0, 1]


def test_the_heartbeat_and_the_progress_are_there(untrained):
    job = part(job_of(untrained), job_of(untrained).trainees[:1], "job-007")
    run_job(job)
    assert job.heartbeat == job.progress / "job-007.alive"
    assert job.heartbeat.is_file()
    assert len(read_history(job.progress / f"{job.trainees[0].key}.jsonl")) == 3


# ---------------------------------------------------------------- views


def test_one_epochs_cache_holds_one_view_and_gives_the_same_bits(untrained):
    change(untrained, "distill", epochs=1)
    relayed = copy_of(untrained, untrained.root.parent / "relayed")
    shutil.rmtree(untrained.store.root / KIND)
    shutil.rmtree(untrained.artifacts("activations"))
    run_stage("activations", StageContext.load(untrained))
    views = {path.name for path in untrained.artifacts("activations").glob("*/*/*")}
    assert views == {"view-0", "view-val"}
    job = job_of(untrained)
    assert job.activations.views == 2, "the stream and the keys are those of the parameters"
    run_job(job)
    other = job_of(relayed, "relay")
    run_job(other)
    assert_equal(weights_of(job), weights_of(other))


def test_more_epochs_than_the_cache_was_made_for_are_refused(untrained):
    change(untrained, "distill", epochs=1)
    shutil.rmtree(untrained.store.root / KIND)
    shutil.rmtree(untrained.artifacts("activations"))
    run_stage("activations", StageContext.load(untrained))
    change(untrained, "distill", epochs=2)
    with pytest.raises(ArtifactError, match="2 views of 2 epochs; run: pbkd activations"):
        plan_here(StageContext.load(untrained))


def test_a_report_says_what_scores_took(untrained):
    job = job_of(untrained)
    report = run_job(job)
    assert 0 < report.score_s < report.duration_s


# ---------------------------------------------------------------- keys


def keys(workspace: Workspace) -> dict[str, tuple[str, str]]:
    plan = plan_here(StageContext.load(workspace))
    return {f"{t.block}/{t.config.depth}": (t.key, t.score_key) for t in plan.trainees}


def plan_for(workspace: Workspace, num_workers: int) -> DistillPlan:
    context = StageContext.load(workspace)
    subject = start(context)
    job = profile_job(workspace, subject, ["one"])
    profile = profiled(workspace, job, profile_here)
    return plan_distill(
        context, subject, subject.left_to_do(context.workspace.store), profile, num_workers
    )


def test_one_blocks_candidate_settings_change_that_blocks_keys_alone(untrained):
    before = keys(untrained)
    separable, deep = TWO_CANDIDATES
    change(untrained, "blocks", overrides={"features.10": [separable | {"batch_norm": True}, deep]})
    run_stage("blocks", StageContext.load(untrained))
    after = keys(untrained)
    assert {name for name in before if before[name] != after[name]} == {"features.10/1"}


@pytest.mark.parametrize(
    ("section", "values", "changes"),
    [
        ("distill", {"lr": 0.01}, "both"),
        ("distill", {"epochs": 3}, "both"),
        ("distill", {"optimizer": "rmsprop"}, "both"),
        ("distill", {"score_images": 50}, "score"),
        ("stitch", {"max_damage": 0.5}, "neither"),
        ("evaluate", {"batch_size": 8}, "neither"),
    ],
)
def test_keys_depend_on_training_settings_and_scores_on_scoring_settings(
    untrained, section, values, changes
):
    before = keys(untrained)
    change(untrained, section, **values)
    after = keys(untrained)
    for name in before:
        assert (before[name][0] != after[name][0]) == (changes == "both")
        assert (before[name][1] != after[name][1]) == (changes != "neither")


def test_workers_source_plan_device_and_place_are_in_no_key(untrained, tmp_path, monkeypatch):
    before = keys(untrained)
    monkeypatch.setenv("PBKD_WORKERS", "7")
    monkeypatch.setenv("PBKD_DEVICE", "cpu")
    change(untrained, "activations", source="relay")
    run_stage("activations", StageContext.load(untrained))
    moved = copy_of(untrained, tmp_path / "elsewhere")
    assert keys(moved) == before
    plans = [plan_for(moved, num_workers) for num_workers in (1, 2, 3)]
    assert all(len(plan.jobs) >= num for num, plan in enumerate(plans, start=1))
    assert len({tuple(t.key for t in plan.trainees) for plan in plans}) == 1


@pytest.mark.parametrize("changed", ["teacher", "data", "seed", "candidate", "activations"])
def test_a_key_depends_on_all_that_the_weights_depend_on(finished, changed):
    card = read_card(finished.artifacts("teacher"))
    config, seed, stream = SeparableConfig(), 1, {"views": 2}
    arguments = ("features.3", config, seed, card, DistillConfig(), stream)
    others = {
        "teacher": (*arguments[:3], card.model_copy(update={"digest": "x"}), *arguments[4:]),
        "data": (*arguments[:3], card.model_copy(update={"data_digest": "x"}), *arguments[4:]),
        "seed": ("features.3", config, 2, *arguments[3:]),
        "candidate": ("features.3", SeparableConfig(depth=2), *arguments[2:]),
        "activations": (*arguments[:5], {"views": 3}),
    }
    assert TraineeSpec.make(*others[changed]).key != TraineeSpec.make(*arguments).key


# ---------------------------------------------------------------- divergence


def poison(workspace: Workspace, block: str, view: int | str) -> None:
    """Put NaN into a block's cached outputs of one view, with the right checksums."""
    params = load_params(workspace.params)
    card = read_card(workspace.artifacts("teacher"))
    key = cache_key(card, params.activations, params.seed, block, "output", view)
    folder = workspace.store.path(KIND, key)
    for shard in folder.glob("*.safetensors"):
        tensors = load_tensors(shard)
        tensors["rows"].fill_(torch.nan)
        save_tensors(shard, tensors)
    (folder / MARKER).unlink()
    write_marker(folder, key)


@pytest.mark.parametrize(
    ("view", "epochs", "best_epoch"),
    [
        pytest.param(VAL, 0, -1, id="at the very start"),
        pytest.param(0, 1, -1, id="in the first epoch"),
        pytest.param(1, 2, 0, id="in the second epoch"),
    ],
)
def test_a_trainee_that_diverges_is_published_and_its_siblings_go_on(
    untrained, reference, view, epochs, best_epoch
):
    poison(untrained, "features.14", view)
    job = job_of(untrained)
    run_job(job)
    lost = [t for t in job.trainees if t.block == "features.14"]
    for trainee in lost:
        result = result_of(job, trainee)
        assert result.stopped == "diverged"
        assert "lower distill.lr" in result.message
        assert (result.num_epochs, result.best_epoch) == (epochs, best_epoch)
        assert (result.best_val_loss is None) == (view == VAL)
        tensors = weights_of(job)[trainee.name].values()
        assert all(tensor.isfinite().all() for tensor in tensors)
        assert scores_of(job)[trainee.name].kl is not None
    siblings = part(job, [t for t in job.trainees if t.block != "features.14"])
    assert_equal(weights_of(siblings), {t.name: reference[0][t.name] for t in siblings.trainees})
    assert {result_of(job, t).stopped for t in siblings.trainees} == {"epochs"}


def test_result_and_history_say_what_happened(untrained):
    job = job_of(untrained)
    job = part(job, job.trainees[:1])
    run_job(job)
    (trainee,) = job.trainees
    folder = Store(job.store).path(TRAINEES, trainee.key)
    result = json.loads((folder / RESULT).read_text())
    assert result["key"] == trainee.key
    assert f"{result['block']}/{result['candidate']}" == trainee.name
    history = read_history(folder / HISTORY)
    assert result["initial_val_loss"] == history[0].val_loss
    assert result["best_val_loss"] == min(line.val_loss for line in history)
    assert history[result["best_epoch"] + 1].val_loss == result["best_val_loss"]
    assert result["started_at"] <= history[0].time <= history[-1].time <= result["finished_at"]
    assert {p.name for p in folder.iterdir()} == {WEIGHTS, HISTORY, RESULT, "item.json"}
