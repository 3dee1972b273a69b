"""A `.pbkd` file as a model: the network is built, compared with the file, and filled.

A network of pbkd or torchvision is first built without memory, so that a small file cannot ask for
much: what is built has to be what the file holds, and its teacher has a limit.
"""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pbkd.errors import ArtifactError, PbkdError, TeacherError
from pbkd.models import Classifier, fill
from pbkd.shrink.container import PackedFile, open_packed
from pbkd.shrink.header import MAX_DECODED_BYTES
from pbkd.shrink.state import Shrunk
from pbkd.students.assemble import build_model


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
    if model is not None:
        net = copy.deepcopy(model.net if isinstance(model, Classifier) else model).cpu()
        return build_model(packed.card, net, allow_code=allow_code)
    if ":" in packed.card.network.name:
        return build_model(packed.card, allow_code=allow_code)
    # a few of torchvision's cannot be built without memory
    with contextlib.suppress(NotImplementedError), torch.device("meta"), _Limit(packed.what):
        packed.check_fits(build_model(packed.card, allow_code=allow_code).state_dict())
    with _Limit(packed.what):
        return build_model(packed.card, allow_code=allow_code)


class _Limit(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what is made from nothing, and raises ArtifactError when it is too much."""

    def __init__(self, what: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._what = what
        self._left_bytes = MAX_DECODED_BYTES

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor) and not any(isinstance(arg, Tensor) for arg in args):
            self._left_bytes -= made.numel() * made.element_size()
            if self._left_bytes < 0:
                raise ArtifactError(
                    f"{self._what}: its network takes more than {MAX_DECODED_BYTES} bytes, at most "
                    "that can be; it is damaged, pack the model again"
                )
        return made
