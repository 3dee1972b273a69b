"""The `.pbkd` file: exact, deterministic, and every damage told before it is believed."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from format_decoder import read as read_by_the_document
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_students import card_of, images_of, stitched, student_of
from torch import nn
from typer.testing import CliRunner

import pbkd
from pbkd.cli import app
from pbkd.config import CustomConfig, Resized
from pbkd.errors import ArtifactError, CandidateError, PbkdError, TeacherError
from pbkd.models import Classifier
from pbkd.packing import pack_folder, unpack_file
from pbkd.shrink.codec import Entry
from pbkd.shrink.container import VERSION, open_packed, pack, pack_state, unpack
from pbkd.shrink.grids import Codebook, Grid, Quantized
from pbkd.shrink.header import DICTIONARY, deflated, inflated
from pbkd.shrink.numbers import bits_of_tensor
from pbkd.shrink.state import Shrunk
from pbkd.shrink.unpacking import load_packed, read_packed

PREAMBLE = struct.Struct("<4sHII8s")


def quantized(shrunk: Shrunk, bits: int = 4, zeros: float = 0.6) -> Shrunk:
    """Pruned, then on grids, the last matrix in a codebook, all else in half precision."""
    grids: dict[str, Quantized] = {}
    with torch.no_grad():
        for name, tensor in shrunk.model.state_dict().items():
            if tensor.dim() > 1 and name not in ("mean", "std"):
                tensor[tensor.abs() < tensor.abs().quantile(zeros)] = 0
                largest = tensor.flatten(1).abs().amax(1).clamp(min=1e-3)
                grid = Grid((largest / (2 ** (bits - 1) - 1)).half().float(), bits)
                tensor.copy_(grid.values(grid.codes(tensor)))
                grids[name] = grid
            elif tensor.dtype == torch.float32 and name not in ("mean", "std"):
                tensor.copy_(tensor.half().float())
        last = list(grids)[-1]
        book = Codebook(torch.tensor([-0.25, -0.0625, 0.0, 0.125, 0.3125]))
        weights = shrunk.model.state_dict()[last]
        weights.copy_(book.values(book.codes(weights)))
        grids[last] = book
    return replace(shrunk, grids=grids)


@cache
def small() -> Shrunk:
    return quantized(student_of(card_of("vgg_small", channels=1)))


@cache
def packed_small() -> bytes:
    return pack(small())


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[n].dtype == other[n].dtype
        and one[n].shape == other[n].shape
        and np.array_equal(bits_of_tensor(one[n]), bits_of_tensor(other[n]))
        for n in one
    )


def sealed(body: bytes) -> bytes:
    """What a malicious writer does: whatever was changed gets the right checksum."""
    import hashlib

    return body + hashlib.blake2b(body, digest_size=8).digest()


def with_header(data: bytes, change: Callable[[dict[str, Any]], Any]) -> bytes:
    """The file with another header."""
    header_bytes = PREAMBLE.unpack_from(data)[2]
    raw = data[PREAMBLE.size : PREAMBLE.size + header_bytes]
    value = json.loads(zlib.decompressobj(-15, zdict=DICTIONARY).decompress(raw))
    changed = change(value)
    text = json.dumps(value if changed is None else changed).encode()
    return with_json(data, text)


def with_json(data: bytes, text: bytes) -> bytes:
    magic, version, header_bytes, _, checksum = PREAMBLE.unpack_from(data)
    compressor = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zdict=DICTIONARY)
    raw = compressor.compress(text) + compressor.flush()
    words = data[PREAMBLE.size + header_bytes : -8]
    return sealed(PREAMBLE.pack(magic, version, len(raw), len(text), checksum) + raw + words)


def loaded(data: bytes) -> Shrunk:
    return load_packed(open_packed(data, "small.pbkd"))


def refused(data: bytes) -> str:
    with pytest.raises(ArtifactError) as caught:
        loaded(data)
    message = str(caught.value)
    assert message.startswith("small.pbkd")
    assert ";" in message  # the next step
    return message


# ---------------------------------------------------------------- exactness


def test_a_model_comes_back_bit_for_bit() -> None:
    shrunk = small()
    card, tensors, grids = unpack(packed_small())
    assert same(tensors, dict(shrunk.model.state_dict()))
    assert card.model_copy(update={"digest": ""}) == shrunk.card
    assert grids.keys() == shrunk.grids.keys()
    again = loaded(packed_small())
    images = images_of(shrunk.card)
    assert torch.equal(again.model(images), shrunk.model(images))
    assert not again.model.training
    assert {e.coding for e in open_packed(packed_small(), "").header.plan.tensors} >= {
        "codes",
        "half",
        "const",
    }


@pytest.mark.parametrize(
    "shrunk",
    [
        lambda: student_of(card_of("cifar_resnet20")),
        lambda: quantized(stitched(), bits=8, zeros=0.1),
        lambda: quantized(student_of(card_of("mobilenet_v3_small")), bits=3),
    ],
    ids=["float32", "candidates", "torchvision"],
)
def test_other_students_come_back(shrunk: Callable[[], Shrunk]) -> None:
    student = shrunk()
    again = loaded(pack(student))
    assert same(dict(again.model.state_dict()), dict(student.model.state_dict()))
    images = images_of(student.card)
    assert torch.equal(again.model(images), student.model(images))


def test_narrower_layers_come_back() -> None:
    student = student_of(card_of("vgg_small", channels=1))
    edit = Resized(layers={"features.0": (5, 1, 1), "features.1": (5,), "features.3": (8, 5, 1)})
    card = student.card.model_copy(update={"edits": (edit,)})
    student = student_of(card)
    again = loaded(pack(student))
    assert again.card.edits == (edit,)
    assert same(dict(again.model.state_dict()), dict(student.model.state_dict()))


def test_equal_models_give_equal_bytes() -> None:
    again = quantized(student_of(card_of("vgg_small", channels=1)))
    assert pack(again) == packed_small()
    card, tensors, grids = unpack(packed_small())
    backwards = dict(reversed(tensors.items()))
    assert pack_state(card, backwards, dict(reversed(grids.items()))) == packed_small()


def test_the_document_is_enough_for_a_decoder() -> None:
    card, tensors = read_by_the_document(packed_small(), DICTIONARY)
    state = small().model.state_dict()
    assert tensors.keys() == state.keys()
    for name, patterns in tensors.items():
        assert patterns == bits_of_tensor(state[name]).tolist(), name
    assert card["network"]["name"] == "vgg_small"


def test_the_document_has_the_dictionary() -> None:
    text = (Path(__file__).parents[2] / "docs" / "format.md").read_text()
    assert "".join(text.split("```dictionary\n")[1].split("\n```")[0].splitlines()) == (
        DICTIONARY.decode()
    )


# ---------------------------------------------------------------- folders, verbs, pbkd.load


def test_unpack_then_pack_gives_the_same_bytes(tmp_path: Path) -> None:
    small().save(tmp_path / "folder")
    first = pack_folder(tmp_path / "folder", tmp_path / "one.pbkd")
    assert first.path.read_bytes() == packed_small()
    assert first.size_bytes == len(packed_small())
    unpack_file(first.path, tmp_path / "again")
    assert (tmp_path / "again" / "model.json").read_bytes() == (
        tmp_path / "folder" / "model.json"
    ).read_bytes()
    pack_folder(tmp_path / "again", tmp_path / "two.pbkd")
    assert (tmp_path / "two.pbkd").read_bytes() == packed_small()
    images = images_of(small().card)
    expected = small().model(images)
    assert torch.equal(pbkd.load(tmp_path / "again")(images), expected)
    model = pbkd.load(str(tmp_path / "one.pbkd"))
    assert torch.equal(model(images), expected)
    assert model.class_names == small().card.class_names
    assert Shrunk.load(tmp_path / "again").grids.keys() == small().grids.keys()


def test_the_verbs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    small().save(tmp_path / "folder")
    run = CliRunner().invoke
    result = run(app, ["pack", "folder"])
    assert result.exit_code == 0, result.output
    assert "bits per number" in result.output
    assert 'pbkd.load("model.pbkd")' in result.output
    result = run(app, ["unpack", "model.pbkd", "out"])
    assert result.exit_code == 0, result.output
    assert torch.equal(
        pbkd.load("out")(images_of(small().card)), small().model(images_of(small().card))
    )
    for arguments, message in (
        (["pack", "folder", "-o", "model.bin"], "ends in .pbkd"),
        (["unpack", "model.pbkd", "out"], "not empty"),
        (["unpack", "none.pbkd", "new"], "is missing"),
        (["pack", "nothing"], "neither a folder nor a student"),
    ):
        error = run(app, arguments).exception
        assert isinstance(error, ArtifactError)
        assert message in str(error)


def test_a_changed_folder_is_not_packed(tmp_path: Path) -> None:
    small().save(tmp_path)
    text = (tmp_path / "model.json").read_text()
    (tmp_path / "model.json").write_text(text.replace('"a"', '"z"'))
    with pytest.raises(ArtifactError, match="do not belong together"):
        pack_folder(tmp_path, tmp_path / "x.pbkd")
    assert not (tmp_path / "x.pbkd").exists()


def test_a_fresh_process_gives_the_same_logits(tmp_path: Path) -> None:
    (tmp_path / "m.pbkd").write_bytes(packed_small())
    images = images_of(small().card)
    np.save(tmp_path / "images.npy", images.numpy())
    script = (
        "import sys, numpy, torch, pbkd; torch.set_num_threads(1); "
        "model = pbkd.load('m.pbkd'); assert 'pbkd.api' not in sys.modules; "
        "numpy.save('logits.npy', model(torch.from_numpy(numpy.load('images.npy'))).detach())"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, check=True)
    expected = small().model(images).detach().numpy()
    assert np.array_equal(np.load(tmp_path / "logits.npy"), expected)


# ---------------------------------------------------------------- networks of the user's own


class Own(nn.Module):
    def __init__(self, channels: int = 6) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels)
        self.fc = nn.Linear(channels, 4)

    def forward(self, x_nchw: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.fc(torch.relu(self.norm(self.stem(x_nchw))).mean((2, 3)))
        return y


def own_student() -> Shrunk:
    card = card_of("nowhere.at_all:network", channels=1)
    card = card.model_copy(update={"edits": (Resized(layers={"fc": (4, 6)}),)})
    torch.manual_seed(0)
    return quantized(Shrunk(Classifier(Own(), card.mean, card.std).eval(), card))


def test_a_network_of_ones_own_is_given(tmp_path: Path) -> None:
    shrunk = own_student()
    path = tmp_path / "own.pbkd"
    path.write_bytes(pack(shrunk))
    with pytest.raises(TeacherError, match=r"model=\.\.\."):
        pbkd.load(path)
    images = images_of(shrunk.card)
    net = Own()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    model = pbkd.load(path, model=net)
    assert torch.equal(model(images), shrunk.model(images))
    assert same(dict(net.state_dict()), before)  # the caller's own stays as it was
    assert net.training
    whole = Classifier(net, shrunk.card.mean, shrunk.card.std)
    assert torch.equal(pbkd.load(path, model=whole)(images), shrunk.model(images))
    shrunk.save(tmp_path / "folder")
    model = pbkd.load(tmp_path / "folder", model=net)
    assert torch.equal(model(images), shrunk.model(images))


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (lambda: Own(7), "edit of fc|net.stem.weight|net.norm"),
        (lambda: nn.Sequential(nn.Linear(1, 4)), "no such layer|has no|edit of fc"),
        (lambda: Own().double(), "float32"),
    ],
    ids=["channels", "another", "type"],
)
def test_a_network_that_does_not_fit_is_told(net: Callable[[], nn.Module], message: str) -> None:
    packed = open_packed(pack(own_student()), "own.pbkd")
    with pytest.raises(ArtifactError, match=message):
        load_packed(packed, net())


def test_no_code_is_imported() -> None:
    data = with_header(
        packed_small(), lambda header: header["card"]["network"].update(name="os:system")
    )
    with pytest.raises(TeacherError, match="not pbkd's"):
        loaded(data)
    custom = CustomConfig(kind="os:system").model_dump(mode="json")
    data = with_header(
        packed_small(),
        lambda header: header["card"].update(replacements={"features.3": custom}),
    )
    with pytest.raises(CandidateError, match="not pbkd's"):
        loaded(data)


# ---------------------------------------------------------------- damage


def test_every_bit_flip_is_told() -> None:
    data = packed_small()
    for position in range(len(data)):
        flipped = bytearray(data)
        flipped[position] ^= 1 << (position % 8)
        with pytest.raises(ArtifactError, match=r"small.pbkd is (damaged|not a .pbkd file)"):
            open_packed(bytes(flipped), "small.pbkd")


def test_every_truncation_is_told() -> None:
    data = packed_small()
    for size in range(len(data)):
        with pytest.raises(ArtifactError):
            open_packed(data[:size], "small.pbkd")
    refused(data + b"\0")


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200), st.booleans(), st.booleans())
def test_any_bytes_are_told(raw: bytes, has_magic: bool, is_sealed: bool) -> None:
    body = (b"PBKD" + VERSION.to_bytes(2, "little") if has_magic else b"") + raw
    with pytest.raises(ArtifactError):
        loaded(sealed(body) if is_sealed else body)


def test_a_later_version_is_told() -> None:
    body = bytearray(packed_small()[:-8])
    body[4:6] = (VERSION + 1).to_bytes(2, "little")
    message = refused(sealed(bytes(body)))
    assert f"format version {VERSION + 1}" in message
    assert "newer pbkd" in message


def test_another_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "model.pbkd").write_bytes(b"PK\3\4 zip")
    with pytest.raises(ArtifactError, match=r"not a \.pbkd file"):
        pbkd.load(tmp_path / "model.pbkd")
    with pytest.raises(ArtifactError, match="is missing"):
        read_packed(tmp_path / "none.pbkd")


def _first(header: dict[str, Any], coding: str) -> list[Any]:
    row: list[Any] = next(row for row in header["tensors"] if row[3] == coding)
    return row


def _grid(header: dict[str, Any]) -> list[Any]:
    row: list[Any] = next(row for row in header["grids"] if row[0] == 4)
    return row


def _deep(header: dict[str, Any]) -> None:
    value: list[Any] = []
    for _ in range(900):
        value = [value]
    header["tensors"] = value


def _narrow_again(header: dict[str, Any]) -> None:
    """Its shapes are right in the end; what it is made from takes 5 GiB."""
    row = next(row for row in header["tensors"] if row[0] == "net.classifier.weight")
    classes, features = row[2]
    header["card"]["network"]["num_classes"] = 5 * 2**30 // (4 * features)
    header["card"]["edits"] = [{"kind": "resized", "layers": {"classifier": [classes, features]}}]


CHANGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "huge shape": lambda h: _first(h, "half").__setitem__(2, [2**40]),
    "huge product": lambda h: _first(h, "codes").__setitem__(2, [2**16] * 8),
    "beyond 64 bits": lambda h: _first(h, "half").__setitem__(2, [2**70]),
    "negative shape": lambda h: _first(h, "half").__setitem__(2, [-1]),
    "fractional shape": lambda h: _first(h, "half").__setitem__(2, [1.5]),
    "truth as shape": lambda h: _first(h, "half").__setitem__(2, [True]),
    "many dimensions": lambda h: _first(h, "half").__setitem__(2, [1] * 100),
    "other shape": lambda h: _first(h, "half").__setitem__(2, [3]),
    "other type": lambda h: _first(h, "half").__setitem__(1, "float64"),
    "unknown type": lambda h: _first(h, "half").__setitem__(1, "object"),
    "unknown coding": lambda h: _first(h, "half").__setitem__(3, "pickle"),
    "no such family": lambda h: _first(h, "half").__setitem__(4, 99),
    "no such code family": lambda h: _first(h, "codes").__setitem__(4, 99),
    "surplus argument": lambda h: _first(h, "half").append(0),
    "huge constant": lambda h: _first(h, "const").__setitem__(4, 2**63),
    "name as number": lambda h: _first(h, "half").__setitem__(0, 3),
    "name twice": lambda h: h["tensors"].append(h["tensors"][0]),
    "another name": lambda h: _first(h, "half").__setitem__(0, "net.other"),
    "row no list": lambda h: h["tensors"].__setitem__(0, "x"),
    "no tensors": lambda h: h.update(tensors=[]),
    "no grids": lambda h: h.update(grids=[]),
    "stray grid": lambda h: h["grids"][0].__setitem__(1, "net.none"),
    "grid of 1 bit": lambda h: h["grids"][0].__setitem__(0, 1),
    "grid of many bits": lambda h: h["grids"][0].__setitem__(0, 60),
    "grid of other bits": lambda h: _grid(h).__setitem__(0, 3),
    "grid as codebook": lambda h: _grid(h).__setitem__(0, 0),
    "steps too few": lambda h: _grid(h).__setitem__(3, [1]),
    "huge alphabet": lambda h: h["codes"].__setitem__(0, [2**31, 16]),
    "alphabet of one": lambda h: h["codes"].__setitem__(0, [1, 1]),
    "many tables": lambda h: h["codes"].__setitem__(0, [15, 10**6]),
    "many families": lambda h: h.update(codes=[[256, 16]] * 10**5),
    "many heads": lambda h: h.update(heads=10**9),
    "negative heads": lambda h: h.update(heads=-1),
    "fewer heads": lambda h: h.update(heads=0),
    "another field": lambda h: h.update(more=1),
    "a list": lambda h: [1],
    "deep": _deep,
    "no card": lambda h: h.update(card={}),
    "huge classes": lambda h: h["card"]["network"].update(num_classes=10**12),
    "negative classes": lambda h: h["card"]["network"].update(num_classes=-5),
    "huge width": lambda h: h["card"]["network"].update(width=1e7),
    "infinite width": lambda h: h["card"]["network"].update(width=1e308),
    "many channels": lambda h: h["card"]["network"].update(in_channels=10**11),
    "unknown network": lambda h: h["card"]["network"].update(name="no_such_net"),
    "another network": lambda h: h["card"]["network"].update(name="cifar_resnet20"),
    "no such block": lambda h: h["card"].update(
        replacements={"features.77": {"kind": "separable"}}
    ),
    "huge edit": lambda h: h["card"].update(
        edits=[{"kind": "resized", "layers": {"features.0": [10**12, 1, 1]}}]
    ),
    "huge teacher, small student": _narrow_again,
    "other digest": lambda h: h["card"].update(digest="0" * 32),
    "other classes": lambda h: h["card"].update(class_names=["w", "x", "y", "z"]),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_malicious_header_is_told(change: Callable[[dict[str, Any]], Any]) -> None:
    data = with_header(packed_small(), change)
    start = time.process_time()
    with pytest.raises(PbkdError):
        loaded(data)
    assert time.process_time() - start < 5
    with pytest.raises(ArtifactError):  # without a network to compare with, too
        unpack(data)


def test_absurd_headers_are_told() -> None:
    bomb = b"[" + b"0," * (8 << 20) + b"0]"
    assert "header of" in refused(with_json(packed_small(), bomb))
    assert "does not decode" in refused(with_json(packed_small(), b"[" * 100_000))
    assert "does not decode" in refused(with_json(packed_small(), b'{"heads": NaN}'))
    assert "does not decode" in refused(with_json(packed_small(), b'{"a":' + b"9" * 9999 + b"}"))
    body = bytearray(packed_small()[:-8])
    body[10:14] = (100).to_bytes(4, "little")  # the JSON is longer than it says
    assert "header" in refused(sealed(bytes(body)))
    body[6:10] = (2**32 - 1).to_bytes(4, "little")
    assert "does not fit" in refused(sealed(bytes(body)))


def test_memory_is_bounded() -> None:
    """Headers that promise much are refused before anything is taken for it."""
    script = f"""
import resource, sys
sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[2])]!r}
import torch
torch.set_num_threads(1)
from test_shrink_container import CHANGES, loaded, packed_small, with_header
from pbkd.errors import PbkdError
from pbkd.models import network_names
data = packed_small()
network_names()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for name in ("huge shape", "huge product", "huge classes", "huge width", "many channels",
             "many families", "huge edit", "huge alphabet", "huge teacher, small student"):
    try:
        loaded(with_header(data, CHANGES[name]))
    except PbkdError:
        continue
    raise AssertionError(name)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 100_000  # KiB


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_a_malicious_stream_is_told(data: st.DataObject) -> None:
    """Bytes of the stream changed, and every checksum but that of the tensors made right."""
    whole = packed_small()
    start = len(whole) - 8 - len(open_packed(whole, "").words)
    body = bytearray(whole[:-8])
    for position in data.draw(st.lists(st.integers(start, len(body) - 1), min_size=1, max_size=6)):
        body[position] ^= data.draw(st.integers(1, 255))
    if bytes(body) == whole[:-8]:
        return
    with pytest.raises(ArtifactError):
        loaded(sealed(bytes(body)))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_any_change_of_a_header_is_told(data: st.DataObject) -> None:
    """One value anywhere in the header becomes another; the model never comes out different."""

    def change(header: dict[str, Any]) -> None:
        node: Any = header
        while True:
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            if not keys:
                return
            key = data.draw(st.sampled_from(keys))
            if isinstance(node[key], dict | list) and node[key] and data.draw(st.booleans()):
                node = node[key]
                continue
            node[key] = data.draw(
                st.one_of(
                    st.integers(-(2**66), 2**66),
                    st.integers(0, 300),
                    st.none(),
                    st.booleans(),
                    st.text(max_size=5),
                    st.lists(st.integers(0, 9), max_size=3),
                    st.just({}),
                )
            )
            return

    changed = with_header(packed_small(), change)
    try:
        result = loaded(changed)
    except PbkdError:
        return
    assert same(dict(result.model.state_dict()), dict(small().model.state_dict()))


# ---------------------------------------------------------------- header, speed, size


def test_a_header_comes_back() -> None:
    header = open_packed(packed_small(), "").header
    raw, size = deflated(header)
    assert inflated(raw, size) == header
    assert len(raw) < 500
    entry = Entry("x", "float32", (2, 3), "const", (1,))
    assert (entry.numel, entry.width) == (6, 32)


def test_decoding_a_megabyte_takes_less_than_a_second() -> None:
    """2.4 million weights of 4 bits, half of them 0: a file of a megabyte."""
    rng = np.random.default_rng(0)
    card = card_of("cifar_vgg16", channels=3).model_copy(update={"data_digest": "d"})
    state, grids = {}, {}
    for layer in range(6):
        weights = torch.from_numpy(rng.laplace(size=(256, 192, 3, 3)).astype(np.float32))
        grid = Grid((weights.flatten(1).abs().amax(1) / 7).half().float(), 4)
        state[f"{layer}.weight"] = grid.values(grid.codes(weights))
        grids[f"{layer}.weight"] = grid
    data = pack_state(card, state, grids)
    assert 600_000 < len(data) < 1_400_000
    start = time.process_time()
    unpack(data)
    assert (time.process_time() - start) / (len(data) / 1e6) < 1


def test_a_file_is_hardly_more_than_its_stream() -> None:
    words = open_packed(packed_small(), "").words
    assert len(packed_small()) - len(words) < 480
