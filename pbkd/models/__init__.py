"""Networks by name, their training, and their files."""

from pbkd.models.checkpoint import (
    ModelCard,
    build_classifier,
    load_teacher,
    load_weights,
    read_card,
    save_model,
)
from pbkd.models.inference import Predictions, predict
from pbkd.models.training import EpochRecord, fit
from pbkd.models.zoo import Classifier, NetworkSpec, build_network, network_names

__all__ = [
    "Classifier",
    "EpochRecord",
    "ModelCard",
    "NetworkSpec",
    "Predictions",
    "build_classifier",
    "build_network",
    "fit",
    "load_teacher",
    "load_weights",
    "network_names",
    "predict",
    "read_card",
    "save_model",
]
