"""`pbkd pack` and `pbkd unpack`: a model's folder to one small file, and back.

No network is built for it, so none of the user's own is imported.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pbkd.artifacts import atomic_dir, atomic_path, load_tensors, save_tensors, write_json
from pbkd.errors import ArtifactError
from pbkd.exporting import check_free
from pbkd.loading import PACKED, find_folder
from pbkd.models import model_digest, read_card
from pbkd.models.checkpoint import CARD, WEIGHTS
from pbkd.shrink.container import pack_state
from pbkd.shrink.state import load_grids, save_grids
from pbkd.shrink.unpacking import read_packed


@dataclass(frozen=True)
class Packed:
    """What packing gave.

    Attributes:
        path: of the file.
        size_bytes: of the file.
        weights_bytes: of ``model.safetensors``.
        num_numbers: in all tensors.
    """

    path: Path
    size_bytes: int
    weights_bytes: int
    num_numbers: int


def pack_folder(source: str | Path, path: Path) -> Packed:
    """Write a model's folder, or a student of the workspace here, as a `.pbkd` file.

    Raises:
        ArtifactError: there is no model, it is damaged, or the file would not be named `.pbkd`.
        MissingExtraError: constriction is not installed.
    """
    if path.suffix != PACKED:
        raise ArtifactError(f"--output: got {path}, expected a name that ends in {PACKED}")
    folder = find_folder(source, allow_code=False)
    card, state = read_card(folder), load_tensors(folder / WEIGHTS)
    if model_digest(card, state) != card.digest:
        raise ArtifactError(
            f"{folder}: {WEIGHTS} and {CARD} do not belong together, or one was changed; run the "
            "stage that writes them again"
        )
    data = pack_state(card, state, load_grids(folder))
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)
    return Packed(
        path=path,
        size_bytes=len(data),
        weights_bytes=(folder / WEIGHTS).stat().st_size,
        num_numbers=sum(tensor.numel() for tensor in state.values()),
    )


def unpack_file(path: Path, folder: Path) -> None:
    """Write a `.pbkd` file as a folder with ``model.json`` and ``model.safetensors``.

    Packed again, it gives the same bytes.

    Raises:
        ArtifactError: the file is missing or damaged, or the folder is not empty.
        MissingExtraError: constriction is not installed.
    """
    check_free(folder)
    packed = read_packed(path)
    tensors, grids = packed.unpack()
    with atomic_dir(folder.absolute()) as temporary:
        save_tensors(temporary / WEIGHTS, tensors)
        save_grids(temporary, grids)
        write_json(temporary / CARD, packed.card)
