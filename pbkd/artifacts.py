"""Files that are whole or absent: atomic writes, digests, the workspace's paths and the store.

Every writer writes to a temporary name and renames. An item of the store is a folder that appears
under its key in one rename, so whatever is there is complete.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import json
import os
import re
import shutil
import socket
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import DTypeLike
from pydantic import BaseModel

from pbkd.errors import DISK_FULL_ADVICE, ArtifactError

if TYPE_CHECKING:  # it takes seconds to load, and many that read and write files need no tensor
    import torch

MARKER = "item.json"


# ---------------------------------------------------------------- digests


FILE_HASH = "sha256"
"""Twice as fast as others where the processor has instructions for it; caches are large."""


def digest_of(value: Any) -> str:
    """128-bit hex digest of a JSON-like value; mappings count without their order."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=_jsonable)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def file_digest(path: Path) -> str:
    """Hex digest of a file's content, by ``FILE_HASH``."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, FILE_HASH).hexdigest()


def tensors_digest(tensors: dict[str, torch.Tensor]) -> str:
    """128-bit hex digest of named tensors: names, dtypes, shapes and bytes."""
    import torch

    hasher = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        hasher.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        hasher.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return hasher.hexdigest()


# ---------------------------------------------------------------- whole files


def check_free_space(folder: Path, size_bytes: int, what: str) -> None:
    """Raise ArtifactError if the disk of a folder has no room for so many bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if size_bytes > free:
        raise ArtifactError(
            f"{what} takes {size_bytes / 1e9:.2f} GB, {folder} has {free / 1e9:.2f} GB free; "
            f"{DISK_FULL_ADVICE}"
        )


def temporary_path(path: Path) -> Path:
    """A name beside ``path`` that no other writer uses at the same time."""
    writer = f"{socket.gethostname()}-{os.getpid()}-{threading.get_ident()}"
    return path.with_name(f".{path.name}.{writer}.tmp")


def sweep(folder: Path) -> None:
    """Remove a folder's temporary files and folders whose writers were killed on this host."""
    name = re.compile(rf".*\.{re.escape(socket.gethostname())}-(\d+)-\d+\.tmp")
    for path in list(folder.glob(".*.tmp")):
        found = name.fullmatch(path.name)
        if found is None or _is_alive(int(found[1])):
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; rename it on success, remove it on failure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(path)
    try:
        yield temporary
        temporary.replace(path)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        else:
            temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write JSON (pydantic models too) with a final newline, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, default=_jsonable) + "\n")


def read_json(path: Path) -> Any:
    """Read JSON; ArtifactError where the file is missing or not JSON."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise ArtifactError(f"{path} is missing; run the stage that writes it") from None
    except ValueError as error:
        raise ArtifactError(f"{path} is not JSON ({error}); delete it and run again") from None


def save_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write tensors as safetensors, whole or not at all; shared memory is written out twice."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    whole = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    with atomic_path(path) as temporary:
        try:
            save_file(whole, temporary)
        except SafetensorError as error:  # it hides the system's error in its text
            if found := re.search(r"os error (\d+)|code: (\d+)", str(error)):
                number = int(found[1] or found[2])
                raise OSError(number, os.strerror(number), str(path)) from error
            raise


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read safetensors; ArtifactError where the file is missing, truncated or something else."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise ArtifactError(f"{path} is missing; run the stage that writes it")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise ArtifactError(
            f"{path} is not a whole safetensors file ({error}); delete it"
        ) from None


def save_checkpoint(path: Path, content: Any) -> None:
    """Write tensors and plain values, whole or not at all; OSError where the disk is full."""
    import torch

    buffer = io.BytesIO()
    torch.save(content, buffer)  # into a file, it would hide why it fails
    with atomic_path(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def load_checkpoint(path: Path) -> Any:
    """Read it again, on the CPU; executes no code.

    Raises:
        Exception: of any kind: a damaged file makes torch raise whatever comes up.
    """
    import torch

    with zipfile.ZipFile(path) as archive:
        if damaged := archive.testzip():  # torch compares no checksum
            raise ArtifactError(f"the checksum of its {damaged} differs")
    return torch.load(path, map_location="cpu", weights_only=True)


def new_array(path: Path, dtype: DTypeLike, shape: tuple[int, ...]) -> np.memmap[Any, Any]:
    """An array in a new .npy file, mapped into memory; OSError where the disk is full."""
    array = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    with path.open("r+b") as file:  # a disk that fills up later ends a mapping by SIGBUS
        os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array


def _jsonable(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} is not JSON")


# ---------------------------------------------------------------- folders


@contextmanager
def atomic_dir(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that replaces ``path`` on success and vanishes on failure.

    A link stays, its target is replaced. The current folder stays, too: it is filled.
    """
    path = path.resolve()
    is_here = path.is_dir() and path.samefile(".")
    with _temporary_dir(path / "new" if is_here else path) as temporary:
        yield temporary
        if is_here:
            for entry in list(temporary.iterdir()):
                entry.replace(path / entry.name)
            return
        if path.exists():
            shutil.rmtree(path)
        temporary.replace(path)


@contextmanager
def _temporary_dir(path: Path) -> Iterator[Path]:
    """Yield a new folder beside ``path``; what is left of it in the end is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(path)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def link_tree(source: Path, target: Path) -> None:
    """Copy a folder by hard links (by bytes where the file system has none)."""
    target.mkdir(parents=True)
    for path in sorted(source.rglob("*")):  # copytree would hide the system's errors in its own
        copy = target / path.relative_to(source)
        if path.is_dir():
            copy.mkdir()
        else:
            _link(path, copy)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


@dataclass(frozen=True)
class Store:
    """Finished items under their keys, ``root/kind/key/``, each whole, with checksums."""

    root: Path

    def path(self, kind: str, key: str) -> Path:
        return self.root / kind / key

    def has(self, kind: str, key: str) -> bool:
        """Whether the item is there, with all files at their sizes (contents: ``verify``)."""
        return _is_whole(self.path(kind, key), key)

    def put(self, kind: str, key: str, write: Callable[[Path], None]) -> Path:
        """Let ``write`` fill a folder and publish it under its key; the first writer wins."""
        path = self.path(kind, key)
        if self.has(kind, key):
            return path
        with _temporary_dir(path) as temporary:
            write(temporary)
            write_marker(temporary, key)
            _publish(temporary, path, key)
        return path

    def adopt(self, kind: str, folder: Path) -> bool:
        """Import a whole item from a stage's old output; False where it is not whole."""
        try:
            key = str(read_json(folder / MARKER)["key"])
        except (ArtifactError, KeyError, TypeError):
            return False
        if self.has(kind, key):
            return True
        if not _is_whole(folder, key) or not _content_matches(folder):
            return False
        path = self.path(kind, key)
        with _temporary_dir(path) as temporary:
            shutil.rmtree(temporary)
            link_tree(folder, temporary)
            _publish(temporary, path, key)
        return True

    def verify(self, kind: str, key: str) -> None:
        """Compare every file with the marker's digests.

        Raises:
            ArtifactError: the damaged item; it is removed, so that a rerun makes it anew.
        """
        path = self.path(kind, key)
        if not self.has(kind, key) or not _content_matches(path):
            shutil.rmtree(path, ignore_errors=True)
            raise ArtifactError(f"{path} is damaged and was removed; run again to make it anew")


def write_marker(folder: Path, key: str) -> None:
    """Write the marker of a finished item, last: its key, and size and digest of each file."""
    files = {
        str(path.relative_to(folder)): {"size": path.stat().st_size, "digest": file_digest(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    write_json(folder / MARKER, {"key": key, "files": files})


def _publish(item: Path, path: Path, key: str) -> None:
    """Rename an item to its place; a whole one that is there stays, a broken one goes."""
    while not _is_whole(path, key):
        try:
            item.rename(path)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        _remove_broken(path, key)


def _remove_broken(path: Path, key: str) -> None:
    broken = temporary_path(path.with_name(f"{path.name}.broken"))
    with (path.parents[1] / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another writer may be putting a whole one here
        if path.exists() and not _is_whole(path, key):
            path.rename(broken)
    shutil.rmtree(broken, ignore_errors=True)


def _is_whole(folder: Path, key: str) -> bool:
    try:
        marker = read_json(folder / MARKER)
        return bool(marker["key"] == key) and all(
            (folder / name).stat().st_size == entry["size"]
            for name, entry in marker["files"].items()
        )
    except (ArtifactError, OSError, KeyError, TypeError):
        return False


def _content_matches(folder: Path) -> bool:
    marker = read_json(folder / MARKER)
    return all(
        file_digest(folder / name) == entry["digest"] for name, entry in marker["files"].items()
    )


# ---------------------------------------------------------------- the workspace


@dataclass(frozen=True)
class Workspace:
    """Paths of one workspace: ``root`` holds params.yaml and outputs, ``state`` outlives them."""

    root: Path
    state: Path

    @classmethod
    def find(cls, root: Path | None = None, state: Path | None = None) -> Workspace:
        """The workspace at ``root`` (default: here); its state lies in it, or at ``state``."""
        root = (root or Path.cwd()).resolve()
        return cls(root, (state or root / ".pbkd").resolve())

    def sweep(self) -> None:
        """Remove what killed processes left half-written."""
        outputs, state = self.root / "artifacts", self.state
        inner = [*outputs.glob("*/"), *state.glob("*/"), *state.glob("*/*/")]
        beside = {path.resolve().parent for path in (*inner, self.prepared)}  # of links' targets
        for folder in {outputs, self.results, state, *inner, *beside}:
            sweep(folder)

    @property
    def params(self) -> Path:
        return self.root / "params.yaml"

    @property
    def prepared(self) -> Path:
        return self.root / "data" / "prepared"

    @property
    def results(self) -> Path:
        return self.root / "results"

    @property
    def store(self) -> Store:
        return Store(self.state / "store")

    def checkpoint(self, stage: str, key: str) -> Path:
        """File from which a stage's training goes on; the key tells trainings apart."""
        return self.state / "checkpoints" / stage / f"{key}.pt"

    def artifacts(self, stage: str) -> Path:
        """Output folder of a stage."""
        return self.root / "artifacts" / stage
