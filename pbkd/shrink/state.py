"""A student on its way through the recipe, and its folder."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from pbkd.artifacts import load_tensors, read_json, save_tensors, write_json
from pbkd.models import Classifier, ModelCard, save_model
from pbkd.shrink.grids import Codebook, Grid, Quantized
from pbkd.students import load_model

GRIDS = "grids.safetensors"
_BITS = "grids.json"


@dataclass(frozen=True)
class Shrunk:
    """A student, how it is built again, and where its values lie.

    Attributes:
        model: in evaluation mode; float32. Its weights that are exactly 0 stay so.
        card: with all edits so far; its digest is that of the saved model.
        grids: name in the model's state dict to the values that this tensor takes.
    """

    model: Classifier
    card: ModelCard
    grids: dict[str, Quantized] = field(default_factory=dict)

    def save(self, folder: Path) -> Shrunk:
        """Write the model and its grids; returns it with the card that was written."""
        card = save_model(folder, self.model, self.card)
        save_grids(folder, self.grids)
        return replace(self, card=card)

    @classmethod
    def load(cls, folder: Path, *, allow_code: bool = False) -> Shrunk:
        """Read what ``save`` wrote, or any model without grids; errors as ``load_model``."""
        model, card = load_model(folder, allow_code=allow_code)
        return cls(model, card, load_grids(folder))


def save_grids(folder: Path, grids: dict[str, Quantized]) -> None:
    """Write the grids of a model's folder; nothing where there are none."""
    if not grids:
        return
    tables = {n: grid.steps if isinstance(grid, Grid) else grid.levels for n, grid in grids.items()}
    save_tensors(folder / GRIDS, tables)
    bits = {name: grid.bits if isinstance(grid, Grid) else None for name, grid in grids.items()}
    write_json(folder / _BITS, bits)


def load_grids(folder: Path) -> dict[str, Quantized]:
    """Read what ``save_grids`` wrote."""
    grids: dict[str, Quantized] = {}
    if (folder / GRIDS).is_file():
        bits = read_json(folder / _BITS)
        for name, table in load_tensors(folder / GRIDS).items():
            grids[name] = Codebook(table) if bits[name] is None else Grid(table, bits[name])
    return grids
