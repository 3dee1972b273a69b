"""Numbers as bits in their order: a head under a table, a tail as it is.

Sorted as integers, the bits of floating-point numbers are almost logarithms: numbers of a kind, say
all running variances, share a few heads. The writer chooses where a head ends.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pbkd.errors import ArtifactError
from pbkd.shrink.range_coder import Reader, Writer
from pbkd.shrink.tables import MAX_ALPHABET, Ints, best_table

Bits = NDArray[np.uint64]
"""Bit patterns of numbers, in a 64-bit integer whatever their own width."""

DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, name)
    for name in (
        "float32", "float16", "bfloat16", "float64", "int64", "int32", "int16", "int8", "uint8",
        "bool",
    )
}  # fmt: skip
"""Types that a tensor may have, by their name in the file."""

_TAIL_BITS, _ALPHABET_BITS = 7, 9
_NUM_TAILS = 8
"""Tails that are tried, from the shortest that leaves few enough heads."""


def dtype_name(name: str, tensor: Tensor) -> str:
    """The type's name in the file; ArtifactError for a type that the file does not know."""
    known = str(tensor.dtype).removeprefix("torch.")
    if known not in DTYPES:
        raise ArtifactError(
            f"{name} is {known}; a .pbkd file holds {', '.join(DTYPES)}; convert the tensor"
        )
    return known


def bits_of_tensor(tensor: Tensor) -> Bits:
    """The bit patterns of a tensor's numbers, (N,), in row-major order."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    width = flat.element_size()
    return flat.view(torch.uint8).numpy().view(f"<u{width}").astype(np.uint64)


def tensor_of_bits(bits: Bits, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """The inverse; ArtifactError for bits that are no truth value."""
    if dtype is torch.bool and (bits > 1).any():
        raise ArtifactError("a truth value is neither 0 nor 1")
    narrow = bits.astype(f"<u{dtype.itemsize}", copy=False)
    return torch.from_numpy(narrow.view(np.uint8)).view(dtype).reshape(shape)


def ordered(bits: Bits, dtype: torch.dtype) -> Bits:
    """Patterns whose order as unsigned integers is that of the numbers."""
    top, mask = _top(dtype), _mask(dtype)
    if dtype.is_floating_point:
        negative = (bits & top) != 0
        result: Bits = np.where(negative, ~bits & mask, bits | top)
        return result
    return bits ^ top if dtype.is_signed else bits


def unordered(patterns: Bits, dtype: torch.dtype) -> Bits:
    """The inverse of ``ordered``."""
    top, mask = _top(dtype), _mask(dtype)
    if dtype.is_floating_point:
        positive = (patterns & top) != 0
        result: Bits = np.where(positive, patterns ^ top, ~patterns & mask)
        return result
    return patterns ^ top if dtype.is_signed else patterns


def halved(bits: Bits) -> Bits | None:
    """Float16 patterns of float32 patterns; None where a number is no float16, or is NaN."""
    numbers = bits.astype(np.uint32).view(np.float32)
    with np.errstate(over="ignore"):
        halves = numbers.astype(np.float16)
    same = halves.astype(np.float32).view(np.uint32) == bits.astype(np.uint32)
    return halves.view(np.uint16).astype(np.uint64) if (same & ~np.isnan(numbers)).all() else None


def doubled(bits: Bits) -> Bits:
    """Float32 patterns of float16 patterns."""
    halves = bits.astype(np.uint16).view(np.float16)
    return halves.astype(np.float32).view(np.uint32).astype(np.uint64)


@dataclass(frozen=True)
class NumberFamily:
    """Numbers of one type whose heads share a table.

    Attributes:
        width: bits of a number.
        tail: bits that are written as they are.
        histogram: (A,) of the heads, less each tensor's base; A is 1 where there is none.
        bases: per tensor, what is taken from its heads.
        cost: bits times 256 of it all.
    """

    width: int
    tail: int
    histogram: Ints
    bases: tuple[int, ...]
    cost: int

    def write_table(self, writer: Writer) -> Ints:
        """Write what all its tensors share; returns the frequencies."""
        writer.number(self.tail, _TAIL_BITS)
        writer.number(len(self.histogram), _ALPHABET_BITS)
        return writer.table(self.histogram) if len(self.histogram) > 1 else self.histogram

    def write(self, writer: Writer, index: int, patterns: Bits, frequencies: Ints) -> None:
        """Write its tensor ``index``, as ordered patterns (N,)."""
        base = self.bases[index]
        writer.number(base, self.width - self.tail)
        if len(self.histogram) > 1:
            heads = _heads(patterns, self.tail) - base
            writer.symbols(heads, frequencies)
        writer.uniform(patterns.view(np.int64) & _low(self.tail), self.tail)


@dataclass(frozen=True)
class NumberTable:
    """A family as the file gives it back."""

    tail: int
    alphabet: int
    frequencies: Ints

    @classmethod
    def read(cls, reader: Reader) -> NumberTable:
        """What ``write_table`` wrote; ArtifactError where it makes no sense."""
        tail, alphabet = reader.number(_TAIL_BITS), reader.number(_ALPHABET_BITS)
        if tail > 64 or not 1 <= alphabet <= MAX_ALPHABET:
            raise ArtifactError(f"a table of {alphabet} heads with tails of {tail} bits")
        frequencies = reader.table(alphabet) if alphabet > 1 else np.zeros(1, np.int64)
        return cls(tail, alphabet, frequencies)

    def numbers(self, reader: Reader, count: int, width: int) -> Bits:
        """Ordered patterns (N,) of ``width`` bits."""
        if self.tail > width:
            raise ArtifactError(f"tails of {self.tail} bits in numbers of {width}")
        heads = np.full(count, reader.number(width - self.tail), np.int64)
        if self.alphabet > 1:
            heads += reader.symbols(count, self.frequencies)
        if self.tail < width and count and int(heads.max()) >> (width - self.tail):
            raise ArtifactError("a number is larger than its type")
        tails = reader.uniform(count, self.tail).view(np.uint64)
        if self.tail == 64:
            return tails
        return (heads.view(np.uint64) << np.uint64(self.tail)) | tails


def fit_numbers(tensors: list[Bits], width: int) -> NumberFamily:
    """The border between head and tail with the fewest bits; ordered patterns (N,), N > 0, each."""
    families = []
    for tail in range(width + 1):
        family = _fit(tensors, width, tail)
        if family is not None:
            families.append(family)
            if len(families) == _NUM_TAILS:
                break
    return min(families, key=lambda family: family.cost)


def _fit(tensors: list[Bits], width: int, tail: int) -> NumberFamily | None:
    if width - tail > 62:  # a head is a signed 64-bit integer
        return None
    heads = [_heads(patterns, tail) for patterns in tensors]
    ends = [(int(h.min()), int(h.max())) for h in heads]
    if max(high - low for low, high in ends) >= MAX_ALPHABET:
        return None
    best = None
    for bases in ([min(low for low, _ in ends)] * len(ends), [low for low, _ in ends]):
        alphabet = max(high - base for (_, high), base in zip(ends, bases, strict=True)) + 1
        if alphabet > MAX_ALPHABET:
            continue
        shifted = np.concatenate([h - base for h, base in zip(heads, bases, strict=True)])
        histogram = np.bincount(shifted, minlength=alphabet)
        cost = 256 * (tail * len(shifted) + (width - tail) * len(tensors) + 16)
        if alphabet > 1:
            cost += best_table(histogram)[1]
        if best is None or cost < best.cost:
            best = NumberFamily(width, tail, histogram, tuple(bases), cost)
    return best


def _heads(patterns: Bits, tail: int) -> Ints:
    if tail == 64:
        return np.zeros(len(patterns), np.int64)
    return (patterns >> np.uint64(tail)).view(np.int64)


def _low(num_bits: int) -> np.int64:
    return np.int64(-1) if num_bits == 64 else np.int64((1 << num_bits) - 1)


def _top(dtype: torch.dtype) -> np.uint64:
    return np.uint64(1 << (8 * dtype.itemsize - 1))


def _mask(dtype: torch.dtype) -> np.uint64:
    return np.uint64((1 << 8 * dtype.itemsize) - 1)
