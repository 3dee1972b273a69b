"""What can be known to be wrong before any work begins, whichever stage will stumble over it."""

from __future__ import annotations

from pbkd.data.torchvision_sets import find_set
from pbkd.errors import DataError
from pbkd.models import check_name, check_weights
from pbkd.stages.context import StageContext


def preflight(context: StageContext) -> None:
    """Look for the images, the network and the weights that the parameters name.

    Raises:
        DataError: there are no such images. TeacherError: no such network or weights.
    """
    prepare, root = context.params.prepare, context.workspace.root
    if prepare.source == "image_folder" and not (root / prepare.path).exists():
        raise DataError(
            f"prepare.path: {root / prepare.path} does not exist; expected a folder, .tar.gz or "
            ".zip of images; put them there, or change prepare.path (`dvc pull` if DVC has them)"
        )
    if prepare.source == "torchvision":
        find_set(prepare.dataset)
    check_name(context.params.teacher.model)
    has_teacher = context.workspace.artifacts("teacher").is_dir()
    check_weights(context.params.teacher, root, has_teacher=has_teacher)
