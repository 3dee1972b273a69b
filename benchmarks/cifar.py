"""What the benchmarks on CIFAR-10's images share: where these are, and calls that end in time."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Any

from workspaces import ROOT

_TIME_IS_UP = 3

AUGMENT: dict[str, Any] = {"pad": 4, "flip": True}
GPU_TEACHER: dict[str, Any] = {
    "epochs": 60,
    "batch_size": 512,
    "lr": 0.2,
    "augment": AUGMENT | {"erase": 12},
    "min_accuracy": 0.0,
}
LIBRARY: list[dict[str, Any]] = [
    {"kind": "separable"},
    {"kind": "low_rank", "ratio": 0.25},
    {"kind": "bottleneck", "ratio": 0.25},
    {"kind": "identity"},
]
PREPARE: dict[str, Any] = {"source": "image_folder", "image_size": 32, "val_fraction": 0.1}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--images`` and ``--limit-s``."""
    parser.add_argument(
        "--images",
        type=Path,
        default=ROOT / "data" / "raw" / "cifar10-images.tar.gz",
        help="CIFAR-10 as train|test/CLASS/image: a folder, .tar.gz or .zip",
    )
    parser.add_argument("--limit-s", type=int, default=0, help="stop after so many seconds")


def begin(options: argparse.Namespace) -> None:
    """Look for the images, let the log be seen, and let the call end when its time is up."""
    if not options.images.exists():
        sys.exit(f"{options.images} does not exist; say where the images are: --images PATH")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    for name in ("onnxscript", "onnx_ir"):
        logging.getLogger(name).setLevel(logging.WARNING)
    signal.signal(signal.SIGALRM, _time_is_up)
    signal.alarm(options.limit_s)  # 0: never


def _time_is_up(*_: object) -> None:
    print("time is up; call it again to go on", flush=True)
    os._exit(_TIME_IS_UP)
