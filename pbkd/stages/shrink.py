"""Stage `shrink`: make finished students' files smaller; an empty recipe passes them through."""

from __future__ import annotations

from pbkd.artifacts import atomic_dir, write_json
from pbkd.models import save_model
from pbkd.stages.context import StageContext, student_folders
from pbkd.students import load_model


def run(context: StageContext) -> None:
    """Write ``artifacts/shrink/STUDENT/``: model and ``shrink.json`` with the steps taken."""
    sources = student_folders(context.workspace, "finetune")
    with atomic_dir(context.workspace.artifacts("shrink")) as folder:
        for source in sources:
            model, card = load_model(source, allow_code=True)
            save_model(folder / source.name, model, card)
            write_json(folder / source.name / "shrink.json", {"steps": []})
