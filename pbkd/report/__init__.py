"""Figures as records, tables, pictures and a page."""

from pbkd.report.family import final_table, summary_sentence
from pbkd.report.page import ReportInputs, render
from pbkd.report.results import (
    MEASURED,
    METRICS,
    REGISTERED,
    REPORT,
    BaselineSeconds,
    BlockPhase,
    ExportFigures,
    JobFigures,
    LatencyFigures,
    MachineFigures,
    Measured,
    Metrics,
    ModelFigures,
    StageFigures,
    StudentFigures,
    TraineeFigures,
    read_measured,
    read_metrics,
)
from pbkd.report.runtimes import export_table, runtime_table
from pbkd.report.shrinking import file_sentence, shrink_table
from pbkd.report.tables import (
    Table,
    block_phase_sentence,
    stage_table,
)

__all__ = [
    "MEASURED",
    "METRICS",
    "REGISTERED",
    "REPORT",
    "BaselineSeconds",
    "BlockPhase",
    "ExportFigures",
    "JobFigures",
    "LatencyFigures",
    "MachineFigures",
    "Measured",
    "Metrics",
    "ModelFigures",
    "ReportInputs",
    "StageFigures",
    "StudentFigures",
    "Table",
    "TraineeFigures",
    "block_phase_sentence",
    "export_table",
    "file_sentence",
    "final_table",
    "read_measured",
    "read_metrics",
    "render",
    "runtime_table",
    "shrink_table",
    "stage_table",
    "summary_sentence",
]
