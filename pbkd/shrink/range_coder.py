"""The one stream of a `.pbkd` file: symbols under frequency tables, by a range coder.

The coder is constriction's; docs/format.md, section "The stream", says what it does.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pbkd.errors import ArtifactError, MissingExtraError
from pbkd.shrink.tables import (
    LEVEL_BITS,
    MAX_ALPHABET,
    PRECISION,
    STRIDES,
    Ints,
    Table,
    best_table,
    num_knots,
    symbol_bits,
)

_CHUNK = 1 << 22  # symbols at a time, so that memory is bounded by what the header promises


class Writer:
    """Collects symbols; ``words`` gives the stream.

    Raises:
        MissingExtraError: constriction is not installed.
    """

    def __init__(self) -> None:
        self._coder = _constriction()
        self._encoder = self._coder.stream.queue.RangeEncoder()

    def symbols(self, values: Ints, frequencies: Ints) -> None:
        """Symbols (N,) from 0 to A - 1 under a table (A,)."""
        if len(values):
            self._encoder.encode(values.astype(np.int32), _model(self._coder, frequencies))

    def uniform(self, values: Ints, num_bits: int) -> None:
        """Integers (N,) of ``num_bits`` bits, all alike; low 16 bits first, then the next."""
        for shift in range(0, num_bits, 16):
            size = 1 << min(16, num_bits - shift)
            part = (values.view(np.uint64) >> np.uint64(shift)).astype(np.int64) & (size - 1)
            if len(part):
                model = self._coder.stream.model.Uniform(size)
                self._encoder.encode(part.astype(np.int32), model)

    def number(self, value: int, num_bits: int) -> None:
        """One integer of ``num_bits`` bits."""
        self.uniform(np.array([value], np.int64), num_bits)

    def table(self, histogram: Ints) -> Ints:
        """Write the table that is best for a histogram (A,); returns its frequencies."""
        table, _ = best_table(histogram)
        self.number(table.precision, 2)
        self.number(table.stride_index, 2)
        for symbol in (table.first, table.last):
            self.number(symbol, symbol_bits(table.alphabet))
        self.uniform(table.units, LEVEL_BITS[table.precision])
        return table.frequencies

    def words(self) -> bytes:
        """Little-endian 32-bit words."""
        words = self._encoder.get_compressed()
        return bytes(words.astype("<u4").tobytes())


class Reader:
    """Gives back what a ``Writer`` was given; the same calls in the same order."""

    def __init__(self, words: bytes) -> None:
        self._coder = _constriction()
        queue = self._coder.stream.queue
        self._decoder = queue.RangeDecoder(np.frombuffer(words, "<u4").astype(np.uint32))

    def symbols(self, count: int, frequencies: Ints) -> NDArray[np.int32]:
        """``count`` symbols under a table."""
        return self._decode(_model(self._coder, frequencies), count)

    def uniform(self, count: int, num_bits: int) -> Ints:
        """``count`` integers of ``num_bits`` bits."""
        values = np.zeros(count, np.uint64)
        for shift in range(0, num_bits, 16):
            size = 1 << min(16, num_bits - shift)
            part = self._decode(self._coder.stream.model.Uniform(size), count)
            values |= part.astype(np.uint64) << np.uint64(shift)
        return values.view(np.int64)

    def number(self, num_bits: int) -> int:
        """One integer of ``num_bits`` bits, 63 at most."""
        return int(self.uniform(1, num_bits)[0])

    def table(self, alphabet: int) -> Ints:
        """Frequencies (A,) of a table."""
        precision, stride_index = self.number(2), self.number(2)
        first, last = (self.number(symbol_bits(alphabet)) for _ in range(2))
        if not first <= last < alphabet:
            raise ArtifactError(f"a table of symbols {first} to {last} of {alphabet}")
        count = num_knots(STRIDES[stride_index], last - first + 1) if precision else 0
        units = self.uniform(count, LEVEL_BITS[precision])
        return Table(alphabet, first, last, precision, stride_index, units).frequencies

    def finish(self) -> None:
        """Raise ArtifactError if words are left that nobody asked for."""
        if not self._decoder.maybe_exhausted():
            raise ArtifactError("the stream is longer than its header says")

    def _decode(self, model: Any, count: int) -> NDArray[np.int32]:
        decoded = np.empty(count, np.int32)
        try:
            for start in range(0, count, _CHUNK):
                part = min(_CHUNK, count - start)
                decoded[start : start + part] = self._decoder.decode(model, part)
        except AssertionError as error:
            raise ArtifactError(f"the stream does not decode ({error})") from None
        return decoded


def _model(coder: Any, frequencies: Ints) -> Any:
    """P(s) = (frequency + 1) / 2 ** 24: their sum is 2 ** 24 - A, so constriction scales by 1."""
    assert 2 <= len(frequencies) <= MAX_ALPHABET
    assert int(frequencies.sum()) == (1 << PRECISION) - len(frequencies)
    return coder.stream.model.Categorical(frequencies.astype(np.float64), perfect=False)


def _constriction() -> Any:
    try:
        import constriction
    except ImportError:
        raise MissingExtraError("constriction", "shrink", "a .pbkd file") from None
    return constriction
