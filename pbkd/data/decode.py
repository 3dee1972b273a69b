"""Images to uint8 arrays: decoded once, in threads, straight into memory-mapped files.

Shapes: N images, C channels, H x W pixels.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from pbkd.data.sources import Opener
from pbkd.errors import DataError

_log = logging.getLogger(__name__)

_BATCH = 8  # images per task: handing over one by one costs as much as decoding a small one
_MAX_THREADS = 16  # each keeps two tasks' files in memory
_LOG_EVERY_S = 10.0


@dataclass(frozen=True)
class Fit:
    """How an image becomes an array of one shape.

    Attributes:
        channels: 1 or 3.
        size: height and width after the centre crop, pixels; None: the image's own.
        resize: its shorter side before the crop, pixels; None: ``size``.
    """

    channels: int
    size: int | None
    resize: int | None
    interpolation: Literal["bilinear", "bicubic"]

    def __call__(self, image: Image.Image) -> NDArray[np.uint8]:
        """(C, H, W) uint8: turned upright (EXIF), converted, resized and cropped."""
        image = _converted(ImageOps.exif_transpose(image), self.channels)
        if self.size is not None and (image.size != (self.size, self.size) or self.resize):
            from torchvision.transforms import functional as F
            from torchvision.transforms.functional import InterpolationMode

            mode = InterpolationMode(self.interpolation)
            image = F.resize(image, [self.resize or self.size], mode)
            image = F.center_crop(image, [self.size])
        array = np.asarray(image, np.uint8)
        return array[None] if self.channels == 1 else array.transpose(2, 0, 1)


def _converted(image: Image.Image, channels: int) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits per pixel: Pillow would cut off at 255
        image = Image.fromarray((np.asarray(image) / 256).clip(0, 255).astype(np.uint8))
    if isinstance(image.info.get("transparency"), bytes):  # else Pillow warns
        image = image.convert("RGBA")
    if image.mode == "F":  # Pillow would make black of pixels in [0, 1]
        raise ValueError("pixels are floating-point numbers, expected 8 or 16 bits")
    return image.convert("L" if channels == 1 else "RGB")


@dataclass(frozen=True)
class Place:
    """Where an image goes: row of an array."""

    array: NDArray[np.uint8]
    row: int


def decode_all(
    images: Iterable[tuple[int, Opener]],
    places: Sequence[Place | None],
    names: Sequence[str],
    fit: Fit,
    on_corrupt: Literal["fail", "skip"],
) -> list[int]:
    """Decode images into their places.

    Args:
        images: index and opener of each.
        places: by index.
        names: by index, for messages.

    Returns:
        Indices of the images that could not be decoded; their places hold zeros.

    Raises:
        DataError: an image cannot be decoded and ``on_corrupt`` is `fail`, or it has another shape
            than its place.
    """
    corrupt: list[int] = []
    num_threads = min(len(os.sched_getaffinity(0)), _MAX_THREADS)

    def work(batch: list[tuple[int, Opener]]) -> list[tuple[int, str]]:
        failed = []
        for index, opener in batch:
            place = places[index]
            assert place is not None
            try:
                pixels = fit(opener())
            except MemoryError:
                raise
            except Exception as error:  # a damaged file makes Pillow raise anything
                if isinstance(error, OSError) and error.errno is not None:  # the disk's fault
                    raise DataError(
                        f"image {names[index]} cannot be read: {error.strerror}; run it again"
                    ) from error
                failed.append((index, f"{type(error).__name__}: {error}"))
                continue
            _put(pixels, place, names[index])
        return failed

    total = sum(place is not None for place in places)
    with ThreadPoolExecutor(num_threads) as threads, _progress(total) as advance:
        pending: deque[tuple[int, Future[list[tuple[int, str]]]]] = deque()
        try:
            for batch in _batches(iter(images)):
                pending.append((len(batch), threads.submit(work, batch)))
                if len(pending) > 2 * num_threads:
                    corrupt += _done(pending, names, on_corrupt, advance)
            while pending:
                corrupt += _done(pending, names, on_corrupt, advance)
        except BaseException:
            threads.shutdown(wait=True, cancel_futures=True)
            raise
    if corrupt:
        shown = ", ".join(names[index] for index in corrupt[:5])
        more = f" and {len(corrupt) - 5} more" if len(corrupt) > 5 else ""
        _log.warning("left out %d corrupt images: %s%s", len(corrupt), shown, more)
    return corrupt


def _put(pixels: NDArray[np.uint8], place: Place, name: str) -> None:
    expected = place.array.shape[1:]
    if pixels.shape != expected:
        raise DataError(
            f"image {name} is {pixels.shape[2]}x{pixels.shape[1]}, the first one "
            f"{expected[2]}x{expected[1]}; set prepare.image_size to bring all to one size"
        )
    place.array[place.row] = pixels


def _done(
    pending: deque[tuple[int, Future[list[tuple[int, str]]]]],
    names: Sequence[str],
    on_corrupt: Literal["fail", "skip"],
    advance: Callable[[int], None],
) -> list[int]:
    num, future = pending.popleft()
    failed = future.result()
    advance(num)
    if failed and on_corrupt == "fail":
        index, reason = failed[0]
        raise DataError(
            f"image {names[index]} cannot be decoded ({reason}); replace or remove it, or set "
            "prepare.on_corrupt: skip"
        )
    return [index for index, _ in failed]


def _batches(images: Iterator[tuple[int, Opener]]) -> Iterator[list[tuple[int, Opener]]]:
    while batch := list(islice(images, _BATCH)):
        yield batch


@contextmanager
def _progress(total: int) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, a line every ten seconds elsewhere; yields what counts images."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
    except ImportError:
        yield _lines(total)
        return
    console = Console(stderr=True)
    if not (sys.stderr.isatty() and console.is_terminal):
        yield _lines(total)
        return
    columns = ("decoding", BarColumn(), MofNCompleteColumn(), "images", TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("decoding", total=total)
        yield lambda num: bar.advance(task, num)


def _lines(total: int) -> Callable[[int], None]:
    done, last = 0, time.monotonic()

    def advance(num: int) -> None:
        nonlocal done, last
        done += num
        if time.monotonic() - last >= _LOG_EVERY_S:
            last = time.monotonic()
            _log.info("decoded %d of %d images", done, total)

    return advance
