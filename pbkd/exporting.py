"""A registered version as a folder of its own: two files that ``pbkd.load`` takes, and a README."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pbkd.artifacts import Workspace, atomic_dir
from pbkd.errors import ArtifactError
from pbkd.models import ModelCard, read_card
from pbkd.report.numbers import count_text, ms_text, size_text
from pbkd.shrink import FILE
from pbkd.tracking.fetch import fetch_version, open_registry
from pbkd.tracking.versions import ModelVersion

README = "README.md"


def check_free(folder: Path) -> None:
    """Raise ArtifactError where a folder is not new or empty."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ArtifactError(f"{folder} exists and is not empty; expected a new or empty folder")


def export(workspace: Workspace, version: ModelVersion, folder: Path) -> None:
    """Write ``model.json``, ``model.safetensors`` and a README; all of them or nothing.

    Raises:
        ArtifactError: the folder is not empty, or the registered files are damaged.
        TrackingError: the registry cannot give the files.
    """
    check_free(folder)
    open_registry(workspace)
    with atomic_dir(folder.absolute()) as temporary:
        fetch_version(version, temporary)
        card = read_card(temporary)
        if card.digest != version.model_digest:
            raise ArtifactError(
                f"{version.uri} holds another model than the one that was registered; delete the "
                "version, then run: pbkd register"
            )
        packed = temporary / FILE
        packed_bytes = packed.stat().st_size if packed.is_file() else None
        (temporary / README).write_text(_readme(version, card, packed_bytes))


def _readme(version: ModelVersion, card: ModelCard, packed_bytes: int | None) -> str:
    height, width = card.image_size
    is_own = ":" in card.network.name
    load = 'pbkd.load(".", allow_code=True)' if is_own else 'pbkd.load(".")'
    code = (
        f"\nThe network comes from `{card.network.name}`, which must be on the Python path.\n"
        if is_own
        else ""
    )
    packed = (
        f'\n`{FILE}` is the same model in {size_text(packed_bytes)}: `pbkd.load("{FILE}")`.\n'
        if packed_bytes is not None
        else ""
    )
    limits = ", ".join(f"{figure} <= {limit:,.12g}" for figure, limit in version.limits.items())
    return f"""# {version.name}, version {version.number}: {version.student}

{card.network.name}, compressed by pbkd: {len(card.replacements)} blocks replaced\
{f"; made for {limits}" if limits else ""}.

```python
import pbkd, torch

model = {load}
logits = model(torch.rand(1, {card.network.in_channels}, {height}, {width}))
print(model.class_names[logits.argmax()])
```

It takes float32 NCHW in [0, 1], {card.network.in_channels} channels, made for {height} x {width}
pixels; the normalisation is inside. It tells {len(card.class_names)} classes apart.
{code}{packed}
| figure | value |
|---|---|
{_rows(version)}

Lineage: model `{version.model_digest}`, data `{version.data_digest}`{_lineage(version)}.
"""


def _rows(version: ModelVersion) -> str:
    texts: dict[str, tuple[str, Callable[[float], str]]] = {
        "accuracy (validation)": ("val_accuracy", "{:.2%}".format),
        "accuracy (test)": ("test_accuracy", "{:.2%}".format),
        "teacher's accuracy (validation)": ("teacher_val_accuracy", "{:.2%}".format),
        "parameters": ("num_parameters", count_text),
        "MACs per image (1 MAC = 2 FLOPs)": ("macs", count_text),
        "file": ("file_bytes", size_text),
    }
    rows = []
    for label, (name, text) in texts.items():
        value = version.figure(name)
        rows.append(f"| {label} | {'not recorded' if value is None else text(value)} |")
    rows += [
        f"| latency, {entry.setting}, {machine.machine} | {ms_text(entry.median_ms)} |"
        for machine in version.latency.values()
        for entry in machine.entries
    ]
    return "\n".join(rows)


def _lineage(version: ModelVersion) -> str:
    entries = {
        "teacher": version.teacher_digest,
        "parameters": version.params_digest,
        "commit": version.commit,
        "run": version.run_id,
    }
    return "".join(f", {name} `{value}`" for name, value in entries.items() if value)
