"""Teachers on Ray: they label what students ask for, whoever dies meanwhile."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from pbkd.artifacts import Workspace, read_json
from pbkd.elastic import actors
from pbkd.elastic import pool as pools
from pbkd.elastic.actors import RayBoard, ray_module
from pbkd.elastic.chunks import keep_view
from pbkd.elastic.label_plan import LABELS, LabelPlan
from pbkd.elastic.pool import PoolSize, TeacherPool
from pbkd.elastic.soft_labels import SoftLabels
from pbkd.elastic.status import read_status
from pbkd.elastic.stream import LabelStream
from pbkd.errors import TrainingError
from pbkd.models import Classifier
from pbkd.settings import Settings
from pbkd.stages import StageContext, finetune
from pbkd.stages.labels import label_plan
from pbkd.stages.teacher import read_teacher

pytestmark = pytest.mark.filterwarnings("ignore")

ELASTIC = "finetune: {teachers: elastic, views: 2, epochs: 3}"


def until(condition: Callable[[], object], seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


@pytest.fixture
def context(finished: Workspace) -> StageContext:
    text = finished.params.read_text().replace("finetune: {epochs: 1}", ELASTIC)
    finished.params.write_text(text)
    return StageContext.load(finished)


@pytest.fixture
def plan(context: StageContext) -> LabelPlan:
    (job,) = finetune.start(context)
    return LabelPlan(**(vars(label_plan(job)) | {"chunk": 64}))


@pytest.fixture
def teacher(finished: Workspace) -> Classifier:
    return read_teacher(finished)[0].eval()


@pytest.fixture
def pool(cluster: str, plan: LabelPlan, tmp_path: Path) -> Iterator[TeacherPool]:
    with TeacherPool(plan, PoolSize(1, 2), tmp_path / "teachers.json") as made:
        yield made


def stream_of(
    context: StageContext, plan: LabelPlan, pool: TeacherPool, name: str = "s", **settings: object
) -> LabelStream:
    (job,) = finetune.start(context)
    from pbkd.data import load_prepared
    from pbkd.models import read_card

    card, prepared = read_card(job.student), load_prepared(job.prepared)
    train, _ = job.streams(card, prepared, views=len(plan.keys))
    given = {"deadline_s": 120.0, "may_lack": False} | settings
    board = RayBoard(pool.board, pool.address)
    return LabelStream(plan, board, name, train, len(card.class_names), **given)  # type: ignore[arg-type]


def read(labels: LabelStream, teacher: Classifier, epoch: int, batch_size: int = 50) -> int:
    """Read an epoch and compare every label with the teacher's own; returns the images."""
    seen: list[int] = []
    for batch in labels.train.epoch(epoch, batch_size):
        found = labels(batch)
        assert found is not None
        with torch.no_grad():
            torch.testing.assert_close(found, teacher(batch.images_nchw), rtol=1e-2, atol=1e-2)
        seen += batch.rows.tolist()
    assert len(seen) == len(set(seen))
    return len(seen)


def pids(pool: TeacherPool) -> list[int]:
    return [place[1] for place in pool.places().values() if place is not None]


def test_students_read_what_teachers_label_and_views_are_kept(
    context: StageContext, plan: LabelPlan, pool: TeacherPool, teacher: Classifier
) -> None:
    labels = stream_of(context, plan, pool)
    whole = plan.num_images // 50 * 50
    last = plan.num_chunks - 1  # of which no whole batch needs an image
    assert read(labels, teacher, 0) == whole
    until(lambda: plan.is_done((0, last)))
    assert read(labels, teacher, 1) == whole
    assert plan.is_kept(0)
    assert not list(plan.folder.glob(f"{plan.keys[0]}/*"))
    other = stream_of(context, plan, pool, "other")
    assert read(other, teacher, 0) == whole
    until(lambda: plan.is_done((1, last)))
    assert read(labels, teacher, 2) == whole  # view 0 again
    assert read(labels, teacher, 3) == whole
    stats = ray_module().get(pool._actor.look.remote(1))
    assert sum(state.num_done for state in stats.teachers.values()) == 2 * plan.num_chunks
    until(lambda: (status := read_status(pool.status)) and status.teachers["teacher-1"].rate)


def test_a_killed_teacher_is_replaced_and_its_chunk_done_again(
    context: StageContext, plan: LabelPlan, pool: TeacherPool, teacher: Classifier
) -> None:
    labels = stream_of(context, plan, pool)
    until(lambda: pids(pool))
    first = next(labels.train.epoch(0, 50))
    assert labels(first) is not None
    (victim,) = pids(pool)[:1]
    os.kill(victim, signal.SIGKILL)
    assert read(labels, teacher, 0) == plan.num_images // 50 * 50
    assert read(labels, teacher, 1) == plan.num_images // 50 * 50
    assert victim not in pids(pool)


@pytest.mark.slow
def test_a_stopped_teacher_is_replaced(
    context: StageContext,
    plan: LabelPlan,
    pool: TeacherPool,
    teacher: Classifier,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pools, "_HANG_S", 1.0)
    monkeypatch.setattr(pools, "_HANG", 0.0)
    labels = stream_of(context, plan, pool)
    until(lambda: pids(pool))
    for pid in pids(pool):
        os.kill(pid, signal.SIGSTOP)
    assert read(labels, teacher, 0) == plan.num_images // 50 * 50


@pytest.mark.slow
def test_the_board_comes_back(
    context: StageContext, plan: LabelPlan, pool: TeacherPool, teacher: Classifier
) -> None:
    labels = stream_of(context, plan, pool)
    assert labels(next(labels.train.epoch(0, 50))) is not None
    ray_module().kill(pool._actor, no_restart=False)
    assert read(labels, teacher, 0) == plan.num_images // 50 * 50


def test_without_teachers_it_is_an_error_after_the_deadline(
    context: StageContext, plan: LabelPlan, cluster: str, tmp_path: Path
) -> None:
    with TeacherPool(plan, PoolSize(0, 1, cpus=100.0), tmp_path / "teachers.json") as none:
        labels = stream_of(context, plan, none, deadline_s=1.0)
        began_s = time.monotonic()
        with pytest.raises(TrainingError, match=r"no label of the teacher came for 1 s"):
            labels(next(labels.train.epoch(0, 50)))
        assert 1.0 <= time.monotonic() - began_s < 60.0


@pytest.mark.slow
def test_without_teachers_a_student_goes_on_and_takes_them_again(
    context: StageContext, plan: LabelPlan, pool: TeacherPool, teacher: Classifier
) -> None:
    labels = stream_of(context, plan, pool, deadline_s=1.0, may_lack=True)
    labels.deadline_s = 120.0
    assert read(labels, teacher, 0) > 0
    pool.size = PoolSize(0, 0)  # none may come
    for name in list(pool._teachers):
        pool._dismiss(name)
    labels.deadline_s = 1.0
    batches = list(labels.train.epoch(1, 50))
    lacking = [batch for batch in batches if labels(batch) is None]
    assert len(lacking) == len(batches)
    assert labels.num_lacking == sum(len(batch.rows) for batch in batches)
    assert labels.view_of(1) == 0, "a kept view instead of one without labels"
    pool.size = PoolSize(1, 2)
    until(lambda: labels(batches[0]) is not None)
    assert labels.view_of(1) == 1


@pytest.mark.slow
def test_a_pool_grows_while_students_wait_and_shrinks_when_nothing_is_to_do(
    context: StageContext,
    plan: LabelPlan,
    pool: TeacherPool,
    teacher: Classifier,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pools, "_GROW_S", 0.0)
    monkeypatch.setattr(pools, "_SHRINK_S", 1.0)
    labels = stream_of(context, plan, pool)
    assert len(pool.places()) == 1
    board, ray = labels.board, ray_module()
    until(lambda: pids(pool))
    for pid in pids(pool):  # a teacher too slow for its student
        os.kill(pid, signal.SIGSTOP)

    def has_grown() -> bool:
        board.want("s", [(0, 0), (0, 1)], wait=False)
        return len(pool.places()) == 2

    until(has_grown)
    for pid in pids(pool):
        os.kill(pid, signal.SIGCONT)
    assert read(labels, teacher, 0) > 0
    labels.close()
    until(lambda: len(pool.places()) == 1)
    assert ray.is_initialized()


def test_the_stage_trains_with_them_as_with_kept_labels(
    context: StageContext, cluster: str, finished: Workspace
) -> None:
    finetune.run(context)
    (folder,) = (path for path in finished.artifacts("finetune").iterdir() if path.is_dir())
    record = read_json(folder / "finetune.json")
    assert (record["epochs"], record["num_lacking"]) == (3, 0)
    (job,) = finetune.start(context)
    kept = [finished.store.path(LABELS, key) for key in job.labels]
    assert [finished.store.has(LABELS, key) for key in job.labels] == [True, True]
    assert isinstance(SoftLabels(kept, 10, 4.0, "cpu"), SoftLabels)
    assert not (finished.state / "teachers.json").exists()
    assert all(keep_view(label_plan(job), view) for view in range(2))


def test_where_all_labels_are_kept_no_cluster_is_started(
    context: StageContext, monkeypatch: pytest.MonkeyPatch, finished: Workspace
) -> None:
    text = finished.params.read_text()
    finished.params.write_text(text.replace("teachers: elastic", "teachers: cached"))
    finetune.run(StageContext.load(finished))
    finished.params.write_text(text)
    monkeypatch.setattr(actors, "ray_module", lambda: 1 / 0)
    finetune.run(context)
    assert Settings.from_env({}).max_teachers == 4
