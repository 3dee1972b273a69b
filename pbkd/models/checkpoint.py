"""A model as two files: ``model.json`` says how to build it, ``model.safetensors`` holds weights.

Nothing is unpickled. The card lists the candidates that stand in for the teacher's blocks; putting
them in is the matter of ``pbkd.students.assemble``, one layer up.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor, nn

from pbkd.artifacts import (
    digest_of,
    load_tensors,
    read_json,
    save_tensors,
    tensors_digest,
    write_json,
)
from pbkd.config import AugmentConfig, CandidateConfig, Edit
from pbkd.errors import ArtifactError
from pbkd.models.zoo import Classifier, NetworkSpec, build_network

WEIGHTS = "model.safetensors"
CARD = "model.json"


class ModelCard(BaseModel):
    """What ``model.json`` says.

    Attributes:
        network: the teacher's architecture.
        mean, std: normalisation per channel, of pixels in [0, 1].
        image_size: height and width for which the model was made, pixels.
        augment: the changes under which it was trained; later stages train under the same.
        replacements: block path to the candidate that stands there; empty for a teacher.
        edits: how `shrink` changed the structure after that, in order.
        data_digest: of the prepared data.
        digest: of the weights and of everything above.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    network: NetworkSpec
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: tuple[int, int]
    class_names: tuple[str, ...]
    augment: AugmentConfig
    replacements: dict[str, CandidateConfig] = {}
    edits: tuple[Edit, ...] = ()
    data_digest: str
    digest: str = ""


def build_classifier(card: ModelCard, *, allow_code: bool = False) -> Classifier:
    """The teacher's architecture with fresh weights; replacements and edits are not put in.

    Args:
        allow_code: whether a network of the user's own may be imported; see ``build_network``.
    """
    return Classifier(build_network(card.network, allow_code=allow_code), card.mean, card.std)


def save_model(folder: Path, model: nn.Module, card: ModelCard) -> ModelCard:
    """Write weights, then the card with the digest of both; returns that card."""
    state = model.state_dict()
    card = card.model_copy(update={"digest": model_digest(card, state)})
    save_tensors(folder / WEIGHTS, state)
    write_json(folder / CARD, card)
    return card


def read_card(folder: Path) -> ModelCard:
    """Read ``model.json``; ArtifactError where it is missing or of another version."""
    try:
        return ModelCard.model_validate(read_json(folder / CARD))
    except ValidationError as error:
        raise ArtifactError(
            f"{folder / CARD} is not a model card of this version: {error}"
        ) from None


def load_weights(folder: Path, model: nn.Module, card: ModelCard) -> None:
    """Fill a built model with the folder's weights.

    Raises:
        ArtifactError: truncated, changed, or of another architecture.
    """
    state = load_tensors(folder / WEIGHTS)
    if model_digest(card, state) != card.digest:
        raise ArtifactError(
            f"{folder}: {WEIGHTS} and {CARD} do not belong together, or one was changed; run the "
            "stage that writes them again"
        )
    fill(model, state, card, str(folder / WEIGHTS))


def fill(model: nn.Module, state: dict[str, Tensor], card: ModelCard, what: str) -> None:
    """Give a built model its weights; ``what`` names where they come from.

    Raises:
        ArtifactError: they are those of another architecture.
    """
    own = model.state_dict()
    try:
        if missing := own.keys() - state.keys():
            raise RuntimeError(f"missing {min(missing)}")
        own.update(state)  # unlike a plain dict, it has the modules' versions, which some ask for
        model.load_state_dict(own)
    except RuntimeError as error:
        raise ArtifactError(f"{what} does not fit network `{card.network.name}`: {error}") from None


def load_teacher(folder: Path, *, allow_code: bool = False) -> tuple[Classifier, ModelCard]:
    """A teacher in evaluation mode, its parameters frozen, and its card."""
    card = read_card(folder)
    teacher = build_classifier(card, allow_code=allow_code)
    load_weights(folder, teacher, card)
    return teacher.eval().requires_grad_(False), card


def model_digest(card: ModelCard, state: dict[str, Tensor]) -> str:
    """The card's digest, of the weights and of the card without its digest."""
    described = card.model_dump(mode="json", exclude={"digest"})
    if not card.edits:
        del described["edits"]  # models of earlier versions have none in their digest
    return digest_of({"weights": tensors_digest(state), "card": described})
