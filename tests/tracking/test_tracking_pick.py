"""The rule of `pick`, on versions made up."""

from __future__ import annotations

import math
from typing import Any

import pytest

from pbkd.config import Limit
from pbkd.errors import ConfigError
from pbkd.tracking.pick import Comparison, Wanted, compare
from pbkd.tracking.versions import MachineLatency, MeasuredLatency, ModelVersion, Setting
from tests.tracking.registered import FIGURES, latency_of

HERE, ELSEWHERE = "here", "elsewhere"
ORIGIN = ("data", "T")


def version(number: int, student: str = "s", **changes: Any) -> ModelVersion:
    """Figures as keywords; `ms`: latency here at batch 1 (a pair: machine, ms); None: absent."""
    ms = changes.pop("ms", None)
    data, teacher = changes.pop("origin", ORIGIN)
    figures = {k: v for k, v in (FIGURES | changes).items() if v is not None}
    machine, value = ms if isinstance(ms, tuple) else (HERE, ms)
    return ModelVersion(
        name="tiny",
        number=number,
        student=student,
        model_digest=f"digest-{number}",
        data_digest=data,
        teacher_digest=teacher,
        figures=figures,
        latency={} if ms is None else {machine: latency_of(machine, (1, value))},
    )


TEACHER = version(
    1, "teacher", val_accuracy=0.95, file_bytes=4000, num_parameters=800, macs=16000, ms=8.0
)


def pick(
    students: list[ModelVersion],
    *,
    min_accuracy: float | None = None,
    batch_size: int | None = None,
    share: bool = False,
    **limits: float,
) -> Comparison:
    given: Any = {figure: Limit(value, is_share=share) for figure, value in limits.items()}
    wanted = Wanted(given, min_accuracy, batch_size)
    return compare([TEACHER, *students], ORIGIN, wanted, HERE)


def chosen(found: Comparison) -> int | None:
    return found.chosen.version.number if found.chosen is not None else None


SMALL = version(2, "small", val_accuracy=0.90, file_bytes=500, num_parameters=100, macs=900, ms=2.0)
LARGE = version(
    3, "large", val_accuracy=0.94, file_bytes=2000, num_parameters=400, macs=4000, ms=6.0
)
FAMILY = [SMALL, LARGE]


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ({}, 3),
        ({"min_accuracy": 0.9}, 2),
        ({"min_accuracy": 0.91}, 3),
        ({"min_accuracy": 0.95}, None),
        ({"bytes": 2000}, 3),
        ({"bytes": 1999}, 2),
        ({"bytes": 499}, None),
        ({"parameters": 399}, 2),
        ({"macs": 3999}, 2),
        ({"latency": 5.9}, 2),
        ({"latency": 6.0}, 3),
        ({"bytes": 2000, "latency": 1.9}, None),
        ({"bytes": 1000, "min_accuracy": 0.91}, None),
        ({"bytes": 3000, "min_accuracy": 0.85}, 3),
        ({"bytes": 0.5, "share": True}, 3),
        ({"bytes": 0.49, "share": True}, 2),
        ({"latency": 0.7, "share": True}, 2),
        ({"macs": 0.05, "share": True}, None),
    ],
)
def test_the_most_accurate_within_all_limits_or_the_smallest_that_is_accurate_enough(
    wanted: dict[str, Any], expected: int | None
) -> None:
    assert chosen(pick(FAMILY, **wanted)) == expected


def test_of_equal_accuracy_the_smaller_file_then_the_older_version() -> None:
    equal = [version(2, file_bytes=600), version(3, file_bytes=500), version(4, file_bytes=500)]
    assert chosen(pick(equal, bytes=1000)) == 3
    accurate = [version(2, file_bytes=500, val_accuracy=0.91), version(3, file_bytes=500)]
    assert chosen(pick(accurate, min_accuracy=0.9)) == 2


def test_the_test_accuracy_decides_nothing() -> None:
    tempting = [version(2, test_accuracy=0.1, val_accuracy=0.9), version(3, test_accuracy=0.99)]
    assert chosen(pick(tempting, bytes=5000)) == 2


def test_a_teacher_is_never_chosen() -> None:
    found = pick([SMALL], bytes=4000)
    assert chosen(found) == 2
    assert found.teacher is not None
    assert not found.teacher.misses


def test_only_versions_of_the_same_data_and_teacher_compare() -> None:
    others = [
        version(4, val_accuracy=0.99, origin=("other", "T")),
        version(5, val_accuracy=0.99, origin=("data", "other")),
        version(6, val_accuracy=0.99, origin=("data", "")),
    ]
    found = pick([*FAMILY, *others])
    assert chosen(found) == 3
    assert found.left_out == 3


def test_what_each_version_misses_is_told_with_its_excess() -> None:
    found = pick(FAMILY, bytes=1000, latency=4.0, min_accuracy=0.92)
    small, large = found.students
    assert [(m.figure, m.value, m.limit) for m in small.misses] == [("accuracy", 0.90, 0.92)]
    assert {m.figure: m.excess for m in large.misses} == {
        "bytes": pytest.approx(1.0),
        "latency": pytest.approx(0.5),
    }
    assert [entry.version.number for entry in found.nearest] == [2, 3]


@pytest.mark.parametrize("ms", [None, (ELSEWHERE, 0.1), math.nan])
def test_a_latency_that_was_not_measured_here_keeps_no_limit(ms: Any) -> None:
    other = version(4, val_accuracy=0.99, ms=ms)
    found = pick([SMALL, other], latency=5.0)
    assert chosen(found) == 2
    assert [(m.figure, m.value) for m in found.students[1].misses] == [("latency", None)]
    assert chosen(pick([SMALL, other], bytes=5000)) == 4  # no limit, nothing to miss
    assert found.nearest[-1].version.number == 4


@pytest.mark.parametrize("accuracy", [None, math.nan, math.inf])
def test_a_version_without_a_finite_accuracy_is_never_chosen(accuracy: float | None) -> None:
    strange = version(4, val_accuracy=accuracy, file_bytes=1)
    assert chosen(pick([SMALL, strange])) == 2
    assert chosen(pick([SMALL, strange], min_accuracy=0.0)) == 2
    assert chosen(pick([strange])) is None


def test_a_version_of_an_older_pbkd_misses_what_is_not_on_record() -> None:
    older = version(2, macs=None, num_parameters=None, test_accuracy=None)
    assert chosen(pick([older], bytes=2000)) == 2
    assert chosen(pick([older], macs=5000)) is None
    assert chosen(pick([version(2, file_bytes=None)], min_accuracy=0.5)) is None


@pytest.mark.parametrize("figure", ["bytes", "latency"])
def test_a_share_needs_the_teachers_figure(figure: str) -> None:
    wanted: Any = Wanted({figure: Limit(0.5, is_share=True)})
    for teacher in ([], [version(1, "teacher", file_bytes=math.nan)]):
        with pytest.raises(ConfigError, match=f"limit of {figure} is 50% of the teacher's"):
            compare([*teacher, SMALL], ORIGIN, wanted, HERE)


def test_latencies_compare_at_one_batch_size_and_setting() -> None:
    both = {HERE: latency_of(HERE, (1, 2.0), (64, 40.0))}
    large_only = {HERE: latency_of(HERE, (64, 30.0))}
    one = SMALL.model_copy(update={"latency": both})
    other = LARGE.model_copy(update={"latency": large_only})
    found = pick([one, other])
    assert found.setting is not None
    assert found.setting.batch_size == 1
    assert [entry.latency_ms for entry in found.students] == [2.0, None]
    at_64 = pick([one, other], batch_size=64, latency=35.0)
    assert [entry.latency_ms for entry in at_64.students] == [40.0, 30.0]
    assert chosen(at_64) == 3
    assert pick([one, other], batch_size=7).setting is None


# ---------------------------------------------------------------- which latency counts


def measured(*entries: tuple[int, str, str, float]) -> dict[str, MachineLatency]:
    return {
        HERE: MachineLatency(
            machine_id=HERE,
            machine="m",
            entries=tuple(
                MeasuredLatency(
                    batch_size=1, threads=threads, device=device, runtime=runtime, median_ms=ms
                )
                for threads, device, runtime, ms in entries
            ),
        )
    }


MANY = measured(
    (4, "cpu", "pytorch", 3.0),
    (1, "cpu", "onnxruntime", 2.0),
    (1, "cpu", "pytorch", 6.0),
    (4, "cpu", "onnxruntime", 1.0),
)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, 6.0),
        ({"threads": 4}, 3.0),
        ({"runtime": "onnxruntime"}, 2.0),
        ({"runtime": "onnxruntime", "threads": 4}, 1.0),
        ({"threads": 2}, None),
        ({"runtime": "onnxruntime-int8"}, None),
    ],
)
def test_the_latency_is_that_of_one_runtime_and_number_of_threads(
    asked: Any, expected: Any
) -> None:
    student = SMALL.model_copy(update={"latency": MANY})
    found = compare([student], ORIGIN, Wanted(**asked), HERE)
    assert found.students[0].latency_ms == expected


def test_a_gpu_goes_before_the_cpu_unless_threads_are_asked_for() -> None:
    entries = ((1, "cpu", "pytorch", 6.0), (16, "cuda:0", "pytorch", 0.5))
    student = SMALL.model_copy(update={"latency": measured(*entries)})
    for wanted, expected in ((Wanted(), 0.5), (Wanted(threads=1), 6.0)):
        assert compare([student], ORIGIN, wanted, HERE).students[0].latency_ms == expected


def test_a_setting_names_its_runtime_where_it_is_not_pytorch() -> None:
    assert str(Setting(1, 2, "cpu")) == "batch 1 on cpu, 2 threads"
    assert str(Setting(1, 1, "cpu", "onnxruntime")) == "batch 1 on cpu, 1 thread, onnxruntime"


def test_latencies_of_earlier_versions_are_pytorchs() -> None:
    entry = {"batch_size": 1, "threads": 1, "device": "cpu", "median_ms": 2.0}
    assert MeasuredLatency.model_validate(entry).setting == Setting(1, 1, "cpu", "pytorch")
