"""torch.export archives."""

from __future__ import annotations

import subprocess
import sys
import zipfile

import pytest
import torch

from pbkd.errors import ArtifactError, ExportError
from pbkd.export import load_pt2, parity, to_pt2
from tests.export.networks import CLASSES, images_of, network
from tests.export.test_export_onnx import Guessing


@pytest.fixture(scope="module", params=["cifar_resnet20", "student"])
def archive(request, tmp_path_factory):
    model, card = network(request.param)
    path = tmp_path_factory.mktemp("pt2") / "model.pt2"
    to_pt2(model, card, path)
    return model, card, path


def test_logits_are_the_models_at_every_batch_size(archive):
    model, card, path = archive
    loaded = load_pt2(path)
    assert (loaded.class_names, loaded.digest) == (CLASSES, card.digest)
    for batch_size in (1, 2, 7):
        images = images_of(card, batch_size, seed=3)
        with torch.no_grad():
            assert loaded.module(images).shape == (batch_size, len(CLASSES))
    found = parity(model, loaded.module, images_of(card, 70, seed=4))
    assert found.is_close
    assert found.same_predictions == 1


def test_no_path_of_this_machine_is_in_the_archive(archive):
    with zipfile.ZipFile(archive[2]) as archived:
        for name in archived.namelist():
            assert b", line " not in archived.read(name), name
    assert [path.name for path in archive[2].parent.iterdir()] == ["model.pt2"]


def test_pytorch_alone_loads_it(archive):
    if archive[1].replacements:
        pytest.skip("one archive is enough: torch takes seconds to start")
    code = (
        "import sys, torch\n"
        f"model = torch.export.load({str(archive[2])!r}).module()\n"
        f"print(tuple(model(torch.rand(3, 3, *{archive[1].image_size})).shape))\n"
        "print('pbkd' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["(3, 5)", "False"]


def test_errors(tmp_path):
    model, card = network("vgg_small")
    model.net = Guessing()
    with pytest.raises(ExportError, match=r"cannot be traced by torch\.export"):
        to_pt2(model, card, tmp_path / "model.pt2")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "other.pt2").write_bytes(b"nothing")
    for name in ("other", "absent"):
        with pytest.raises(ArtifactError, match="is no archive"):
            load_pt2(tmp_path / f"{name}.pt2")
