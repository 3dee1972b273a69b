"""Exported files of small networks, made once: an export takes seconds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from pbkd.export import to_int8, to_onnx
from pbkd.models import Classifier, ModelCard
from tests.export.networks import NETWORKS, images_of, network


@dataclass(frozen=True)
class Files:
    """A model and its ONNX files."""

    model: Classifier
    card: ModelCard
    onnx: Path
    int8: Path


@pytest.fixture(scope="session", params=list(NETWORKS))
def files(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Files:
    """Of each network in turn."""
    return _made(request.param, tmp_path_factory)


@pytest.fixture(scope="session")
def vgg(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """Of a VGG alone."""
    return _made("vgg_small", tmp_path_factory)


_cache: dict[str, Files] = {}


def _made(name: str, factory: pytest.TempPathFactory) -> Files:
    if name not in _cache:
        folder = factory.mktemp(name)
        model, card = network(name)
        onnx, int8 = folder / "model.onnx", folder / "model-int8.onnx"
        to_onnx(model, card, onnx)
        to_int8(onnx, images_of(card, 40, seed=500), int8)
        _cache[name] = Files(model, card, onnx, int8)
    return _cache[name]
