"""The README of an exported version."""

from __future__ import annotations

import pytest

from pbkd import exporting
from pbkd.config import AugmentConfig
from pbkd.models import ModelCard, NetworkSpec
from pbkd.tracking.versions import ModelVersion

CARD = ModelCard(
    network=NetworkSpec(name="vgg_small", num_classes=2, in_channels=1),
    mean=(0.5,),
    std=(0.25,),
    image_size=(8, 8),
    class_names=("a", "b"),
    augment=AugmentConfig(),
    data_digest="data",
    digest="model",
)
VERSION = ModelVersion(name="n", number=1, student="s", model_digest="model", data_digest="data")


@pytest.mark.parametrize(("packed_bytes", "expected"), [(None, False), (48_402, True)])
def test_it_names_the_packed_file_where_there_is_one(
    packed_bytes: int | None, expected: bool
) -> None:
    text = exporting._readme(VERSION, CARD, packed_bytes)
    assert ('pbkd.load("model.pbkd")' in text) == expected
    assert ("48.4 kB" in text) == expected
