"""A model's card: what it is, where it comes from, its figures and limits, how to use it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from pbkd.measure import headline
from pbkd.models import ModelCard
from pbkd.tracking.versions import TEACHER, MachineLatency

_LONGEST = 5000  # MLflow's column for a version's description
_MAX_CLASSES = 20
_SHORT = 12  # digits of a digest
_UNITS = {"parameters": "parameters", "macs": "MACs", "bytes": "bytes", "latency": "ms"}


def model_card(
    name: str,
    version: str | int,
    student: str,
    card: ModelCard,
    figures: Mapping[str, float],
    limits: Mapping[str, float],
    latency: MachineLatency | None,
    tags: Mapping[str, str],
) -> str:
    """Markdown, at most as long as MLflow keeps.

    Args:
        name: of the model in the registry.
        student: its name, or ``teacher``.
        figures: as ``Candidate`` has them; accuracies 0 to 1.
        limits: what the student was made for; latency in ms.
        tags: of the version: its lineage.
    """
    parts = (
        _what(student, card, limits),
        _table(student, figures, latency),
        _limits(card),
        _use(f"models:/{name}/{version}"),
        _lineage(tags),
    )
    return "\n\n".join("\n".join(part) for part in parts)[:_LONGEST]


def _what(student: str, card: ModelCard, limits: Mapping[str, float]) -> Iterator[str]:
    network = card.network.name
    if student == TEACHER:
        yield f"**Teacher**: {network}, from which the students were made."
        return
    blocks = len(card.replacements)
    yield (
        f"**Student `{student}`** of {network}: {blocks} block{'s' if blocks != 1 else ''} "
        "replaced by cheaper ones, distilled from the teacher."
    )
    if limits:
        bounds = ", ".join(f"{_limit(key, limit)} {_UNITS[key]}" for key, limit in limits.items())
        yield f"Made for at most {bounds}."


def _limit(figure: str, limit: float) -> str:
    """Counts are whole: a share of an odd one allows no half."""
    return f"{limit:,.6g}" if figure == "latency" else f"{math.floor(limit):,}"


def _table(
    student: str, figures: Mapping[str, float], latency: MachineLatency | None
) -> Iterator[str]:
    yield "| figure | value |"
    yield "|---|---|"
    teacher = figures.get("teacher_val_accuracy")
    beside = "" if student == TEACHER or teacher is None else f" (teacher {teacher:.2%})"
    yield f"| accuracy, validation split | {figures['val_accuracy']:.2%}{beside} |"
    yield f"| accuracy, test split | {figures['test_accuracy']:.2%} |"
    yield f"| file | {figures['file_bytes']:,.0f} bytes |"
    yield f"| parameters | {figures['num_parameters']:,.0f} |"
    yield f"| MACs per image | {figures['macs']:,.0f} |"
    for entry in headline(latency.entries) if latency else ():
        yield f"| latency, {entry.setting} | {entry.median_ms:.3g} ms |"
    if latency:
        yield ""
        yield f"Latency was measured on: {latency.machine}."


def _limits(card: ModelCard) -> Iterator[str]:
    channels, (height, width) = card.network.in_channels, card.image_size
    names = ", ".join(card.class_names[:_MAX_CLASSES])
    more = len(card.class_names) - _MAX_CLASSES
    yield (
        f"**Takes** float32 images (N, {channels}, {height}, {width}) in [0, 1]; normalisation is "
        f"inside. **Gives** logits of {len(card.class_names)} classes: {names}"
        f"{f' and {more} more' if more > 0 else ''}."
    )
    yield ""
    yield (
        "**Limits**: the figures hold for images like those of the data below. It answers with one "
        "of these classes whatever it is shown; nothing was tested for other sources of images, "
        "for attacks, or for fairness among groups. A compressed model may err on other images "
        "than its teacher."
    )


def _use(uri: str) -> Iterator[str]:
    yield "```"
    yield f'pbkd.load("{uri}")                        # Python; or mlflow.pytorch.load_model'
    yield f"mlflow models serve -m {uri} --env-manager local   # HTTP; docs/registry.md"
    yield "```"


def _lineage(tags: Mapping[str, str]) -> Iterator[str]:
    known = {
        "data": "data_digest",
        "teacher": "teacher_digest",
        "weights": "weights_digest",
        "parameters": "params_digest",
        "commit": "commit",
        "dvc.lock": "dvc_lock_md5",
        "run": "run_id",
    }
    found = {label: tags.get(f"pbkd.{key}", "") for label, key in known.items()}
    texts = [f"{label} `{_shortened(value)}`" for label, value in found.items() if value]
    yield f"**From** {', '.join(texts)}, pbkd {tags.get('pbkd.version', 'unknown')}."
    yield "Tags have the digests in full."


def _shortened(digest: str) -> str:
    head, dash, rest = digest.partition("-")
    return head[:_SHORT] + dash + rest
