"""What the jobs of a student have in common: plain values, and where the files lie."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from pbkd.config import FinetuneConfig
from pbkd.data import Prepared, Stream
from pbkd.devices import best_device
from pbkd.models import ModelCard

FINETUNED = "finetuned"
"""Kind of the store's items."""
RESULT = "finetune.json"
HISTORY = "history.jsonl"


class StudentJob(BaseModel):
    """A training of one student; paths are absolute.

    Attributes:
        key: of the item that it puts into the store.
        progress: folder for the history that grows.
        checkpoint: file to go on from.
    """

    model_config = ConfigDict(frozen=True)

    key: str
    teacher: Path
    prepared: Path
    config: FinetuneConfig
    seed: int
    store: Path
    progress: Path
    checkpoint: Path

    @property
    def heartbeat(self) -> Path:
        """A file that the job touches while it is alive."""
        return self.progress / f"{self.key}.alive"

    @property
    def history(self) -> Path:
        """JSON lines that grow epoch by epoch."""
        return self.progress / f"{self.key}.jsonl"

    def streams(
        self, card: ModelCard, prepared: Prepared, views: int | None = None
    ) -> tuple[Stream, Stream]:
        """Training and validation images on this process's device; ``views``: see ``Stream``."""
        train, val = (
            Stream(
                prepared.split(name),
                seed=self.seed,
                augment=card.augment,
                views=views,
                device=best_device(),
            )
            for name in ("train", "val")
        )
        return train, val


class FinetuneJob(StudentJob):
    """One fine-tuning.

    Attributes:
        names: the students that it makes; several where equal models were stitched.
        student: a folder of the stage `stitch`.
        labels: keys of the store's items with the teacher's labels of view 0, 1, ...; none where
            the teacher itself is asked.
        board: name of the board of elastic teachers; empty: all labels are in the store.
        address, auth_mode: of their cluster.
        deadline_s: how long no label may come.
    """

    names: tuple[str, ...]
    student: Path
    labels: tuple[str, ...] = ()
    board: str = ""
    address: str = ""
    auth_mode: str = ""
    deadline_s: float = 0.0
