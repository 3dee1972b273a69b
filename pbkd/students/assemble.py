"""Stitch candidates into a network, and load stitched models from their files."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from pbkd.blocks import build_candidate, swap
from pbkd.config import CandidateConfig, CustomConfig
from pbkd.errors import CandidateError
from pbkd.models import Classifier, ModelCard, build_classifier, load_weights, read_card
from pbkd.students.edits import apply_edits


def stitch(
    teacher: Classifier,
    replacements: Mapping[str, CandidateConfig],
    weights: Mapping[str, dict[str, Tensor]],
) -> Classifier:
    """A copy of the teacher with trained candidates in place of some blocks.

    Args:
        replacements: block path to candidate.
        weights: block path to the candidate's state dict.

    Raises:
        CandidateError: a candidate is not settled (see ``find_blocks``), or its code has changed.
    """
    student = copy.deepcopy(teacher).requires_grad_(True)
    modules = _build(student.net, replacements)
    for path, module in modules.items():
        module.load_state_dict(weights[path])
    swap(student.net, modules)
    return student


def load_model(folder: Path, *, allow_code: bool = False) -> tuple[Classifier, ModelCard]:
    """A teacher or student from ``model.json`` and ``model.safetensors``, in evaluation mode.

    Takes (N, C, H, W) float32 in [0, 1]; no code is executed that the files bring.

    Args:
        allow_code: whether the functions that build a network or candidates of the user's own may
            be imported.

    Raises:
        ArtifactError: a file is missing, truncated or of another architecture.
        TeacherError: the network is the user's own, and ``allow_code`` is not set.
        CandidateError: a candidate is the user's own, and ``allow_code`` is not set or the code has
            changed.
        ConfigError: the code of a user's own candidate is missing or faulty.
    """
    card = read_card(folder)
    model = build_model(card, allow_code=allow_code)
    load_weights(folder, model, card)
    return model.eval(), card


def build_model(
    card: ModelCard, net: nn.Module | None = None, *, allow_code: bool = False
) -> Classifier:
    """A teacher's or student's structure as its card says, with fresh weights.

    Takes (N, C, H, W) float32 in [0, 1].

    Args:
        net: the teacher's network, instead of the one that the card names; it is changed in place.
        allow_code: whether the functions that build a network or candidates of the user's own may
            be imported.

    Raises:
        ArtifactError: the card's edits belong to another network.
        TeacherError: the network is the user's own, and ``allow_code`` is not set.
        CandidateError: a candidate is the user's own, and ``allow_code`` is not set or the code has
            changed.
        ConfigError: the code of a user's own candidate is missing or faulty.
    """
    if not allow_code:
        _refuse_code(card)
    if net is None:
        model = build_classifier(card, allow_code=allow_code)
    else:
        model = Classifier(net, card.mean, card.std)
    swap(model.net, _build(model.net, card.replacements))
    apply_edits(model.net, card.edits)
    return model


def _refuse_code(card: ModelCard) -> None:
    for path, config in card.replacements.items():
        if isinstance(config, CustomConfig):
            raise CandidateError(
                f"block {path}: candidate `{config.kind}` is built by code that is not pbkd's; if "
                "you trust it, pass allow_code=True"
            )


def _build(net: nn.Module, replacements: Mapping[str, CandidateConfig]) -> dict[str, nn.Module]:
    modules = {}
    for path, config in replacements.items():
        try:
            module = build_candidate(config, net.get_submodule(path))
        except CandidateError as error:
            raise CandidateError(f"block {path}: {error}") from error
        modules[path] = module.requires_grad_(True)
    return modules
