"""Latency by runtime, and the exported files, in the report."""

from __future__ import annotations

from typing import Any

import pytest

from pbkd.measure import headline
from pbkd.report import LatencyFigures, Measured, export_table, runtime_table, summary_sentence
from pbkd.report.runtimes import export_sentence
from tests.report.html_page import Page
from tests.report.made_up import family, inputs, latency


def entry(batch_size: int, threads: int, runtime: str, ms: float, device: str = "cpu") -> Any:
    where = {"threads": threads, "runtime": runtime, "device": device}
    return latency(batch_size, ms) | where


def settings(factor: float) -> list[Any]:
    return [
        entry(1, 1, "pytorch", 8 * factor),
        entry(1, 1, "onnxruntime", 2 * factor),
        entry(1, 1, "onnxruntime-int8", 1 * factor),
        entry(1, 2, "pytorch", 6 * factor),
        entry(1, 2, "onnxruntime", 3 * factor),
    ]


FILE = {
    "file_bytes": 1_000_000,
    "max_difference": 2e-5,
    "max_logit": 10.0,
    "same_predictions": 1.0,
    "num_images": 64,
}
INT8 = FILE | {"file_bytes": 260_000, "val_accuracy": 0.9, "test_accuracy": 0.93}


def measured_with(num_students: int, **changes: Any) -> tuple[Any, Measured]:
    metrics, measured = family(num_students)
    names = ["teacher", *metrics.students]
    figures = {name: settings(1 / (1 + index)) for index, name in enumerate(names)}
    record = measured.model_dump() | {"latency": figures} | changes
    return metrics, Measured.model_validate(record)


def test_a_few_models_are_columns_and_settings_rows():
    table = runtime_table(*measured_with(1))
    assert table is not None
    assert table.heads == ("", "runtime", "teacher", "half")
    assert table.rows == (
        ("batch 1, 1 thread", "PyTorch", "8.00", "4.00"),
        ("batch 1, 1 thread", "onnxruntime", "2.00 (4.00x)", "1.00 (4.00x)"),
        ("batch 1, 1 thread", "onnxruntime int8", "1.00 (8.00x)", "0.50 (8.00x)"),
        ("batch 1, 2 threads", "PyTorch", "6.00", "3.00"),
        ("batch 1, 2 threads", "onnxruntime", "3.00 (2.00x)", "1.50 (2.00x)"),
    )


def test_many_models_are_rows():
    metrics, measured = measured_with(5)
    table = runtime_table(metrics, measured)
    assert table is not None
    assert table.heads[:3] == (
        "model",
        "batch 1, 1 thread, PyTorch",
        "batch 1, 1 thread, onnxruntime",
    )
    assert [row[0] for row in table.rows] == ["teacher", *metrics.by_size]
    assert all(len(row) == len(table.heads) for row in table.rows)


def test_what_was_not_measured_is_said():
    metrics, measured = measured_with(1)
    latencies = {
        name: entries[:1] if name == "half" else entries
        for name, entries in measured.latency.items()
    }
    table = runtime_table(metrics, measured.model_copy(update={"latency": latencies}))
    assert table is not None
    assert [row[3] for row in table.rows] == ["4.00", *["not measured"] * 4]


def test_one_runtime_at_one_number_of_threads_needs_no_table():
    metrics, measured = family(2)
    assert runtime_table(metrics, measured) is None
    assert export_table(metrics, measured) is None
    assert export_sentence(measured) == ""


def test_the_headline_is_pytorchs_fastest_or_on_the_gpu():
    metrics, measured = measured_with(1)
    assert [(e.runtime, e.threads) for e in measured.headline["half"]] == [("pytorch", 2)]
    assert "2.00x faster at batch 1," in summary_sentence(metrics, measured)
    entries = [LatencyFigures.model_validate(e) for e in settings(1)]
    gpu = LatencyFigures.model_validate(entry(1, 1, "pytorch", 0.5, device="cuda:0"))
    large = LatencyFigures.model_validate(entry(64, 1, "pytorch", 50))
    assert headline([*entries, gpu, large]) == (gpu, large)
    assert headline([gpu, *entries]) == (gpu,)
    assert headline(entries[1:3]) == ()
    waiting = LatencyFigures.model_validate(entry(1, 2, "pytorch", 300))  # for a busy core
    assert headline([entries[0], waiting]) == (entries[0],)


def test_older_files_are_pytorchs():
    assert LatencyFigures.model_validate(latency(1, 2.0)).runtime == "pytorch"


def test_files_are_listed_with_what_int8_keeps():
    exports = {
        "teacher": {"onnxruntime": FILE, "onnxruntime-int8": INT8},
        "half": {"onnxruntime": FILE},
    }
    metrics, measured = measured_with(1, exports=exports)
    table = export_table(metrics, measured)
    assert table is not None
    teacher, half = table.rows
    assert teacher[:3] == ("teacher", "1 MB", "260 kB")
    assert teacher[3] == "93.00% (-0.30 points)"
    assert half == ("half", "1 MB", *["not measured"] * 3)
    assert "to within 2e-06 of the largest logit on 64 validation images" in export_sentence(
        measured
    )


@pytest.mark.parametrize("num_students", [1, 6])
def test_the_page_shows_both(num_students):
    exports = {"teacher": {"onnxruntime": FILE}}
    metrics, measured = measured_with(num_students, exports=exports)
    from pbkd.report import render

    text = Page(render(inputs(metrics, measured))).text
    assert any("Latency by runtime" in line for line in text)
    assert any("Exported files" in line for line in text)
