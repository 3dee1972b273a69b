"""Networks by name, their training, and their files."""

from pbkd.models.checkpoint import (
    ModelCard,
    build_classifier,
    fill,
    load_teacher,
    load_weights,
    model_digest,
    read_card,
    save_model,
)
from pbkd.models.inference import Predictions, predict
from pbkd.models.pretrained import (
    Pretrained,
    check_weights,
    load_pretrained,
    pretrained_transforms,
)
from pbkd.models.training import EpochRecord, Recipe, fit
from pbkd.models.zoo import (
    Classifier,
    NetworkSpec,
    build_network,
    check_name,
    check_network,
    network_code,
    network_names,
)

__all__ = [
    "Classifier",
    "EpochRecord",
    "ModelCard",
    "NetworkSpec",
    "Predictions",
    "Pretrained",
    "Recipe",
    "build_classifier",
    "build_network",
    "check_name",
    "check_network",
    "check_weights",
    "fill",
    "fit",
    "load_pretrained",
    "load_teacher",
    "load_weights",
    "model_digest",
    "network_code",
    "network_names",
    "predict",
    "pretrained_transforms",
    "read_card",
    "save_model",
]
