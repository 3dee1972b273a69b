"""Tensors to one stream and back: every coding and type, bit for bit, and near the entropy."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pbkd.errors import ArtifactError, MissingExtraError
from pbkd.shrink.choice import encode
from pbkd.shrink.codec import Plan, decode
from pbkd.shrink.codes import gap_symbols, read_gaps, write_gaps
from pbkd.shrink.contexts import fit_family
from pbkd.shrink.grids import Codebook, Grid, Quantized
from pbkd.shrink.numbers import DTYPES, bits_of_tensor, ordered, tensor_of_bits, unordered
from pbkd.shrink.range_coder import Reader, Writer
from pbkd.shrink.tables import LEVEL_BITS, PRECISION, STRIDES, WEIGHTS, Table, best_table, num_knots


def same_bits(one: Tensor, other: Tensor) -> bool:
    return (
        one.dtype == other.dtype
        and one.shape == other.shape
        and np.array_equal(bits_of_tensor(one), bits_of_tensor(other))
    )


def round_trip(
    tensors: dict[str, Tensor], grids: dict[str, Quantized] | None = None
) -> tuple[Plan, bytes]:
    """Encode and decode; the result is checked bit for bit."""
    plan, words = encode(tensors, grids or {})
    decoded, decoded_grids = decode(words, plan)
    assert list(decoded) == list(tensors)
    for name, tensor in tensors.items():
        assert same_bits(decoded[name], tensor), name
    assert list(decoded_grids) == [name for name in tensors if name in (grids or {})]
    for name, grid in decoded_grids.items():
        own = (grids or {})[name]
        if isinstance(own, Grid):
            assert isinstance(grid, Grid)
            assert grid.bits == own.bits
            assert same_bits(grid.steps, own.steps)
        else:
            assert isinstance(grid, Codebook)
            assert same_bits(grid.levels, own.levels)
    return plan, words


def codings(plan: Plan) -> dict[str, str]:
    return {entry.name: entry.coding for entry in plan.tensors}


def on_grid(
    shape: tuple[int, ...], bits: int, *, zeros: float = 0.5, seed: int = 0, spread: float = 0.3
) -> tuple[Tensor, Grid]:
    """Laplacian weights, rows of unlike widths, the smallest set to 0, on a grid per row."""
    rng = np.random.default_rng(seed)
    weights = rng.laplace(size=shape)
    weights *= np.exp(spread * rng.normal(size=(shape[0], *[1] * (len(shape) - 1))))
    weights[np.abs(weights) < np.quantile(np.abs(weights), zeros)] = 0
    values = torch.tensor(weights, dtype=torch.float32)
    largest = values.reshape(shape[0], -1).abs().amax(1).clamp(min=1e-3)
    grid = Grid((largest / (2 ** (bits - 1) - 1)).half().float(), bits)
    return grid.values(grid.codes(values)), grid


def entropy_bits(codes: np.ndarray) -> float:
    counts = np.unique(codes, return_counts=True)[1]
    shares = counts / counts.sum()
    return float(-(shares * np.log2(shares)).sum() * counts.sum())


# ---------------------------------------------------------------- exactness


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_every_type_comes_back_bit_for_bit(dtype: torch.dtype) -> None:
    rng = np.random.default_rng(0)
    width = dtype.itemsize
    raw = rng.integers(0, 2 if dtype is torch.bool else 256, (60, width), dtype=np.uint8)
    if dtype is torch.bool:
        raw = raw[:, :1]
    whole = torch.from_numpy(raw.reshape(-1).copy()).view(dtype).reshape(5, 12)
    few = whole.clone()
    few.view(-1)[::2] = 0
    one = torch.zeros(3, dtype=dtype)
    round_trip({"whole": whole, "few": few, "one": one, "scalar": whole[0, 0].clone()})


def test_odd_numbers_keep_their_bits() -> None:
    patterns = np.array(
        [0x7FC00001, 0xFFC12345, 0x7F800001, 0x80000000, 0, 1, 0x7F800000, 0xFF800000, 0x3C003C00],
        dtype=np.uint32,
    )
    nans = torch.from_numpy(patterns.view(np.float32).copy())
    negative_zeros = torch.randn(200).half().float()
    negative_zeros[::3] = -0.0
    plan, _ = round_trip(
        {
            "nans": nans,
            "negative_zeros": negative_zeros,
            "empty": torch.zeros(0, 3),
            "all_negative_zero": torch.full((4,), -0.0),
        }
    )
    assert codings(plan)["nans"] != "half"
    assert codings(plan)["negative_zeros"].startswith("half")
    assert codings(plan)["all_negative_zero"] == "const"


def test_a_negative_zero_on_a_grid_is_kept() -> None:
    values, grid = on_grid((4, 8), 4)
    values[values == 0] = -0.0
    plan, _ = round_trip({"w": values}, {"w": grid})
    assert not codings(plan)["w"].startswith("code")


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("shape", [(6,), (6, 40), (16, 8, 3, 3), (1, 1, 7, 7)])
def test_grids_come_back(bits: int, shape: tuple[int, ...]) -> None:
    values, grid = on_grid(shape, bits)
    round_trip({"w": values, "b": torch.arange(7.0)}, {"w": grid})


@pytest.mark.parametrize("size", [2, 3, 16, 256])
def test_codebooks_come_back(size: int) -> None:
    rng = np.random.default_rng(size)
    levels = torch.from_numpy(np.unique(rng.normal(size=size).astype(np.float32)))
    levels[size // 2] = 0
    levels = levels.sort().values
    codes = torch.from_numpy(rng.integers(0, size, (12, 5, 3, 3)))
    plan, _ = round_trip({"w": levels[codes]}, {"w": Codebook(levels)})
    assert codings(plan)["w"] == "codes"


def test_a_constant_tensor_keeps_its_grid() -> None:
    grid = Grid(torch.full((4,), 0.5), 4)
    single = Codebook(torch.zeros(1))
    plan, _ = round_trip({"w": torch.zeros(4, 9), "v": torch.zeros(3)}, {"w": grid, "v": single})
    assert set(codings(plan).values()) == {"const"}


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.one_of(st.floats(width=32), st.sampled_from([0.0, -0.0, 1.0, 0.5]), st.floats(width=16)),
        max_size=60,
    ),
    st.sampled_from([torch.float32, torch.float16, torch.float64]),
)
def test_any_numbers_come_back(numbers: list[float], dtype: torch.dtype) -> None:
    tensor = torch.tensor(numbers, dtype=torch.float64).to(dtype)
    round_trip({"x": tensor, "twice": torch.cat([tensor, tensor])})


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from(list(DTYPES.values())))
def test_ordered_is_the_order_of_the_numbers(seed: int, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(seed)
    if dtype.is_floating_point:
        numbers = torch.from_numpy(rng.normal(size=50) * 10.0 ** rng.integers(-3, 3)).to(dtype)
    elif dtype is torch.bool:
        numbers = torch.from_numpy(rng.integers(0, 2, 50)).bool()
    else:
        info = torch.iinfo(dtype)
        numbers = torch.from_numpy(rng.integers(info.min, info.max, 50)).to(dtype)
    patterns = ordered(bits_of_tensor(numbers), dtype)
    by_pattern = numbers[torch.from_numpy(np.argsort(patterns, kind="stable"))]
    assert torch.equal(by_pattern.double(), numbers.double().sort().values)
    assert same_bits(tensor_of_bits(unordered(patterns, dtype), dtype, (50,)), numbers)


def test_an_unknown_type_is_told() -> None:
    with pytest.raises(ArtifactError, match="w is complex64"):
        encode({"w": torch.zeros(2, dtype=torch.complex64)}, {})


def test_a_missing_coder_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "constriction", None)
    with pytest.raises(MissingExtraError, match=r"pbkd\[shrink\]"):
        Writer()


# ---------------------------------------------------------------- choices


def test_each_coding_is_taken_where_it_is_smallest() -> None:
    rng = np.random.default_rng(0)
    dense = torch.from_numpy(rng.normal(size=(20, 30)).astype(np.float32))
    pruned = dense * torch.from_numpy(rng.random((20, 30)) < 0.3)
    regular = torch.zeros(8_000)
    regular[::50] = dense.reshape(-1)[:160]
    repeated = dense.reshape(-1)[:200].repeat(20)
    values, grid = on_grid((16, 30), 4)
    tensors = {
        "dense": dense,
        "halves": dense.half().float(),
        "pruned": torch.where(pruned == 0, 0.0, pruned),
        "pruned_halves": torch.where(pruned == 0, 0.0, pruned).half().float(),
        "regular": regular,
        "repeated": repeated,
        "w": values,
        "batches": torch.tensor(390),
    }
    plan, _ = round_trip(tensors, {"w": grid})
    assert codings(plan) == {
        "dense": "numbers",
        "halves": "half",
        "pruned": "zeros",
        "pruned_halves": "half_zeros",
        "regular": "gaps",
        "repeated": "zlib",
        "w": "codes",
        "batches": "const",
    }


def test_codes_at_regular_places_go_as_gaps() -> None:
    """Every seventh of 8,400 weights is not 0: 1,200 codes of 2 bits, none for the places."""
    rng = np.random.default_rng(0)
    values = torch.zeros(8400)
    values[::7] = torch.from_numpy(rng.choice([-1.0, -0.5, 0.5, 1.0], size=1200)).float()
    values = values.reshape(8, 1050)
    plan, words = round_trip({"w": values}, {"w": Grid(torch.full((8,), 0.5), 4)})
    assert codings(plan) == {"w": "code_gaps"}
    assert 300 <= len(words) <= 300 + 50


def test_three_weights_among_thousands_take_a_few_bytes() -> None:
    lonely = torch.zeros(40_000)
    lonely[[7, 300, 30_000]] = torch.tensor([1.5, -0.25, 3.1])
    _, words = round_trip({"w": lonely})
    assert len(words) <= 40


def test_a_few_tables_serve_rows_of_unlike_widths() -> None:
    """The rows' widths differ by a factor of 8: under one table they cost more."""
    rng = np.random.default_rng(0)
    widths = np.repeat([0.4, 1.2, 3.0], 20)[:, None, None]
    codes = np.rint(rng.laplace(size=(60, 20, 9)) * widths).clip(-7, 7).astype(np.int32) + 7
    fitted = fit_family([codes], 15)
    ideal = sum(entropy_bits(codes[start : start + 20]) for start in (0, 20, 40))
    assert fitted.cost / 256 < 1.02 * ideal + 600
    assert fitted.cost / 256 < 0.93 * entropy_bits(codes)


def test_columns_and_places_count_too() -> None:
    rng = np.random.default_rng(0)
    by_column = np.where(np.arange(40) % 2, 0.3, 2.0)[:, None]
    codes = np.rint(rng.laplace(size=(80, 40, 1)) * by_column).clip(-7, 7).astype(np.int32) + 7
    fitted = fit_family([codes], 15)
    assert fitted.effects[0].columns.any()
    ideal = entropy_bits(codes[:, ::2]) + entropy_bits(codes[:, 1::2])
    assert fitted.cost / 256 < 1.02 * ideal + 250 < entropy_bits(codes)
    by_place = np.where(np.arange(9) == 4, 3.0, 0.3)
    codes = np.rint(rng.laplace(size=(80, 40, 9)) * by_place).clip(-7, 7).astype(np.int32) + 7
    fitted = fit_family([codes], 15)
    assert fitted.effects[0].places.any()
    centre = np.arange(9) == 4
    ideal = entropy_bits(codes[..., centre]) + entropy_bits(codes[..., ~centre])
    assert fitted.cost / 256 < 1.02 * ideal + 250 < entropy_bits(codes)


# ---------------------------------------------------------------- sizes


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("zeros", [0.0, 0.5, 0.9])
def test_codes_take_their_entropy(bits: int, zeros: float) -> None:
    values, grid = on_grid((64, 32, 3, 3), bits, zeros=zeros, spread=0)
    _, words = round_trip({"w": values}, {"w": grid})
    codes = entropy_bits(grid.codes(values).numpy()) / 8
    steps = 2 * len(grid.steps)
    assert len(words) <= 1.02 * codes + steps + 100


def test_sizes_by_hand() -> None:
    """1,024 fair bits are 128 bytes; tables and words' ends cost a little."""
    rng = np.random.default_rng(0)
    signs = torch.from_numpy(rng.permutation(np.repeat([-1.0, 1.0], 512))).float().reshape(32, 32)
    _, words = round_trip({"w": signs}, {"w": Codebook(torch.tensor([-1.0, 1.0]))})
    assert 128 <= len(words) <= 128 + 24
    # 1,000 random float32 cannot be less than 4,000 bytes; half-precision ones 2,000
    patterns = rng.integers(0, 2**32, 1000, dtype=np.uint32)
    _, words = round_trip({"x": torch.from_numpy(patterns.view(np.float32).copy())})
    assert 3_990 <= len(words) <= 4_012
    # constants are in the header alone
    _, words = round_trip({"x": torch.full((1000,), 0.1), "n": torch.tensor(7)})
    assert words == b""


def test_vectors_of_a_kind_share_a_table() -> None:
    """Ten variances of 32 channels: fewer than 2 bytes each, though none is like another."""
    rng = np.random.default_rng(0)
    vectors = {
        f"bn{i}.running_var": torch.from_numpy(np.exp(rng.normal(size=32))).half().float()
        for i in range(10)
    }
    plan, words = round_trip(vectors)
    assert plan.num_number_families == 1
    assert len(words) < 1.75 * 320


# ---------------------------------------------------------------- the stream's parts


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 256), st.integers(0, 3), st.integers(0, 3), st.integers(0, 2**32))
def test_tables_are_whole(alphabet: int, precision: int, stride_index: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    first, last = sorted(int(symbol) for symbol in rng.integers(0, alphabet, 2))
    count = num_knots(STRIDES[stride_index], last - first + 1)
    units = rng.integers(0, 1 << LEVEL_BITS[precision], count) * (rng.random() < 0.9)
    table = Table(alphabet, first, last, precision, stride_index, units.astype(np.int64))
    assert len(table.frequencies) == alphabet
    assert table.frequencies.min() >= 0
    assert table.frequencies.sum() == (1 << PRECISION) - alphabet


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 256), st.integers(0, 2**32), st.integers(1, 3000))
def test_a_table_is_read_as_it_was_written(alphabet: int, seed: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    shares = rng.dirichlet(np.full(alphabet, 0.3))
    symbols = rng.choice(alphabet, size=count, p=shares)
    writer = Writer()
    histogram = np.bincount(symbols, minlength=alphabet)
    frequencies = writer.table(histogram)
    writer.symbols(symbols, frequencies)
    writer.number(count, 40)
    raw = writer.words()
    assert 8 * len(raw) <= best_table(histogram)[1] / 256 + 40 + 65
    reader = Reader(raw)
    assert np.array_equal(reader.table(alphabet), frequencies)
    assert np.array_equal(reader.symbols(count, frequencies), symbols)
    assert reader.number(40) == count
    reader.finish()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5000), st.floats(0, 1), st.integers(0, 2**32))
def test_gaps_come_back(count: int, share: float, seed: int) -> None:
    nonzero = np.random.default_rng(seed).random(count) < share**4
    writer = Writer()
    write_gaps(writer, nonzero)
    assert np.array_equal(read_gaps(Reader(writer.words()), count), nonzero)


def test_gaps_by_hand() -> None:
    nonzero = np.zeros(1000, np.bool_)
    nonzero[[0, 1, 4, 300, 810]] = True
    # 295 = 255 + 40; 509 = 255 + 254
    assert gap_symbols(nonzero).tolist() == [0, 0, 2, 255, 40, 255, 254]
    nonzero[:] = False
    nonzero[[255, 511]] = True
    assert gap_symbols(nonzero).tolist() == [255, 0, 255, 0]


def test_surplus_words_are_told() -> None:
    values, grid = on_grid((8, 9), 4)
    plan, words = encode({"w": values}, {"w": grid})
    with pytest.raises(ArtifactError, match="longer than its header"):
        decode(words + b"\1\2\3\4" * 8, plan)


def test_no_float_arithmetic_decides_a_table() -> None:
    """The weights of the levels, by their definition: fourth roots of powers of two."""
    assert WEIGHTS[0] == 0
    for level in range(1, 64):
        weight = int(WEIGHTS[level])
        assert weight**4 <= 2 ** (32 + level) < (weight + 1) ** 4
    assert math.isclose(WEIGHTS[63], 2 ** (8 + 63 / 4), rel_tol=1e-4)


def test_nothing_is_unpickled() -> None:
    folder = Path(__file__).parents[2] / "pbkd" / "shrink"
    for name in ("codec", "codes", "numbers", "range_coder", "container", "header", "unpacking"):
        text = (folder / f"{name}.py").read_text()
        assert "pickle" not in text
        assert "torch.load" not in text
        assert "eval(" not in text.replace(".eval()", "")
