"""Choose candidates under budgets, stitch them into the teacher, mend and fine-tune."""

from pbkd.students.assemble import build_model, load_model, stitch
from pbkd.students.budget import ChosenStudent, check_budgets, choose_students, needs_latency
from pbkd.students.edits import apply_edits
from pbkd.students.finetune import finetune
from pbkd.students.latency_table import LatencyMeter, LatencyTable, forget_latencies
from pbkd.students.options import Subject
from pbkd.students.recalibrate import recalibrate
from pbkd.students.repair import repair
from pbkd.students.select import (
    BlockOptions,
    Choice,
    Figures,
    Option,
    Selection,
    select,
    teacher_figures,
)

__all__ = [
    "BlockOptions",
    "Choice",
    "ChosenStudent",
    "Figures",
    "LatencyMeter",
    "LatencyTable",
    "Option",
    "Selection",
    "Subject",
    "apply_edits",
    "build_model",
    "check_budgets",
    "choose_students",
    "finetune",
    "forget_latencies",
    "load_model",
    "needs_latency",
    "recalibrate",
    "repair",
    "select",
    "stitch",
    "teacher_figures",
]
