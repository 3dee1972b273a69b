"""Folders and archives of images, prepared: formats, sizes, damaged images, hostile archives."""

from __future__ import annotations

import importlib
import io
import os
import struct
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from torchvision import transforms
from torchvision.transforms.functional import InterpolationMode

from pbkd.config import PrepareConfig
from pbkd.data import Prepared
from pbkd.data import prepare as prepare_from
from pbkd.data.prepare import SPLITS
from pbkd.errors import DataError

Files = dict[str, bytes]


def prepare(root: Path, path: str = "raw", *, seed: int = 0, **settings: Any) -> Prepared:
    config = PrepareConfig(
        **{"source": "image_folder", "val_fraction": 0.3, "test_fraction": 0.3, **settings},
        path=path,
    )
    return prepare_from(config, seed, root / "prepared", root, root / "downloads")


def _noise(height: int = 8, width: int = 8, *, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))


def _encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _files(*tops: str, per_class: int = 8) -> Files:
    """Two classes, every image another one."""
    names = [
        f"{top}{name}/{number}.png"
        for top in tops or ("",)
        for name in ("cat", "dog")
        for number in range(per_class)
    ]
    return {name: _encoded(_noise(seed=seed)) for seed, name in enumerate(names)}


def _write_folder(path: Path, files: Files) -> None:
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)


def _member(name: str, content: bytes = b"", **fields: Any) -> tuple[tarfile.TarInfo, io.BytesIO]:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, io.BytesIO(content)


def _write_tar(path: Path, files: Files, *more: tuple[tarfile.TarInfo, io.BytesIO]) -> None:
    kind = path.suffix[1:].replace("tgz", "gz").replace("tar", "")
    with tarfile.open(path, f"w:{kind}") as archive:  # type: ignore[call-overload]
        for info, content in (*(_member(*item) for item in files.items()), *more):
            archive.addfile(info, content)


def _write_zip(path: Path, files: Files) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)


def _write(path: Path, files: Files) -> None:
    writers = {"": _write_folder, ".zip": _write_zip}
    writers.get(path.suffix, _write_tar)(path, files)


def _tree(path: Path) -> set[str]:
    return {str(entry.relative_to(path)) for entry in path.rglob("*")}


def _fails(root: Path, match: str, path: str = "raw", **settings: Any) -> None:
    """The error is told, nothing is left or put anywhere, and an older result stays."""
    before = _tree(root.parent)
    with pytest.raises(DataError, match=match):
        prepare(root, path, **settings)
    assert _tree(root.parent) == before
    (root / "prepared").mkdir()
    (root / "prepared" / "older").touch()
    with pytest.raises(DataError, match=match):
        prepare(root, path, **settings)
    assert _tree(root.parent) == before | {f"{root.name}/prepared", f"{root.name}/prepared/older"}


def _content(prepared: Prepared) -> dict[str, Counter[tuple[bytes, str]]]:
    """Images with their class, by split."""
    names = prepared.meta.class_names
    return {
        name: Counter(
            (image.tobytes(), names[label])
            for image, label in zip(split.images, split.labels, strict=True)
        )
        for name, split in ((name, prepared.split(name)) for name in SPLITS)
    }


def _pixels(content: bytes) -> bytes:
    return np.asarray(Image.open(io.BytesIO(content))).transpose(2, 0, 1).tobytes()


def _expected(files: Files) -> Counter[tuple[bytes, str]]:
    return Counter((_pixels(content), Path(name).parent.name) for name, content in files.items())


# ---------------------------------------------------------------- folders and archives


@pytest.mark.parametrize("tops", [(), ("train/", "test/"), ("Training/", "valid/", "TEST/")])
def test_folder_and_archives_prepare_to_the_same_bytes(
    tmp_path: Path, tops: tuple[str, ...]
) -> None:
    files = _files(*tops)
    damaged = {f"{top}{name}/3.png": b"damaged" for top in tops or ("",) for name in ("cat", "dog")}
    files |= damaged
    _write(tmp_path / "raw", files)
    prepared = prepare(tmp_path, on_corrupt="skip")
    assert prepared.meta.skipped == tuple(sorted(damaged))
    expected = {name: (prepared.folder / name).read_bytes() for name in prepared.meta.files}
    names = sorted(files, key=lambda name: zlib.crc32(name.encode()))  # as a disk lists them
    for ending in (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".zip"):
        for wrapping in ("", "./", "set/", "./a/b/"):
            packed = {f"{wrapping}{name}": files[name] for name in names}
            _write(tmp_path / f"set{ending}", packed)
            again = prepare(tmp_path, f"set{ending}", on_corrupt="skip")
            outer = wrapping.removeprefix("./")
            skipped = tuple(f"{outer}{name}" for name in prepared.meta.skipped)
            assert again.meta == prepared.meta.model_copy(update={"skipped": skipped})
            assert {n: (again.folder / n).read_bytes() for n in again.meta.files} == expected


def test_every_image_lands_in_its_split_with_its_label(tmp_path: Path) -> None:
    files = _files("train/", "val/", "test/", per_class=3)
    _write(tmp_path / "raw", files)
    prepared = prepare(tmp_path)
    assert prepared.meta.class_names == ("cat", "dog")
    assert _content(prepared) == {
        split: _expected({n: c for n, c in files.items() if n.startswith(split)})
        for split in SPLITS
    }


@pytest.mark.parametrize("ending", [".tar.gz", ".zip"])
def test_a_folder_that_holds_one_archive_is_that_archive(tmp_path: Path, ending: str) -> None:
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "README.md").touch()
    (tmp_path / "raw" / ".hidden").mkdir()
    files = _files()
    _write(tmp_path / "raw" / f"set{ending}", files)
    found = _content(prepare(tmp_path))
    assert sum(found.values(), Counter()) == _expected(files)


def test_archives_beside_folders_are_left_alone(tmp_path: Path) -> None:
    files = _files()
    _write(tmp_path / "raw", files)
    _write(tmp_path / "raw" / "more.zip", _files("train/"))
    assert sum(_content(prepare(tmp_path)).values(), Counter()) == _expected(files)


@pytest.mark.parametrize("ending", [".tar", ".zip"])
@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")
def test_of_members_with_one_name_the_last_counts(tmp_path: Path, ending: str) -> None:
    files = _files()
    path = tmp_path / f"set{ending}"
    newer = _encoded(_noise(seed=100))
    if ending == ".zip":
        _write(path, files)
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("cat/0.png", newer)
    else:
        _write_tar(path, files, _member("./cat/0.png", newer))
    found = sum(_content(prepare(tmp_path, path.name)).values(), Counter())
    assert found == _expected(files | {"cat/0.png": newer})


def test_links_in_a_folder_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    files = _files()
    _write(tmp_path / "elsewhere", files)
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "cat").symlink_to(tmp_path / "elsewhere" / "cat")
    (tmp_path / "raw" / "dog").mkdir()
    for entry in (tmp_path / "elsewhere" / "dog").iterdir():
        (tmp_path / "raw" / "dog" / entry.name).symlink_to(entry)
    (tmp_path / "raw" / "dog" / "again").symlink_to(tmp_path / "raw")
    assert sum(_content(prepare(tmp_path)).values(), Counter()) == _expected(files)


def test_an_empty_class_folder_is_named_in_folder_and_archive(tmp_path: Path) -> None:
    files = _files()
    _write(tmp_path / "raw", files)
    (tmp_path / "raw" / "bird").mkdir()
    _write_tar(tmp_path / "set.tar", files, _member("./bird", type=tarfile.DIRTYPE))
    _write(tmp_path / "set.zip", files | {"bird/": b""})
    for path in ("raw", "set.tar", "set.zip"):
        with pytest.raises(DataError, match="class folder bird holds no image"):
            prepare(tmp_path, path)


# ---------------------------------------------------------------- splits


def _sizes(prepared: Prepared) -> dict[str, int]:
    return prepared.meta.num_images


def test_fractions_apply_to_what_the_source_does_not_split(tmp_path: Path) -> None:
    fractions = {"val_fraction": 0.25, "test_fraction": 0.4}
    for tops, expected in (
        ((), {"train": 14, "val": 5, "test": 13}),
        (("train/", "valid/"), {"train": 24, "val": 8, "test": 32}),
        (("train/", "val/", "test/"), {"train": 32, "val": 32, "test": 32}),
    ):
        _write(tmp_path / "raw", _files(*tops, per_class=16))
        assert _sizes(prepare(tmp_path, **fractions)) == expected
        _remove(tmp_path / "raw")


def _remove(path: Path) -> None:
    path.rename(path.with_name(f"old-{len(list(path.parent.iterdir()))}"))


def test_a_given_test_split_stays_as_it_is(tmp_path: Path) -> None:
    files = _files("train/", "val/")
    _write(tmp_path / "raw", files)
    for seed in (0, 1):
        content = _content(prepare(tmp_path, seed=seed))
        given = {name: c for name, c in files.items() if name.startswith("val")}
        assert content["test"] == _expected(given)
        assert content["train"] + content["val"] == _expected(files) - _expected(given)


def test_the_seed_alone_decides(tmp_path: Path) -> None:
    _write(tmp_path / "raw", _files())
    first, again, other = (prepare(tmp_path, seed=seed).meta for seed in (0, 0, 1))
    assert again == first
    assert other.digest != first.digest
    assert other.num_images == first.num_images


def test_at_most_limit_images_of_each_split_are_decoded(tmp_path: Path) -> None:
    files = _files("train/", "val/", "test/")
    _write(tmp_path / "raw", files)
    whole = prepare(tmp_path)
    heads = {name: whole.split(name).images[:6] for name in SPLITS}
    for name in files:  # those that are not drawn are not looked at
        path = tmp_path / "raw" / name
        if not any(_pixels(files[name]) in {i.tobytes() for i in h} for h in heads.values()):
            path.write_bytes(b"damaged")
    prepared = prepare(tmp_path, limit=6)
    assert _sizes(prepared) == dict.fromkeys(SPLITS, 6)
    for name in SPLITS:
        assert np.array_equal(prepared.split(name).images, heads[name])


def test_a_limit_that_leaves_a_class_out_is_refused(tmp_path: Path) -> None:
    root = tmp_path / "root"
    _write(root / "raw", _files("train/", "val/", "test/"))
    _fails(root, "split train: no image of class '(cat|dog)'", limit=1)


@pytest.mark.parametrize("on_corrupt", ["fail", "skip"])
def test_the_number_of_threads_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_corrupt: str
) -> None:
    files = _files(per_class=20)
    if on_corrupt == "skip":
        files |= {f"cat/{number}.png": b"damaged" for number in (0, 3, 11)}
    _write(tmp_path / "raw", files)
    monkeypatch.setattr(importlib.import_module("pbkd.data.decode"), "_BATCH", 2)
    metas = []
    for num_threads in (1, 2, 13):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, n=num_threads: set(range(n)))
        metas.append(prepare(tmp_path, on_corrupt=on_corrupt).meta)
    assert metas[0] == metas[1] == metas[2]
    assert len(metas[0].skipped) == (3 if on_corrupt == "skip" else 0)


# ---------------------------------------------------------------- formats, sizes, channels


def _array_of(root: Path, name: str, content: bytes, **settings: Any) -> NDArray[np.uint8]:
    """What an image becomes: the only one of its kind, in every split and class."""
    tops = [f"{split}/{own}" for split in SPLITS for own in ("cat", "dog")]
    _write_folder(root / "raw", {f"{top}/{name}": content for top in tops})
    split = prepare(root, **settings).split("train")
    assert np.array_equal(split.images[0], split.images[1])
    return split.images[0]


def _chw(image: Image.Image, mode: str = "RGB") -> NDArray[np.uint8]:
    array = np.asarray(image.convert(mode))
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


PALETTE = _noise(9, 11).quantize(16)
LOSSLESS = {
    "rgb.png": (_noise(9, 11), "PNG", {}),
    "gray.png": (_noise(9, 11).convert("L"), "PNG", {}),
    "bits.png": (_noise(9, 11).convert("1"), "PNG", {}),
    "gray alpha.png": (_noise(9, 11).convert("LA"), "PNG", {}),
    "palette.png": (PALETTE, "PNG", {}),
    "transparent.png": (PALETTE, "PNG", {"transparency": 3}),
    "half transparent.png": (PALETTE, "PNG", {"transparency": bytes(range(0, 256, 16))}),
    "palette.gif": (PALETTE, "GIF", {}),
    "frames.gif": (PALETTE, "GIF", {"save_all": True, "append_images": [PALETTE.rotate(180)]}),
    "rgb.bmp": (_noise(9, 11), "BMP", {}),
    "rgb.tif": (_noise(9, 11), "TIFF", {}),
    "packed.TIFF": (_noise(9, 11), "TIFF", {"compression": "tiff_lzw"}),
    "rgb.webp": (_noise(9, 11), "WEBP", {"lossless": True}),
    "rgb.ppm": (_noise(9, 11), "PPM", {}),
    "rgb.tga": (_noise(9, 11), "TGA", {}),
    "rgb.jp2": (_noise(9, 11), "JPEG2000", {"irreversible": False}),
    "other ending.jpg": (_noise(9, 11), "PNG", {}),
}


@pytest.mark.parametrize("name", LOSSLESS)
def test_formats_without_loss(tmp_path: Path, name: str) -> None:
    image, kind, options = LOSSLESS[name]
    array = _array_of(tmp_path, name, _encoded(image, kind, **options))
    assert array.shape == (3, 9, 11)
    assert np.array_equal(array, _chw(image))


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_jpeg(tmp_path: Path, mode: str) -> None:
    content = _encoded(_noise(9, 11).convert(mode), "JPEG")
    expected = _chw(Image.open(io.BytesIO(content)))
    assert np.array_equal(_array_of(tmp_path, "1.JPEG", content), expected)


def test_transparency_is_left_out(tmp_path: Path) -> None:
    image = _noise(9, 11)
    image.putalpha(_noise(9, 11, seed=1).convert("L"))
    array = _array_of(tmp_path, "1.png", _encoded(image))
    assert np.array_equal(array, _chw(_noise(9, 11)))


@pytest.mark.parametrize("name", ["1.png", "1.tif", "1.pgm"])
def test_16_bits_become_the_upper_8(tmp_path: Path, name: str) -> None:
    deep = np.random.default_rng(0).integers(0, 2**16, (9, 11), np.uint16)
    kind = {"1.png": "PNG", "1.tif": "TIFF", "1.pgm": "PPM"}[name]
    array = _array_of(tmp_path, name, _encoded(Image.fromarray(deep), kind))
    assert np.array_equal(array, np.broadcast_to(deep >> 8, (3, 9, 11)))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "JPEG"])
def test_images_are_turned_upright(tmp_path: Path, kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {}
    content = _encoded(_noise(9, 11), kind, exif=exif, **options)
    stored = np.asarray(Image.open(io.BytesIO(_encoded(_noise(9, 11), kind, **options))))
    if orientation >= 5:  # rows are columns
        stored = stored.transpose(1, 0, 2)
    rows = slice(None, None, -1 if orientation in (3, 4, 7, 8) else 1)
    columns = slice(None, None, -1 if orientation in (2, 3, 6, 7) else 1)
    expected = stored[rows, columns].transpose(2, 0, 1)
    ending = {"PNG": "png", "TIFF": "tif", "WEBP": "webp", "JPEG": "jpg"}[kind]
    assert np.array_equal(_array_of(tmp_path, f"1.{ending}", content), expected)


SIZES = {"wide": (20, 33), "tall": (41, 17), "small": (9, 10), "odd": (15, 16), "exact": (12, 12)}


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("size", "resize"), [(12, None), (12, 12), (12, 19), (9, 32)])
@pytest.mark.parametrize("shape", SIZES.values(), ids=SIZES)
def test_sizes_are_those_of_torchvisions_transforms(
    tmp_path: Path, shape: tuple[int, int], size: int, resize: int | None, interpolation: str
) -> None:
    image = _noise(*shape)
    mode = InterpolationMode(interpolation)
    transform = transforms.Compose(
        [transforms.Resize(resize or size, mode), transforms.CenterCrop(size)]
    )
    settings = {"image_size": size, "resize": resize, "interpolation": interpolation}
    array = _array_of(tmp_path, "1.png", _encoded(image), **settings)
    assert array.shape == (3, size, size)
    assert np.array_equal(array, _chw(transform(image)))


@pytest.mark.parametrize("settings", [{}, {"resize": 20}])
def test_images_of_different_sizes_need_a_size(tmp_path: Path, settings: dict[str, int]) -> None:
    root = tmp_path / "root"
    files = _files() | {"dog/5.png": _encoded(_noise(10, 14))}
    _write(root / "raw", files)
    assert prepare(root, image_size=8, **settings).image_shape == (3, 8, 8)
    _remove(root / "prepared")
    _fails(root, r"image dog/5\.png is 14x10, the first one 8x8; set prepare\.image_size")


def test_without_a_size_the_first_image_that_can_be_decoded_gives_it(tmp_path: Path) -> None:
    _write(tmp_path / "raw", _files() | {"cat/0.png": b"damaged"})
    prepared = prepare(tmp_path, on_corrupt="skip")
    assert prepared.image_shape == (3, 8, 8)
    assert prepared.meta.skipped == ("cat/0.png",)


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize(("channels", "kept"), [("gray", "L"), ("rgb", "RGB"), (None, "RGB")])
def test_channels(tmp_path: Path, mode: str, channels: str | None, kept: str) -> None:
    image = _noise(9, 11).convert(mode)
    array = _array_of(tmp_path, "1.png", _encoded(image), channels=channels)
    assert np.array_equal(array, _chw(image, kept))


# ---------------------------------------------------------------- damaged images


def _chunk(name: bytes, content: bytes) -> bytes:
    checksum = struct.pack(">I", zlib.crc32(name + content))
    return struct.pack(">I", len(content)) + name + content + checksum


def _bomb() -> bytes:
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", b"") + _chunk(b"IEND", b"")
    )


DAMAGED = {
    "truncated jpeg": _encoded(_noise(64, 64), "JPEG")[:2000],
    "truncated png": _encoded(_noise(64, 64))[:2000],
    "truncated gif": _encoded(_noise(64, 64), "GIF")[:1500],
    "truncated webp": _encoded(_noise(64, 64), "WEBP")[:1000],
    "truncated tiff": _encoded(_noise(64, 64), "TIFF")[:2000],
    "header alone": _encoded(_noise())[:33],
    "flipped bit": _encoded(_noise())[:60] + b"\xff" + _encoded(_noise())[61:],
    "empty": b"",
    "text": b"<html>404 Not Found</html>",
    "bomb": _bomb(),
    "EXIF that is none": _encoded(_noise(), exif=b"Exif\0\0nonsense"),
    "format that is not read": _encoded(_noise(), "PCX"),
}
SETTINGS: list[dict[str, Any]] = [{}, {"image_size": 8}]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_image_ends_the_run_by_name(
    tmp_path: Path, kind: str, settings: dict[str, Any]
) -> None:
    root = tmp_path / "root"
    _write(root / "raw", _files() | {"cat/3.png": DAMAGED[kind]})
    match = r"image cat/3\.png cannot be decoded \(\w+: .*\); replace or remove it, or set prep"
    _fails(root, match, **settings)


@pytest.mark.parametrize("ending", [".tar.gz", ".zip"])
def test_a_damaged_image_in_an_archive_ends_the_run_by_name(tmp_path: Path, ending: str) -> None:
    root = tmp_path / "root"
    root.mkdir()
    _write(root / f"set{ending}", _files("set/") | {"set/cat/3.png": b""})
    _fails(root, r"image set/cat/3\.png cannot be decoded", f"set{ending}")


@pytest.mark.parametrize("piece", [1, 3, 1024])
def test_damaged_images_are_left_out_without_a_gap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int
) -> None:
    monkeypatch.setattr(importlib.import_module("pbkd.data.prepare"), "_PIECE", piece)
    whole = _files("train/", "val/", "test/", per_class=9)
    broken = {
        f"{split}/{own}/{number}.png": content
        for split, own in (("train", "cat"), ("test", "cat"), ("test", "dog"))
        for number, content in zip((0, 3, 4, 8), list(DAMAGED.values())[-5:], strict=False)
    }
    _write(tmp_path / "raw", whole | broken)
    prepared = prepare(tmp_path, on_corrupt="skip", image_size=8)
    assert prepared.meta.skipped == tuple(sorted(broken))
    assert _sizes(prepared) == {"train": 14, "val": 18, "test": 10}
    kept = {name: content for name, content in whole.items() if name not in broken}
    assert _content(prepared) == {
        split: _expected({n: c for n, c in kept.items() if n.startswith(split)}) for split in SPLITS
    }


def test_what_is_left_out_changes_nothing_else(tmp_path: Path) -> None:
    """The order is drawn before: all other images keep theirs."""
    _write(tmp_path / "raw", _files())
    order = [image.tobytes() for image in prepare(tmp_path).split("train").images]
    (tmp_path / "raw" / "cat" / "0.png").write_bytes(b"")
    left = [image.tobytes() for image in prepare(tmp_path, on_corrupt="skip").split("train").images]
    lost = _pixels(_files()["cat/0.png"])
    assert left == [image for image in order if image != lost]


def test_what_is_left_out_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    damaged = {f"{name}/{n}.png": b"" for name in ("cat", "dog") for n in range(20, 24)}
    _write(tmp_path / "raw", _files() | damaged)
    prepare(tmp_path, on_corrupt="skip")
    assert "left out 8 corrupt images: " in caplog.text
    assert " and 3 more" in caplog.text


@pytest.mark.parametrize("split", SPLITS)
def test_a_class_that_loses_all_its_images_is_named(tmp_path: Path, split: str) -> None:
    root = tmp_path / "root"
    files = _files("train/", "val/", "test/", per_class=2)
    _write(root / "raw", files | {f"{split}/dog/{number}.png": b"" for number in range(2)})
    _fails(root, f"split {split}: no image of class 'dog'", on_corrupt="skip")


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_source_of_damaged_images_alone_is_refused(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    root = tmp_path / "root"
    _write(root / "raw", dict.fromkeys(_files(), b"damaged"))
    match = "no image" if settings else "no image can be decoded"
    _fails(root, match, on_corrupt="skip", **settings)


# ---------------------------------------------------------------- archives that are not sound


HOSTILE = [
    "../x.png",
    "cat/../../x.png",
    "cat/../x.png",
    "/tmp/x.png",
    "cat\\x.png",
    "cat\\..\\x.png",
]


@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize("ending", [".tar.gz", ".zip"])
@pytest.mark.parametrize("name", HOSTILE)
def test_members_that_point_outside_are_refused(
    tmp_path: Path, name: str, ending: str, kind: str
) -> None:
    root = tmp_path / "root"
    root.mkdir()
    path = root / f"set{ending}"
    if kind == "folder":
        name = f"{name.removesuffix('.png')}/"
    content = _encoded(_noise()) if kind == "file" else b""
    if ending == ".zip":
        _write(path, _files() | {name: content})
    else:
        folder = {"type": tarfile.DIRTYPE} if kind == "folder" else {}
        _write_tar(path, _files(), _member(name, content, **folder))
    _fails(root, "member `.*` points outside of the archive", path.name)
    assert not Path("/tmp/x.png").exists()


LINKS: dict[str, dict[str, Any]] = {
    "symbolic link": {"type": tarfile.SYMTYPE, "linkname": "../../../secret.png"},
    "hard link": {"type": tarfile.LNKTYPE, "linkname": "/etc/passwd"},
    "hard link inside": {"type": tarfile.LNKTYPE, "linkname": "cat/0.png"},
    "character device": {"type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 5},
    "block device": {"type": tarfile.BLKTYPE},
    "pipe": {"type": tarfile.FIFOTYPE},
}


@pytest.mark.parametrize("kind", LINKS)
def test_members_that_are_no_files_are_passed_over(tmp_path: Path, kind: str) -> None:
    (tmp_path / "secret.png").write_bytes(_encoded(_noise(seed=99)))
    root = tmp_path / "a" / "b"
    root.mkdir(parents=True)
    _write(root / "set.tar", _files())
    expected = prepare(root, "set.tar").meta
    _write_tar(root / "set.tar", _files(), _member("cat/10.png", **LINKS[kind]))
    before = _tree(tmp_path)
    assert prepare(root, "set.tar").meta == expected
    assert _tree(tmp_path) == before


def test_a_member_behind_a_link_is_written_nowhere(tmp_path: Path) -> None:
    root = tmp_path / "root"
    outside = tmp_path / "outside"
    root.mkdir()
    outside.mkdir()
    link = _member("cat/out", type=tarfile.SYMTYPE, linkname=str(outside))
    behind = _member("cat/out/x.png", _encoded(_noise(seed=99)))
    _write_tar(root / "set.tar", _files(), link, behind)
    assert sum(_sizes(prepare(root, "set.tar")).values()) == len(_files()) + 1
    assert list(outside.iterdir()) == []


@pytest.mark.parametrize("ending", [".tar.gz", ".zip"])
def test_members_over_the_limit_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    root = tmp_path / "root"
    root.mkdir()
    files = _files()
    _write(root / f"set{ending}", files)
    largest = max(map(len, files.values()))
    module = importlib.import_module("pbkd.data.folder")
    monkeypatch.setattr(module, "MAX_MEMBER_BYTES", largest)
    prepare(root, f"set{ending}")
    _remove(root / "prepared")
    monkeypatch.setattr(module, "MAX_MEMBER_BYTES", largest - 1)
    _fails(root, rf"png unpacks to {largest} bytes, at most {largest - 1} are read", f"set{ending}")


def test_a_header_that_promises_a_terabyte_is_refused_unread(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    info, _ = _member("cat/0.png", size=2**40)
    (root / "set.tar").write_bytes(info.tobuf() + bytes(4096))
    _fails(root, r"cat/0\.png unpacks to 1,099,511,627,776 bytes", "set.tar")


@pytest.mark.parametrize("ending", [".tar.gz", ".tar.xz", ".zip"])
def test_archives_that_unpack_to_absurd_sizes_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    root = tmp_path / "root"
    root.mkdir()
    black = _encoded(Image.new("RGB", (64, 64)), "BMP")
    files = {f"{own}/{number}.bmp": black for own in ("cat", "dog") for number in range(8)}
    _write(root / f"set{ending}", files)
    prepare(root, f"set{ending}")
    _remove(root / "prepared")
    module = importlib.import_module("pbkd.data.folder")
    monkeypatch.setattr(module, "MAX_RATIO", 4)
    prepare(root, f"set{ending}")  # too small to count
    _remove(root / "prepared")
    monkeypatch.setattr(module, "_RATIO_COUNTS_FROM", 100_000)
    _fails(root, "bytes unpack to more than 4 times as many", f"set{ending}")


def _end_of_data(whole: bytes) -> int:
    """Where the last member of a tar ends."""
    with tarfile.open(fileobj=io.BytesIO(whole)) as archive:
        last = archive.getmembers()[-1]
    return last.offset_data + last.size


@pytest.mark.parametrize("ending", [".tar", ".tar.gz", ".tar.bz2", ".tar.xz", ".zip"])
def test_a_truncated_archive_is_refused_wherever_it_ends(tmp_path: Path, ending: str) -> None:
    """A tar that ends between two members, or in a header, looks whole to tarfile."""
    path = tmp_path / f"set{ending}"
    _write(path, _files("train/", "test/", per_class=2))
    whole = path.read_bytes()
    end = _end_of_data(whole) if ending == ".tar" else len(whole)
    for kept in {*range(0, end, end // 40), *range(0, end, 512), end - 1}:
        path.write_bytes(whole[:kept])
        with pytest.raises(DataError, match=r"set\.\S+ is not a whole archive \(.*copy it again"):
            prepare(tmp_path, path.name)
        assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("ending", [".tar", ".tar.gz", ".tar.xz", ".zip"])
def test_a_damaged_archive_is_never_half_read(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"set{ending}"
    files = _files(per_class=4)
    _write(path, files)
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for position in rng.integers(0, len(whole), 60).tolist():
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x10]) + whole[position + 1 :])
        try:
            prepared = prepare(tmp_path, path.name)
        except DataError:
            refused += 1
        else:
            assert sum(_sizes(prepared).values()) == len(files), position
    assert refused > 20


def test_a_changed_bit_in_a_packed_image_without_checksum_is_found(tmp_path: Path) -> None:
    """By the checksum of the archive."""
    root = tmp_path / "root"
    root.mkdir()
    path = root / "set.tar.gz"
    files = {f"{n}.bmp": _encoded(_noise(seed=n), "BMP") for n in range(8)}
    files = {f"{own}/{name}": c for own in ("cat", "dog") for name, c in files.items()}
    _write(path, files)
    prepare(root, path.name)
    _remove(root / "prepared")
    whole = path.read_bytes()
    path.write_bytes(whole[:-8] + bytes([whole[-8] ^ 1]) + whole[-7:])
    _fails(root, r"is not a whole archive \(CRC check failed", path.name)


def _patched(offset: int, value: int) -> Callable[[Path], None]:
    """Set a field in every entry of a zip's central directory."""

    def patch(path: Path) -> None:
        content = bytearray(path.read_bytes())
        position = content.find(b"PK\x01\x02")
        while position >= 0:
            content[position + offset] = value
            position = content.find(b"PK\x01\x02", position + 1)
        path.write_bytes(content)

    return patch


UNREADABLE = {
    "password": (_patched(8, 1), "cannot be read: .*password required.*make the archive anew"),
    "compression": (_patched(10, 97), "cannot be read: .*compression.*make the archive anew"),
    "size": (_patched(24, 9), "is not a whole archive"),
    "checksum": (_patched(16, 9), "is not a whole archive"),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_a_zip_that_cannot_be_read_is_refused(tmp_path: Path, kind: str) -> None:
    root = tmp_path / "root"
    root.mkdir()
    _write(root / "set.zip", _files())
    patch, match = UNREADABLE[kind]
    patch(root / "set.zip")
    _fails(root, match, "set.zip")


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04", b"\x1f\x8b\x08", bytes(2000)])
@pytest.mark.parametrize("ending", [".tar", ".tar.gz", ".tar.xz", ".zip"])
def test_a_file_that_is_no_archive_is_refused(tmp_path: Path, ending: str, content: bytes) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / f"set{ending}").write_bytes(content)
    is_empty_tar = content == bytes(2000) and ending != ".zip"
    match = "no image found" if is_empty_tar else "is not a whole archive"
    _fails(root, match, f"set{ending}")


@pytest.mark.parametrize("ending", [".tar.gz", ".zip", ""])
def test_a_source_without_images_is_refused(tmp_path: Path, ending: str) -> None:
    root = tmp_path / "root"
    root.mkdir()
    _write(root / f"set{ending}", {"cat/1.txt": b"", ".cat/1.png": b"", "__MACOSX/a/1.png": b""})
    _fails(root, "no image found; expected split/class/image", f"set{ending}")


@pytest.mark.parametrize("name", ["set.rar", "set.png", "set.7z", "set"])
def test_a_file_of_another_kind_is_refused(tmp_path: Path, name: str) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / name).write_bytes(_encoded(_noise()))
    _fails(root, rf"prepare\.path: \S+/{name} is neither a folder nor a \.tar\.gz or \.zip", name)


@pytest.mark.parametrize("name", ["set", "set.zip", "a/b.tar.gz"])
def test_a_path_where_nothing_is_is_refused(tmp_path: Path, name: str) -> None:
    root = tmp_path / "root"
    root.mkdir()
    _fails(root, rf"prepare\.path: \S+/{name} does not exist; expected a folder", name)
