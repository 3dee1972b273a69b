"""The `.pbkd` file: magic, version, sizes, header, stream, checksums; docs/format.md.

Nothing in it is code. What it says is believed step by step: the checksum of the whole, the
version, the header within its limits, the tensors' shapes (by ``PackedFile.check_fits``, before
anything is decoded), and the checksum of what came out.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pbkd.errors import ArtifactError
from pbkd.models import ModelCard, model_digest
from pbkd.shrink.choice import encode
from pbkd.shrink.codec import decode
from pbkd.shrink.grids import Codebook, Grid, Quantized
from pbkd.shrink.header import Header, deflated, inflated
from pbkd.shrink.numbers import DTYPES
from pbkd.shrink.state import Shrunk

MAGIC = b"PBKD"
VERSION = 1
_CHECKSUM_BYTES = 8
# magic, version, bytes of the header, bytes of its JSON, checksum of what is decoded
_PREAMBLE = struct.Struct(f"<4sHII{_CHECKSUM_BYTES}s")
_ADVICE = "copy the file anew, or pack the model again"


def pack(shrunk: Shrunk) -> bytes:
    """A student as the bytes of a `.pbkd` file; equal students give equal bytes.

    Raises:
        ArtifactError: a tensor has a type that the file does not know.
        MissingExtraError: constriction is not installed.
    """
    return pack_state(shrunk.card, shrunk.model.state_dict(), shrunk.grids)


def pack_state(
    card: ModelCard, state: Mapping[str, Tensor], grids: Mapping[str, Quantized]
) -> bytes:
    """The same of a card, a state dict, and the grids of some of its tensors.

    The card's digest is made anew. What is written is read again before it is returned.
    """
    tensors = {name: state[name].detach().cpu() for name in sorted(state)}
    own = {name: _on_cpu(grids[name]) for name in tensors if name in grids}
    card = card.model_copy(update={"digest": model_digest(card, tensors)})
    plan, words = encode(tensors, own)
    header, json_bytes = deflated(Header(card, plan))
    checksum = _checksum_of(tensors, own)
    body = _PREAMBLE.pack(MAGIC, VERSION, len(header), json_bytes, checksum) + header + words
    data = body + _digest(body)
    open_packed(data, "what was packed").unpack()
    return data


def unpack(
    data: bytes, what: str = "the file"
) -> tuple[ModelCard, dict[str, Tensor], dict[str, Quantized]]:
    """Card, tensors by name, and grids of a file's bytes; the inverse of ``pack_state``.

    Args:
        what: how messages call the file.

    Raises:
        ArtifactError: it is damaged, of a later version, or larger than files may be.
        MissingExtraError: constriction is not installed.
    """
    packed = open_packed(data, what)
    tensors, grids = packed.unpack()
    return packed.card, tensors, grids


def is_packed(data: bytes) -> bool:
    """Whether bytes begin as a `.pbkd` file does."""
    return data.startswith(MAGIC)


@dataclass(frozen=True)
class PackedFile:
    """A file whose checksum is right and whose header makes sense; no tensor is decoded yet.

    Attributes:
        what: how messages call it.
        header: card, and tensors with their shapes and codings.
        words: the stream.
        checksum: of tensors and grids.
    """

    what: str
    header: Header
    words: bytes
    checksum: bytes

    @property
    def card(self) -> ModelCard:
        return self.header.card

    def check_fits(self, state: Mapping[str, Tensor]) -> None:
        """Raise ArtifactError where names, shapes or types are not those of a state dict."""
        found = {entry.name: entry for entry in self.header.plan.tensors}
        network = self.card.network.name
        if odd := sorted(found.keys() ^ state.keys()):
            where = "the file" if odd[0] in found else "the network"
            raise ArtifactError(
                f"{self.what} does not fit network `{network}`: only {where} has {odd[0]}; "
                "give the network that the file was made from"
            )
        for name, tensor in state.items():
            entry = found[name]
            if (entry.shape, DTYPES[entry.dtype]) != (tuple(tensor.shape), tensor.dtype):
                expected = f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
                raise ArtifactError(
                    f"{self.what} does not fit network `{network}`: {name} is {entry.dtype} "
                    f"{entry.shape}, expected {expected}; give the network that the file was "
                    "made from"
                )

    def unpack(self) -> tuple[dict[str, Tensor], dict[str, Quantized]]:
        """Tensors and grids, as they were packed, bit for bit; errors as ``unpack``."""
        try:
            tensors, grids = decode(self.words, self.header.plan)
        except ArtifactError as error:
            raise _damaged(self.what, str(error)) from None
        except MemoryError:
            raise ArtifactError(
                f"{self.what} takes more memory than there is; take a larger machine"
            ) from None
        if _checksum_of(tensors, grids) != self.checksum:
            raise _damaged(self.what, "what it holds has another checksum than it says")
        if model_digest(self.card, tensors) != self.card.digest:
            raise _damaged(self.what, "its card belongs to other weights")
        return tensors, grids


def open_packed(data: bytes, what: str) -> PackedFile:
    """Read all but the tensors; errors as ``unpack``."""
    least = _PREAMBLE.size + _CHECKSUM_BYTES
    if not is_packed(data):
        raise ArtifactError(
            f"{what} is not a .pbkd file: it begins with {data[:4]!r}, expected {MAGIC!r}; "
            "give a file that `pbkd pack` wrote"
        )
    if len(data) < least:
        raise _damaged(what, f"it has {len(data)} bytes, expected {least} at least")
    body = data[:-_CHECKSUM_BYTES]
    if _digest(body) != data[-_CHECKSUM_BYTES:]:
        raise _damaged(what, "its checksum is wrong: it is truncated, or bytes were changed")
    _, version, header_bytes, json_bytes, checksum = _PREAMBLE.unpack_from(data)
    if version != VERSION:
        raise ArtifactError(
            f"{what} is of format version {version}, this pbkd reads version {VERSION}; "
            "install a newer pbkd"
        )
    words = body[_PREAMBLE.size + header_bytes :]
    if _PREAMBLE.size + header_bytes > len(body) or len(words) % 4:
        raise _damaged(what, f"a header of {header_bytes} bytes does not fit {len(data)}")
    try:
        header = inflated(body[_PREAMBLE.size : _PREAMBLE.size + header_bytes], json_bytes)
    except ArtifactError as error:
        raise _damaged(what, str(error)) from None
    return PackedFile(what, header, words, checksum)


def _damaged(what: str, why: str) -> ArtifactError:
    return ArtifactError(f"{what} is damaged: {why}; {_ADVICE}")


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=_CHECKSUM_BYTES).digest()


def _checksum_of(tensors: Mapping[str, Tensor], grids: Mapping[str, Quantized]) -> bytes:
    """Of each tensor's bytes, in the order of the names; then of each grid's bits and table."""
    hasher = hashlib.blake2b(digest_size=_CHECKSUM_BYTES)
    for tensor in tensors.values():
        hasher.update(_bytes_of(tensor))
    for grid in grids.values():
        hasher.update(bytes([grid.bits if isinstance(grid, Grid) else 0]))
        hasher.update(_bytes_of(grid.steps if isinstance(grid, Grid) else grid.levels))
    return hasher.digest()


def _bytes_of(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _on_cpu(grid: Quantized) -> Quantized:
    if isinstance(grid, Grid):
        return Grid(grid.steps.detach().to("cpu", torch.float32), grid.bits)
    return Codebook(grid.levels.detach().to("cpu", torch.float32))
