"""The figures of what can stand in each block, and of the rest of the network."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from pbkd.blocks import BlockFacts, Discovery, build_candidate
from pbkd.config import CandidateConfig
from pbkd.errors import ArtifactError
from pbkd.models import Classifier
from pbkd.students.latency_table import OWN, LatencyTable
from pbkd.students.select import BlockOptions, Figures, Option

_PADDING = 8
"""The header of a file of safetensors is filled up to a multiple of 8."""


@dataclass(frozen=True)
class Subject:
    """A network as selection sees it.

    Attributes:
        blocks: what can stand in each block.
        rest: figures of the network without these blocks.
    """

    blocks: tuple[BlockOptions, ...]
    rest: Figures

    @classmethod
    def of(
        cls,
        teacher: Classifier,
        discovery: Discovery,
        damages: Mapping[tuple[str, str], float | None] | None = None,
        latency: LatencyTable | None = None,
    ) -> Subject:
        """Gather the figures; bytes come from the structures themselves, built once more.

        Args:
            damages: (block path, candidate name) to its damage, nats, None where it is not finite;
                without them no candidate is trained, and all count as harmless.

        Raises:
            ArtifactError: a candidate was not trained.
        """
        sizes = _Sizes(teacher)
        blocks = tuple(
            _options(sizes, teacher.net.get_submodule(facts.path), facts, damages, latency)
            for facts in discovery.blocks
        )
        own = [block.own for block in blocks]
        rest = Figures(
            parameters=discovery.num_parameters - sum(figures.parameters for figures in own),
            macs=discovery.macs - sum(figures.macs for figures in own),
            bytes=sizes.file_bytes - sum(figures.bytes for figures in own),
            latency_ms=latency.rest_ms if latency is not None else None,
        )
        return cls(blocks, rest)


def _options(
    sizes: _Sizes,
    module: nn.Module,
    facts: BlockFacts,
    damages: Mapping[tuple[str, str], float | None] | None,
    latency: LatencyTable | None,
) -> BlockOptions:
    times = latency.blocks[facts.path] if latency is not None else {}
    own = Figures(
        parameters=facts.num_parameters,
        macs=facts.macs,
        bytes=sizes.of_own(facts.path, module),
        latency_ms=times.get(OWN),
    )
    candidates = [
        Option(
            config=candidate.config,
            name=candidate.name,
            damage_kl=_damage(damages, facts.path, candidate.name),
            figures=Figures(
                parameters=candidate.num_parameters,
                macs=candidate.macs,
                bytes=sizes.of_candidate(facts.path, module, candidate.config),
                latency_ms=times.get(candidate.name),
            ),
        )
        for candidate in facts.candidates
    ]
    return BlockOptions(block=facts.path, own=own, candidates=tuple(candidates))


def _damage(
    damages: Mapping[tuple[str, str], float | None] | None, block: str, candidate: str
) -> float | None:
    if damages is None:
        return 0.0
    if (block, candidate) not in damages:
        raise ArtifactError(f"{block}/{candidate} was not trained; run: pbkd distill")
    return damages[block, candidate]


class _Sizes:
    """Bytes in the file of weights: a tensor's data, and its entry in the header.

    An entry names the tensor's place in the file, so that its length depends on what stands before
    it by a few digits. Candidates are counted with as many digits as there can be: a student's file
    is never larger than predicted, and smaller by a part of its header only.
    """

    def __init__(self, teacher: Classifier) -> None:
        file = _serialised(dict(teacher.state_dict()))
        self.file_bytes = len(file)
        self._entries = _entries(file)
        self._digits = len(str(self.file_bytes))

    def of_own(self, path: str, module: nn.Module) -> int:
        """Bytes of the teacher's own module."""
        names = [f"net.{path}.{name}" for name in module.state_dict()]
        return sum(
            _num_bytes(self._entries[name]) + _entry_length(name, self._entries[name])
            for name in names
        )

    def of_candidate(self, path: str, module: nn.Module, config: CandidateConfig) -> int:
        """Bytes of a candidate for it."""
        with torch.random.fork_rng(devices=[]):
            state = build_candidate(config, module).state_dict()
        entries = _entries(_serialised({f"net.{path}.{name}": t for name, t in state.items()}))
        widest = 10**self._digits - 1
        return _PADDING + sum(
            _num_bytes(entry) + _entry_length(name, {**entry, "data_offsets": [widest, widest]})
            for name, entry in entries.items()
        )


def _serialised(state: dict[str, Tensor]) -> bytes:
    # safetensors refuses tensors that share memory, hence the clones
    return save({name: t.detach().cpu().contiguous().clone() for name, t in state.items()})


def _entries(file: bytes) -> dict[str, dict[str, Any]]:
    """The header of safetensors: a name to dtype, shape and place."""
    length = int.from_bytes(file[:8], "little")
    entries: dict[str, dict[str, Any]] = json.loads(file[8 : 8 + length])
    return entries


def _num_bytes(entry: dict[str, Any]) -> int:
    begin, end = entry["data_offsets"]
    return int(end - begin)


def _entry_length(name: str, entry: dict[str, Any]) -> int:
    return len(json.dumps({name: entry}, separators=(",", ":"), ensure_ascii=False).encode()) - 1
