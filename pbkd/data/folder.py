"""The source `image_folder`: a folder, or an archive that is read without being extracted.

Names out of an archive never reach the file system, so nothing can be written outside of a folder;
members are read one at a time, and their sizes are limited.
"""

from __future__ import annotations

import io
import logging
import lzma
import os
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pbkd.data.layout import EXTENSIONS, is_image, read_layout
from pbkd.data.sources import ImageSource, Opener
from pbkd.errors import DataError

_log = logging.getLogger(__name__)

_TAR_ENDINGS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
_FORMATS = tuple(set(EXTENSIONS.values()))
MAX_MEMBER_BYTES = 512 * 2**20
MAX_RATIO = 1000
_RATIO_COUNTS_FROM = 2**30  # a small archive may well be mostly zeros
_MAX_HEADER_BYTES = 2**20  # of a tar's long names and attributes, which tarfile reads at once
_HEADERS = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)
_ZIP_KINDS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # others unpack without a limit
_DAMAGED = (
    tarfile.TarError,
    zipfile.BadZipFile,
    EOFError,
    OSError,
    lzma.LZMAError,
    zlib.error,
)


def open_folder(path: Path) -> ImageSource:
    """The source at a path.

    Raises:
        DataError: nothing is there, it is no archive, or it holds no labelled images.
    """
    if path.is_dir():
        content = [entry for entry in path.iterdir() if not entry.name.startswith(".")]
        archives = [entry for entry in content if entry.is_file() and _is_archive(entry)]
        if len(archives) == 1 and not any(entry.is_dir() for entry in content):
            return open_folder(archives[0])
        return FolderSource(path)
    if not path.exists():
        raise DataError(
            f"prepare.path: {path} does not exist; expected a folder, .tar.gz or .zip of images"
        )
    if path.name.lower().endswith(_TAR_ENDINGS):
        return TarSource(path)
    if path.suffix.lower() == ".zip":
        return ZipSource(path)
    raise DataError(f"prepare.path: {path} is neither a folder nor a .tar.gz or .zip file")


def _is_archive(path: Path) -> bool:
    return path.name.lower().endswith((*_TAR_ENDINGS, ".zip"))


def _decode(content: bytes | Path) -> Image.Image:
    file = io.BytesIO(content) if isinstance(content, bytes) else content
    with Image.open(file, formats=_FORMATS) as image:
        image.load()
        return image


class FolderSource:
    """Images in a folder; links are followed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        files: list[str] = []
        folders: list[str] = []
        seen: set[str] = set()
        for here, below, names in os.walk(path, followlinks=True):
            real = os.path.realpath(here)
            if real in seen:  # a link to a folder above
                below.clear()
                continue
            seen.add(real)
            relative = Path(here).relative_to(path)
            folders += [(relative / name).as_posix() for name in below]
            files += [(relative / name).as_posix() for name in names]
        images = sorted(filter(is_image, files))
        self.listing = read_layout(images, folders, str(path))

    def images(self, wanted: NDArray[np.bool_]) -> Iterator[tuple[int, Opener]]:
        """Index and opener of each wanted image."""
        for index in np.flatnonzero(wanted).tolist():
            yield index, partial(_decode, self._path / self.listing.names[index])


class TarSource:
    """Images in a .tar, .tar.gz, .tar.bz2 or .tar.xz; read from beginning to end, twice."""

    def __init__(self, path: Path) -> None:
        self._path = path
        limits = _Limits(path)
        num_links = 0
        folders: list[str] = []
        found: dict[str, int] = {}  # of members with one name, the last counts, as for tar itself
        for number, (_, member) in enumerate(_members(path)):
            limits.count(member.name, member.size)
            if member.isdir():
                folders.append(_checked(member.name, path))
            elif member.isfile() and is_image(member.name):
                found[_checked(member.name, path)] = number
            elif is_image(member.name):
                num_links += 1
        if num_links:
            _log.warning("%s: left out %d links and devices; only files are read", path, num_links)
        names = sorted(found)  # as in a folder, so that the seed draws the same splits
        self._index = {found[name]: index for index, name in enumerate(names)}
        self.listing = read_layout(names, folders, str(path))

    def images(self, wanted: NDArray[np.bool_]) -> Iterator[tuple[int, Opener]]:
        """Index and opener of each wanted image."""
        for number, (archive, member) in enumerate(_members(self._path)):
            index = self._index.get(number)
            if index is None or not wanted[index]:
                continue
            file = archive.extractfile(member)
            assert file is not None
            with _readable(self._path):
                content = file.read()
            yield index, partial(_decode, content)


class _Strict(tarfile.TarInfo):
    """Headers of a tar, of which tarfile itself takes a damaged one for the archive's end.

    tarfile also reads a header's own data whole, whatever its size.
    """

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        member = super().frombuf(buf, encoding, errors)
        if member.type in _HEADERS and member.size > _MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"header: {member.size:,} bytes of names and attributes")
        return member

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> Self:
        try:
            return super().fromtarfile(tarfile_)
        except tarfile.HeaderError as error:
            if type(error).__name__ == "EOFHeaderError":  # the mark at the end
                raise
            raise tarfile.ReadError(f"header: {error}") from None


def _members(path: Path) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    with _readable(path), tarfile.open(path, "r:*", tarinfo=_Strict) as archive:
        for member in archive:
            yield archive, member
        assert archive.fileobj is not None
        while archive.fileobj.read(2**20):  # to the checksum of the compressed file
            pass


class ZipSource:
    """Images in a .zip."""

    def __init__(self, path: Path) -> None:
        self._path = path
        limits = _Limits(path)
        folders: list[str] = []
        found: dict[str, zipfile.ZipInfo] = {}
        with _readable(path), zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                if member.is_dir():
                    folders.append(_checked(member.filename, path))
                elif is_image(member.filename):
                    limits.count(member.filename, member.file_size)
                    if member.compress_type not in _ZIP_KINDS:
                        raise DataError(
                            f"{path} cannot be read: the compression of {member.filename} is not "
                            "deflate, zip's usual one; make the archive anew"
                        )
                    found[_checked(member.filename, path)] = member
        names = sorted(found)
        self._members = [found[name] for name in names]
        self.listing = read_layout(names, folders, str(path))

    def images(self, wanted: NDArray[np.bool_]) -> Iterator[tuple[int, Opener]]:
        """Index and opener of each wanted image."""
        with _readable(self._path), zipfile.ZipFile(self._path) as archive:
            for index in np.flatnonzero(wanted).tolist():
                member = self._members[index]
                with archive.open(member) as file:  # archive.read() would unpack more than it says
                    content = file.read(member.file_size)
                yield index, partial(_decode, content)


class _Limits:
    """Refuses archives that unpack to absurd sizes."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._packed = path.stat().st_size
        self._unpacked = 0

    def count(self, name: str, size_bytes: int) -> None:
        self._unpacked += size_bytes
        if size_bytes > MAX_MEMBER_BYTES:
            raise DataError(
                f"{self._path}: {name} unpacks to {size_bytes:,} bytes, at most "
                f"{MAX_MEMBER_BYTES:,} are read; is it an image?"
            )
        if self._unpacked > max(_RATIO_COUNTS_FROM, MAX_RATIO * self._packed):
            raise DataError(
                f"{self._path}: {self._packed:,} bytes unpack to more than {MAX_RATIO} times as "
                "many; this is no archive of images; give a folder instead"
            )


def _checked(name: str, path: Path) -> str:
    """A member's name without `./`, if it stays below the archive's own folder."""
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or "\\" in name:
        raise DataError(
            f"{path}: member `{name}` points outside of the archive; expected relative paths like "
            "train/cat/1.jpg; make the archive anew"
        )
    return str(pure)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except _DAMAGED as error:
        reason = str(error).partition(":\n")[0]  # tarfile lists what it tried
        raise DataError(
            f"{path} is not a whole archive ({reason}); copy it again, or give a folder"
        ) from error
    except RuntimeError as error:  # zipfile's for passwords and unknown compressions
        raise DataError(
            f"{path} cannot be read: {error}; make the archive anew, without a password"
        ) from error
