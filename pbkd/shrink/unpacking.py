"""A `.pbkd` file as a model: the network is built, compared with the file, and filled.

It is first built without memory, so that a small file cannot ask for much: what is built has to be
what the file holds, and what it is made from has a limit.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import nn

from pbkd.config import CustomConfig
from pbkd.errors import ArtifactError, PbkdError, TeacherError
from pbkd.models import Classifier, build_network, fill
from pbkd.shrink.container import PackedFile, open_packed
from pbkd.shrink.header import MAX_DECODED_BYTES
from pbkd.shrink.state import Shrunk
from pbkd.students.assemble import build_model

_MAX_EDITS = 64


def read_packed(path: Path) -> PackedFile:
    """Open a file; ArtifactError where it is missing, damaged or absurdly large."""
    try:
        size = path.stat().st_size
        if size > MAX_DECODED_BYTES:
            raise ArtifactError(f"{path} has {size} bytes, at most {MAX_DECODED_BYTES} can be")
        data = path.read_bytes()
    except FileNotFoundError:
        raise ArtifactError(f"{path} is missing; expected a file of `pbkd pack`") from None
    return open_packed(data, str(path))


def load_packed(
    packed: PackedFile, model: nn.Module | None = None, *, allow_code: bool = False
) -> Shrunk:
    """A ready student on the CPU, in evaluation mode.

    Args:
        model: the teacher's network, or a ``Classifier`` of it, where the card names a network of
            the user's own; it is copied. Replacements and edits are made in the copy.
        allow_code: whether functions of the user's own may be imported instead, and those that
            build candidates.

    Raises:
        ArtifactError: the file is damaged, or of another network.
        TeacherError, CandidateError: the network or a candidate is the user's own, and neither
            ``model`` nor ``allow_code`` is given.
        MissingExtraError: constriction is not installed.
    """
    name = packed.card.network.name
    if model is None and ":" in name and not allow_code:
        raise TeacherError(
            f"{packed.what}: network `{name}` is built by code that is not pbkd's; give the "
            "network, pbkd.load(path, model=...), or, if you trust it, pass allow_code=True"
        )
    try:
        built = _built(packed, model, allow_code)
    except PbkdError:
        raise
    except Exception as error:  # whatever PyTorch says to sizes that cannot be
        raise ArtifactError(
            f"{packed.what}: network `{name}` cannot be built as its card says: "
            f"{type(error).__name__}: {error}; pack the model again"
        ) from error
    packed.check_fits(built.state_dict())
    tensors, grids = packed.unpack()
    fill(built, tensors, packed.card, packed.what)
    return Shrunk(built.eval(), packed.card, grids)


def _built(packed: PackedFile, model: nn.Module | None, allow_code: bool) -> Classifier:
    card, net = packed.card, None
    if model is not None:
        net = copy.deepcopy(model.net if isinstance(model, Classifier) else model).cpu()
    is_own = (net is None and ":" in card.network.name) or any(
        isinstance(config, CustomConfig) for config in card.replacements.values()
    )
    if not is_own:  # else the caller trusts the code that says how large it is
        _check_sizes(packed, net)
    return build_model(card, net, allow_code=allow_code)


def _check_sizes(packed: PackedFile, net: nn.Module | None) -> None:
    """Build it without memory, step by step: the teacher, its replacements, each edit.

    Raises:
        ArtifactError: a step takes too much, or what comes out is not what the file holds.
    """
    card = packed.card
    if len(card.edits) > _MAX_EDITS:
        raise ArtifactError(
            f"{packed.what} has {len(card.edits)} edits, at most {_MAX_EDITS} can be; pack the "
            "model again"
        )
    bare = _without_memory(packed) if net is None else copy.deepcopy(net).to("meta")
    steps = [card.model_copy(update={"replacements": {}, "edits": ()})]
    steps += [card.model_copy(update={"edits": card.edits[:n]}) for n in range(len(card.edits) + 1)]
    for step in steps:
        with torch.device("meta"):
            state = build_model(step, copy.deepcopy(bare)).state_dict()
        size_bytes = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
        if size_bytes > MAX_DECODED_BYTES:
            raise ArtifactError(
                f"{packed.what}: network `{card.network.name}` takes {size_bytes} bytes, at most "
                f"{MAX_DECODED_BYTES} can be; pack the model again"
            )
    packed.check_fits(state)


def _without_memory(packed: PackedFile) -> nn.Module:
    """The card's network on the device that holds no numbers."""
    spec = packed.card.network
    try:
        with torch.device("meta"):
            return build_network(spec)
    except NotImplementedError:  # a few of torchvision's calculate while they are built
        sizes = {size for entry in packed.header.plan.tensors for size in entry.shape}
        if spec.num_classes not in sizes:
            raise ArtifactError(
                f"{packed.what}: no tensor has {spec.num_classes} rows, as many as there are "
                "classes; pack the model again"
            ) from None
        return build_network(spec).to("meta")
