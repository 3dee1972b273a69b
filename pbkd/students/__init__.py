"""Choose candidates, stitch them into the teacher, recalibrate, fine-tune."""

from pbkd.students.assemble import load_model, stitch
from pbkd.students.finetune import finetune
from pbkd.students.repair import recalibrate
from pbkd.students.select import Choice, choose

__all__ = ["Choice", "choose", "finetune", "load_model", "recalibrate", "stitch"]
