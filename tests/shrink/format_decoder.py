"""A second decoder of `.pbkd` files, written from docs/format.md alone: plain integers, no library.

It knows all codings but `zlib`, and the types float32 and int64; it checks nothing.
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from typing import Any

WIDTHS = {"float32": 32, "int64": 64}


class Stream:
    """The range decoder, one symbol at a time."""

    def __init__(self, raw: bytes) -> None:
        self.words = list(struct.unpack(f"<{len(raw) // 4}I", raw))
        self.lower, self.range = 0, 2**64 - 1
        self.point = self.word() << 32 | self.word()

    def word(self) -> int:
        return self.words.pop(0) if self.words else 0

    def symbol(self, shares: list[int]) -> int:
        """``shares`` of 2 ** 24."""
        scale = self.range >> 24
        quantile = ((self.point - self.lower) % 2**64) // scale
        symbol = left = 0
        while left + shares[symbol] <= quantile:
            left += shares[symbol]
            symbol += 1
        self.lower = (self.lower + scale * left) % 2**64
        self.range = scale * shares[symbol]
        if self.range < 2**32:
            self.lower = (self.lower << 32) % 2**64
            self.range <<= 32
            self.point = (self.point << 32 | self.word()) % 2**64
        return symbol

    def symbols(self, count: int, shares: list[int]) -> list[int]:
        return [self.symbol(shares) for _ in range(count)]

    def integers(self, count: int, num_bits: int) -> list[int]:
        values = [0] * count
        for shift in range(0, num_bits, 16):
            size = 2 ** min(16, num_bits - shift)
            for i in range(count):
                values[i] |= self.symbol([2**24 // size] * size) << shift
        return values

    def integer(self, num_bits: int) -> int:
        return self.integers(1, num_bits)[0]

    def table(self, alphabet: int) -> list[int]:
        precision, stride = self.integer(2), [1, 2, 4, 8][self.integer(2)]
        first, last = (self.integer((alphabet - 1).bit_length()) for _ in range(2))
        levels = [63 if first <= s <= last else 0 for s in range(alphabet)]
        if precision:
            size = last - first + 1
            num_knots = size if 1 in (stride, size) else (size - 2) // stride + 2
            knots = [
                unit << (3 - precision)
                for unit in self.integers(num_knots, [0, 4, 5, 6][precision])
            ]
            for s in range(size):
                left, part = divmod(s, stride)
                right = min(left + 1, num_knots - 1)
                levels[first + s] = (knots[left] * (stride - part) + knots[right] * part) // stride
        weights = [level and math.isqrt(math.isqrt(2 ** (32 + level))) for level in levels]
        if not any(weights):
            weights = [1] * alphabet
        free = 2**24 - alphabet
        frequencies = [weight * free // sum(weights) for weight in weights]
        frequencies[weights.index(max(weights))] += free - sum(frequencies)
        return [frequency + 1 for frequency in frequencies]


def read(data: bytes, dictionary: bytes) -> tuple[dict[str, Any], dict[str, list[int]]]:
    """The card, and the bit patterns of each tensor."""
    magic, version, header_bytes, json_bytes = struct.unpack_from("<4sHII", data)
    assert (magic, version) == (b"PBKD", 1)
    raw = data[22 : 22 + header_bytes]
    text = zlib.decompressobj(-15, zdict=dictionary).decompress(raw)
    assert len(text) == json_bytes
    header = json.loads(text)
    stream = Stream(data[22 + header_bytes : -8])
    heads = []
    for _ in range(header["heads"]):
        tail, alphabet = stream.integer(7), stream.integer(9)
        heads.append((tail, stream.table(alphabet) if alphabet > 1 else [2**24]))
    families = []
    for alphabet, num_tables in header["codes"]:
        tables = [stream.table(alphabet) for _ in range(num_tables)]
        effects = [
            stream.table(2 * reach + 1) if stream.integer(1) else None for reach in (7, 3, 3)
        ]
        families.append((tables, effects))
    decoder = _Tensors(stream, heads, families)
    grids = {row[1]: (row[0], decoder.plain(*row[1:])) for row in header["grids"]}
    tensors = {row[0]: decoder.tensor(row, grids) for row in header["tensors"]}
    return header["card"], tensors


class _Tensors:
    def __init__(self, stream: Stream, heads: list[Any], families: list[Any]) -> None:
        self.stream, self.heads, self.families = stream, heads, families

    def tensor(self, row: list[Any], grids: dict[str, Any]) -> list[int]:
        name, _, shape, coding, *arguments = row
        if coding not in ("codes", "code_gaps"):
            return self.plain(*row)
        bits, table = grids[name]
        steps = [_float(pattern) for pattern in table]
        numel = math.prod(shape)
        zero = 2 ** (bits - 1) - 1 if bits else steps.index(0)
        if coding == "codes":
            codes = self.codes(arguments[0], (*shape[:2], *[1] * (2 - len(shape))), shape, numel)
        else:
            nonzero = self.gaps(numel)
            found = iter(self.codes(arguments[0], (1, sum(nonzero)), [], sum(nonzero)))
            codes = [next(found) if flag else zero for flag in nonzero]
        if not bits:
            return [table[code] for code in codes]
        return [
            _pattern((code - zero) * steps[i // (numel // shape[0])])
            for i, code in enumerate(codes)
        ]

    def codes(self, family: int, outer: tuple[int, ...], shape: list[int], numel: int) -> list[int]:
        tables, effects = self.families[family]
        num_rows, num_columns = outer
        num_places = math.prod(shape[2:]) if shape else 1
        base = self.stream.integer(4) if len(tables) > 1 else 0
        values = []
        for size, reach, table in zip(
            (num_rows, num_columns, num_places), (7, 3, 3), effects, strict=True
        ):
            used = table is not None and self.stream.integer(1)
            values.append(
                [s - reach for s in self.stream.symbols(size, table)] if used else [0] * size
            )
        classes = [
            min(max(base + row + column + place, 0), len(tables) - 1)
            for row in values[0]
            for column in values[1]
            for place in values[2]
        ]
        codes = [0] * numel
        for index, table in enumerate(tables):
            for i in range(numel):
                if classes[i] == index:
                    codes[i] = self.stream.symbol(table)
        return codes

    def gaps(self, numel: int) -> list[bool]:
        count = self.stream.integer(40)
        table = self.stream.table(256)
        nonzero, position = [False] * numel, 0
        for gap in self.stream.symbols(count, table):
            position += gap
            if gap < 255:
                nonzero[position] = True
                position += 1
        return nonzero

    def plain(
        self, _: str, dtype: str, shape: list[int], coding: str, *arguments: int
    ) -> list[int]:
        numel = math.prod(shape)
        if coding == "const":
            return [arguments[0]] * numel
        nonzero = [True] * numel
        if coding.endswith("zeros"):
            outer = (*shape[:2], *[1] * (2 - len(shape)))
            nonzero = [flag == 1 for flag in self.codes(arguments[0], outer, shape, numel)]
        elif coding.endswith("gaps"):
            nonzero = self.gaps(numel)
        is_half = coding.startswith("half")
        found = iter(self.numbers(arguments[-1], sum(nonzero), 16 if is_half else WIDTHS[dtype]))
        return [next(found) if flag else 0 for flag in nonzero]

    def numbers(self, family: int, count: int, width: int) -> list[int]:
        """Patterns of float16 (width 16; as float32), float32 (32) or int64 (64)."""
        tail, table = self.heads[family]
        base = self.stream.integer(width - tail)
        found = self.stream.symbols(count, table) if len(table) > 1 else [0] * count
        tails = self.stream.integers(count, tail)
        ordered = [(base + h) << tail | t for h, t in zip(found, tails, strict=True)]
        top = 2 ** (width - 1)
        if width == 64:
            return [u ^ top for u in ordered]
        patterns = [u ^ top if u & top else u ^ (2 * top - 1) for u in ordered]
        if width == 16:
            patterns = [_pattern(struct.unpack("<e", struct.pack("<H", u))[0]) for u in patterns]
        return patterns


def _float(pattern: int) -> float:
    return float(struct.unpack("<f", struct.pack("<I", pattern))[0])


def _pattern(value: float) -> int:
    return int(struct.unpack("<I", struct.pack("<f", value))[0])
