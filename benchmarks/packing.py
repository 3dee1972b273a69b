"""How small `.pbkd` files are: bits per weight against the entropy, and against zstandard.

Claim: the range coder's streams are smaller than what zstandard (level 22) makes of the same codes
and the same planes of bytes. Without `--folder`, weights are drawn: a VGG's shapes, Laplacian, rows
and columns of unlike widths, the smallest set to 0 over all layers, then a grid of 2 ** bits values
per output channel, vectors in half precision. With it, students of `pbkd shrink`.

- entropy: of the codes of each tensor, as if a table cost nothing and each symbol stood alone;
- stream: all that is in the file but header and checksums; tables, steps, biases, norms included;
- zstd: codes as bytes, then halves (floats) in planes of bytes; the better of one and many frames
  is not looked for, and what would tell the shapes is left out.

zstandard is no dependency of pbkd; without it the column is empty: pip install zstandard.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pbkd.artifacts import load_tensors
from pbkd.config import AugmentConfig
from pbkd.models import ModelCard, NetworkSpec, read_card
from pbkd.models.checkpoint import WEIGHTS
from pbkd.shrink.container import open_packed, pack_state
from pbkd.shrink.grids import Grid, Quantized
from pbkd.shrink.state import load_grids

_SHAPES = [(32, 3), (32, 32), (64, 32), (64, 64), (128, 64), (128, 128)]


def drawn(bits: int, zeros: float) -> tuple[dict[str, Tensor], dict[str, Quantized]]:
    """A pruned and quantized VGG of random weights."""
    rng = np.random.default_rng(0)
    weights = [
        rng.laplace(size=(rows, columns, 3, 3))
        * np.exp(0.35 * rng.normal(size=(rows, 1, 1, 1)))
        * np.exp(0.35 * rng.normal(size=(1, columns, 1, 1)))
        / np.sqrt(9 * columns)
        for rows, columns in _SHAPES
    ]
    smallest = np.quantile(np.abs(np.concatenate([w.reshape(-1) for w in weights])), zeros)
    state: dict[str, Tensor] = {}
    grids: dict[str, Quantized] = {}
    for i, kernel in enumerate(weights):
        values = torch.from_numpy(np.where(np.abs(kernel) < smallest, 0, kernel)).float()
        largest = values.flatten(1).abs().amax(1).clamp(min=1e-6)
        grid = Grid((largest / (2 ** (bits - 1) - 1)).half().float(), bits)
        state[f"net.{i}.weight"] = grid.values(grid.codes(values))
        grids[f"net.{i}.weight"] = grid
        rows = len(kernel)
        for name, vector in (
            ("weight", rng.normal(1, 0.2, rows)),
            ("bias", rng.normal(0, 0.2, rows)),
            ("running_mean", rng.normal(0, 0.5, rows)),
            ("running_var", np.exp(rng.normal(-1, 0.7, rows))),
        ):
            state[f"net.{i}.norm.{name}"] = torch.from_numpy(vector).half().float()
    return state, grids


def entropy_bits(codes: np.ndarray) -> float:
    """Of symbols that stand alone."""
    counts = np.unique(codes, return_counts=True)[1]
    return float(-(counts * np.log2(counts / counts.sum())).sum())


def zstd_bytes(state: dict[str, Tensor], grids: dict[str, Quantized]) -> int | None:
    """Of codes and of planes of bytes, at the highest level; None: zstandard is not there."""
    try:
        import zstandard
    except ImportError:
        return None
    codes, planes = b"", b""
    for name, tensor in state.items():
        if name in grids:
            codes += grids[name].codes(tensor).numpy().astype(np.int8).tobytes()
            grid = grids[name]
            tensor = grid.steps if isinstance(grid, Grid) else grid.levels
        if tensor.dtype != torch.float32:
            continue
        numbers = tensor.reshape(-1).numpy()
        halves = numbers.astype(np.float16)
        is_half = bool((halves.astype(np.float32) == numbers).all())
        raw = halves.view(np.uint8) if is_half else numbers.view(np.uint8)
        planes += raw.reshape(len(numbers), -1).T.tobytes()
    compressor = zstandard.ZstdCompressor(level=22)
    return len(compressor.compress(codes)) + len(compressor.compress(planes))


def row(name: str, card: ModelCard, state: dict[str, Tensor], grids: dict[str, Quantized]) -> str:
    """One line of the table."""
    data = pack_state(card, state, grids)
    words = open_packed(data, name).words
    start = time.process_time()
    open_packed(data, name).unpack()
    duration_s = time.process_time() - start
    codes = {n: grid.codes(state[n]).numpy() for n, grid in grids.items()}
    num_weights = sum(c.size for c in codes.values())
    zeros = sum(int((state[n] == 0).sum()) for n in codes) / num_weights
    entropy = sum(entropy_bits(c) for c in codes.values()) / num_weights
    zstd = zstd_bytes(state, grids)
    less = "" if zstd is None else f"{zstd:,} | {1 - len(words) / zstd:.1%}"
    return (
        f"| {name} | {num_weights:,} | {zeros:.0%} | {entropy:.3f} | {len(data):,} | "
        f"{8 * len(data) / num_weights:.3f} | {len(words):,} | {less} | {1e3 * duration_s:.0f} |"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, nargs="*", help="students of `pbkd shrink`")
    folders = parser.parse_args().folder
    torch.set_num_threads(1)
    print(
        "| student | weights | zeros | entropy, bits | file, bytes | file, bits per weight | "
        "stream, bytes | zstd, bytes | less | decoding, ms |\n" + "|---" * 10 + "|"
    )
    for folder in folders or ():
        state = load_tensors(folder / WEIGHTS)
        print(row(folder.name, read_card(folder), state, load_grids(folder)), flush=True)
    if folders:
        return
    card = ModelCard(
        network=NetworkSpec(name="vgg_small", num_classes=10, in_channels=3),
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
        image_size=(32, 32),
        class_names=tuple("0123456789"),
        augment=AugmentConfig(),
        data_digest="",
    )
    for bits, zeros in ((4, 0.5), (4, 0.7), (4, 0.8), (4, 0.9), (3, 0.8), (8, 0.8), (8, 0.0)):
        print(row(f"drawn, {bits} bits", card, *drawn(bits, zeros)), flush=True)


if __name__ == "__main__":
    main()
