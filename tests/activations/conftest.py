"""The teacher and the data of most tests here."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.activations.cached import VGG_PATHS, Setup, vgg


@pytest.fixture
def setup(tmp_path: Path) -> Setup:
    return Setup(tmp_path, vgg(), VGG_PATHS)
