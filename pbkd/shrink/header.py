"""The header of a `.pbkd` file: compact JSON, compressed; what it says is checked before use."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from pydantic import ValidationError

from pbkd.errors import ArtifactError
from pbkd.models import ModelCard
from pbkd.shrink.codec import Entry, GridEntry, Plan
from pbkd.shrink.codes import MAX_TABLES
from pbkd.shrink.numbers import DTYPES
from pbkd.shrink.tables import MAX_ALPHABET

MAX_HEADER_BYTES = 4 << 20
"""Of the JSON."""
MAX_TENSORS = 1 << 16
MAX_DIMENSIONS = 8
MAX_DECODED_BYTES = 4 << 30
"""Of all tensors and grids together."""
_MAX_TABLE_CELLS = 1 << 22
_MAX_GRID_BITS = 16

DICTIONARY = (
    b'"kind":"low_rank","form":"tucker","pair","ratio":0.,"energy":null,"init":"inherit","ranks":[['
    b'"kind":"identity","adapter":"auto","place":null{"channels":[,"groups":1,"stride":[1,1],"crop"'
    b':[0,0,0,0],"relu":true,"skip":"'
    b'"kind":"narrow","ratio":0.5,"inner":[{"producers":["conv1"],"between":["bn1"],"consumers":['
    b'"conv2"]}]"kind":"bottleneck","kind":"grouped","groups":8'
    b'"kind":"separable","depth":1,"batch_norm":false,"init":"inherit"}'
    b'"kind":"factorized","layers":{"kind":"resized","layers":{'
    b".depthwise.weight.pointwise.weight.bias.running_mean.running_var.num_batches_tracked"
    b'"net.features.0.0.weight","net.classifier.weight","float32",[512,512,3,3],"numbers",'
    b'"net.layer1.0.conv1.weight","net.layer2.1.conv2.weight","float32",[64,64,3,3],"codes",0],['
    b'"net.layer1.0.bn1.bias","float32",[64],"half",1],["net.layer1.0.bn1.num_batches_tracked",'
    b'"int64",[],"const",0],["net.layer1.0.bn1.running_mean","float32",[64],"half",2],['
    b'"net.layer1.0.bn1.running_var","float32",[64],"half",3],["net.layer1.0.bn1.weight",'
    b'"float32",[64],"half",4],["net.fc.bias","float32",[10],"half",5],["std","float32",[1,3,1,1],'
    b'"numbers",0]]}'
    b'{"card":{"network":{"name":"cifar_resnet18","num_classes":10,"in_channels":3,"width":1.0,'
    b'"code":""},"mean":[0.,"std":[0.,"image_size":[32,32],"class_names":["'
    b'"],"augment":{"flip":true,"pad":4},"replacements":{"net.layer1.0.conv1":{'
    b'"edits":[],"data_digest":"","digest":""},"heads":6,"codes":[[15,16]],"grids":[[4,"net.'
)
"""Preset dictionary of the compressed header: what headers mostly say."""


@dataclass(frozen=True)
class Header:
    """What a file says of itself.

    Attributes:
        card: how the model is built.
        plan: the tensors, and what is in the stream.
    """

    card: ModelCard
    plan: Plan


def deflated(header: Header) -> tuple[bytes, int]:
    """The header's bytes, and how long its JSON is."""
    card = header.card.model_dump(mode="json")
    plan = header.plan
    value = {
        "card": card,
        "heads": plan.num_number_families,
        "codes": plan.code_families,
        "grids": [[grid.bits, *_row(grid.table)] for grid in plan.grids],
        "tensors": [_row(entry) for entry in plan.tensors],
    }
    text = json.dumps(value, separators=(",", ":"), allow_nan=False).encode()
    compressor = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zdict=DICTIONARY)
    return compressor.compress(text) + compressor.flush(), len(text)


def inflated(raw: bytes, size_bytes: int) -> Header:
    """The inverse of ``deflated``; every limit is checked.

    Raises:
        ArtifactError: the header is damaged, or says what cannot be.
    """
    if size_bytes > MAX_HEADER_BYTES:
        raise ArtifactError(f"a header of {size_bytes} bytes, at most {MAX_HEADER_BYTES} can be")
    inflater = zlib.decompressobj(-15, zdict=DICTIONARY)
    try:
        text = inflater.decompress(raw, size_bytes + 1)
        value = json.loads(text, parse_constant=_refuse)
    except (zlib.error, ValueError, RecursionError) as error:
        raise ArtifactError(f"the header does not decode ({error})") from None
    if len(text) != size_bytes or inflater.unused_data or not inflater.eof:
        raise ArtifactError(f"the header has {len(text)} bytes, {size_bytes} expected")
    return _parsed(value)


def _row(entry: Entry) -> list[Any]:
    return [entry.name, entry.dtype, list(entry.shape), entry.coding, *entry.arguments]


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no number")


def _parsed(value: Any) -> Header:
    if not isinstance(value, dict) or set(value) != {"card", "heads", "codes", "grids", "tensors"}:
        raise ArtifactError("the header has not the fields card, heads, codes, grids, tensors")
    try:
        card = ModelCard.model_validate(value["card"])
    except (ValidationError, RecursionError) as error:
        raise ArtifactError(f"its card is not one of this version: {error}") from None
    rows, grid_rows = _list(value["tensors"], "tensors"), _list(value["grids"], "grids")
    if len(rows) + len(grid_rows) > MAX_TENSORS:
        raise ArtifactError(f"{len(rows) + len(grid_rows)} tensors, at most {MAX_TENSORS} can be")
    tensors = tuple(_entry(row) for row in rows)
    grids = tuple(_grid(row) for row in grid_rows)
    _check_names(tensors, grids)
    _check_sizes([*tensors, *(grid.table for grid in grids)])
    num_entries = len(tensors) + len(grids)
    heads = value["heads"]
    if not _is_count(heads) or heads > num_entries:
        raise ArtifactError(f"{heads!r} tables of heads for {num_entries} tensors")
    families = tuple(_family(pair) for pair in _list(value["codes"], "codes"))
    if len(families) > num_entries or sum(a * t for a, t in families) > _MAX_TABLE_CELLS:
        raise ArtifactError(f"{len(families)} families of codes for {num_entries} tensors")
    return Header(card, Plan(heads, families, grids, tensors))


def _entry(row: Any) -> Entry:
    if not isinstance(row, list) or len(row) < 4:
        raise ArtifactError(f"got {_shown(row)}, expected [name, type, shape, coding, ...]")
    name, dtype, shape, coding, *arguments = row
    if not all(isinstance(text, str) for text in (name, dtype, coding)):
        raise ArtifactError(f"got {_shown(row)}, expected name, type and coding as text")
    if not isinstance(shape, list) or not all(_is_count(size) for size in (*shape, *arguments)):
        raise ArtifactError(f"{name}: got shape {_shown(shape)} and {_shown(arguments)}")
    if len(shape) > MAX_DIMENSIONS:
        raise ArtifactError(f"{name} has {len(shape)} dimensions, at most {MAX_DIMENSIONS} can be")
    entry = Entry(name, dtype, tuple(shape), coding, tuple(arguments))
    entry.check()
    return entry


def _grid(row: Any) -> GridEntry:
    if not isinstance(row, list) or not row or not _is_count(row[0]) or row[0] > _MAX_GRID_BITS:
        raise ArtifactError(f"got {_shown(row)}, expected [bits, name, ...]")
    entry = _entry(row[1:])
    if len(entry.shape) != 1 or entry.dtype != "float32" or row[0] == 1:
        raise ArtifactError(f"{entry.name}: a grid of {row[0]} bits and shape {entry.shape}")
    return GridEntry(row[0], entry)


def _family(pair: Any) -> tuple[int, int]:
    match pair:
        case [int(alphabet), int(num_tables)]:
            if 2 <= alphabet <= MAX_ALPHABET and 1 <= num_tables <= MAX_TABLES:
                return alphabet, num_tables
    raise ArtifactError(f"got a family {_shown(pair)}, expected [2 to {MAX_ALPHABET}, 1 to 16]")


def _check_names(tensors: Sequence[Entry], grids: Sequence[GridEntry]) -> None:
    names = [entry.name for entry in tensors]
    grid_names = [grid.table.name for grid in grids]
    if len(set(names)) < len(names) or len(set(grid_names)) < len(grid_names):
        raise ArtifactError("a tensor's name stands there twice")
    if stray := set(grid_names) - set(names):
        raise ArtifactError(f"a grid of {min(stray)}, which is no tensor of the file")


def _check_sizes(entries: Sequence[Entry]) -> None:
    total = sum(math.prod(e.shape) * DTYPES[e.dtype].itemsize for e in entries)
    if total > MAX_DECODED_BYTES:
        raise ArtifactError(f"tensors of {total} bytes, at most {MAX_DECODED_BYTES} can be")


def _list(value: Any, what: str) -> list[Any]:
    if not isinstance(value, list):
        raise ArtifactError(f"`{what}` is {_shown(value)}, expected a list")
    return value


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 64


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else f"{text[:57]}..."
