"""What a user may get wrong, row by row: a message that helps, and nothing finished is lost.

Other files have the rows that need more than one process: a second run (test_cli.py), params.yaml
changed during a run (flows/test_drivers.py), archives (data/test_data_folder.py).
"""

from __future__ import annotations

import os
import pickle
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from pbkd.activations.shards import KIND
from pbkd.artifacts import Workspace, file_digest, read_json
from pbkd.cli import main
from pbkd.errors import ArtifactError
from pbkd.models import read_card, save_model
from pbkd.stages import StageContext, run_stage
from pbkd.students import load_model


def change(workspace: Workspace, section: str, **values: object) -> None:
    params = yaml.safe_load(workspace.params.read_text())
    params[section] = values | {k: v for k, v in params[section].items() if k not in values}
    workspace.params.write_text(yaml.safe_dump(params))


def folder_of_images(workspace: Workspace, classes: dict[str, int]) -> Path:
    """Gray images of 8x8 pixels under data/raw/CLASS/; params.yaml names them."""
    rng = np.random.default_rng(0)
    raw = workspace.root / "data" / "raw"
    for name, count in classes.items():
        (raw / name).mkdir(parents=True)
        for index in range(count):
            pixels = rng.integers(0, 256, (8, 8), dtype=np.uint8)
            Image.fromarray(pixels).save(raw / name / f"{index:03d}.png")
    change(workspace, "prepare", source="image_folder", image_size=None)
    return raw


# ---------------------------------------------------------------- the rows


def unknown_key(workspace: Workspace) -> None:
    change(workspace, "distill", epoch=3)


def wrong_type(workspace: Workspace) -> None:
    change(workspace, "distill", epochs="many")


def key_twice(workspace: Workspace) -> None:
    workspace.params.write_text(workspace.params.read_text() + "\nseed: 1\n")


def missing_data(workspace: Workspace) -> None:
    change(workspace, "prepare", source="image_folder", path="data/nowhere")


def empty_class(workspace: Workspace) -> None:
    (folder_of_images(workspace, {"cat": 20, "dog": 20}) / "emu").mkdir()


def one_class(workspace: Workspace) -> None:
    folder_of_images(workspace, {"cat": 20})


def corrupt_image(workspace: Workspace) -> None:
    path = folder_of_images(workspace, {"cat": 20, "dog": 20}) / "dog" / "007.png"
    path.write_bytes(path.read_bytes()[:60])


def other_class_names(workspace: Workspace) -> None:
    model, card = load_model(workspace.artifacts("teacher"))
    names = tuple(f"digit {name}" for name in card.class_names)
    save_model(workspace.root / "mine", model, card.model_copy(update={"class_names": names}))
    change(workspace, "teacher", weights="mine")


def teacher_of_other_data(workspace: Workspace) -> None:
    folder_of_images(workspace, {"cat": 40, "dog": 40})
    run_stage("prepare", StageContext.load(workspace))


def unknown_model(workspace: Workspace) -> None:
    change(workspace, "teacher", model="vgg_smal")


def unknown_module(workspace: Workspace) -> None:
    change(workspace, "teacher", model="my_networks:build", width=1.0)


def unknown_weights(workspace: Workspace) -> None:
    shutil.rmtree(workspace.artifacts("teacher"))
    change(workspace, "teacher", weights="ResNet18_Weights.IMAGENET1K_V9")


def missing_weights(workspace: Workspace) -> None:
    shutil.rmtree(workspace.artifacts("teacher"))
    change(workspace, "teacher", weights="weights/none.safetensors")


def other_architecture(workspace: Workspace) -> None:
    change(workspace, "teacher", weights="artifacts/teacher", model="cifar_resnet20")


class _Code:
    """Unpickled, it leaves a file behind."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, ...]]:
        return (os.mkdir, ("the-code-was-run",))


def pickle_with_code(workspace: Workspace) -> None:
    with (workspace.root / "weights.pth").open("wb") as file:
        pickle.dump({"net.classifier.weight": _Code()}, file, protocol=2)
    change(workspace, "teacher", weights="weights.pth")


def truncated_weights_file(workspace: Workspace) -> None:
    path = workspace.root / "weights.pth"
    torch.save(load_model(workspace.artifacts("teacher"))[0].state_dict(), path)
    path.write_bytes(path.read_bytes()[:-500])
    change(workspace, "teacher", weights="weights.pth")


def weak_teacher(workspace: Workspace) -> None:
    change(workspace, "teacher", epochs=1, min_accuracy=1.0)


def selector_of_nothing(workspace: Workspace) -> None:
    change(workspace, "blocks", select="paths", paths=["features.99"], exclude=[])


def overlapping_selectors(workspace: Workspace) -> None:
    change(workspace, "blocks", select="paths", paths=["features", "features.3"], exclude=[])


def irreplaceable_block(workspace: Workspace) -> None:
    change(workspace, "blocks", select="paths", paths=["classifier"], exclude=[])


def truncated_teacher(workspace: Workspace) -> None:
    path = workspace.artifacts("teacher") / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-7])


def truncated_arrays(workspace: Workspace) -> None:
    path = workspace.prepared / "train_images.npy"
    path.write_bytes(path.read_bytes()[:-7])


def stage_left_out(workspace: Workspace) -> None:
    shutil.rmtree(workspace.artifacts("stitch"))


@dataclass(frozen=True)
class Row:
    """How a workspace is spoilt, the verb that meets it, and what is said."""

    spoil: Callable[[Workspace], None]
    verb: str
    said: tuple[str, ...]
    code: int = 1


ROWS = [
    Row(unknown_key, "shrink", ("distill.epoch: unknown key", "did you mean `epochs`?"), code=2),
    Row(wrong_type, "shrink", ("distill.epochs: got 'many'", "valid integer"), code=2),
    Row(key_twice, "shrink", ("key `seed` stands twice", "line"), code=2),
    Row(missing_data, "prepare", ("data/nowhere does not exist", "expected a folder, .tar.gz")),
    Row(empty_class, "prepare", ("class folder emu holds no image", "or remove the folder")),
    Row(one_class, "prepare", ("one class, `cat`", "expected at least two")),
    Row(corrupt_image, "prepare", ("dog/007.png cannot be decoded", "prepare.on_corrupt: skip")),
    Row(other_class_names, "teacher", ("made for other classes: `digit 0`", "teacher.head")),
    Row(teacher_of_other_data, "activations", ("the data has cat, dog", "run: pbkd teacher")),
    Row(unknown_model, "prepare", ("network `vgg_smal`; did you mean `vgg_small`?",)),
    Row(unknown_module, "prepare", ("there is no module my_networks beside params.yaml",)),
    Row(unknown_weights, "prepare", ("no `ResNet18_Weights.IMAGENET1K_V9`; did you mean",)),
    Row(missing_weights, "prepare", ("weights/none.safetensors does not exist", "torch.save")),
    Row(other_architecture, "teacher", ("of another architecture than", "change teacher.model")),
    Row(pickle_with_code, "teacher", ("holds more than tensors", "model.state_dict()")),
    Row(truncated_weights_file, "teacher", ("not a whole file of torch.save", "copy it again")),
    Row(weak_teacher, "teacher", ("validation accuracy", "expected at least 1", "min_accuracy")),
    Row(selector_of_nothing, "blocks", ("`features.99` matches no module", "pbkd inspect")),
    Row(overlapping_selectors, "blocks", ("features.3 overlaps: lies inside features", "one of")),
    Row(irreplaceable_block, "blocks", ("classifier: separable: Linear holds no dense k x k",)),
    Row(truncated_teacher, "stitch", ("model.safetensors is not a whole safetensors file",)),
    Row(truncated_arrays, "teacher", ("split train cannot be read", "run: pbkd prepare")),
    Row(stage_left_out, "finetune", ("artifacts/stitch is missing; run: pbkd stitch",)),
]


def outputs(workspace: Workspace) -> dict[Path, str]:
    """Digest of every file that stages have finished."""
    roots = [workspace.root / "artifacts", workspace.results, workspace.store.root]
    return {
        path: file_digest(path)
        for root in [*roots, workspace.prepared]
        for path in root.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.spoil.__name__)
def test_bad_input_is_told_and_costs_nothing(
    row: Row,
    workspace: Workspace,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    row.spoil(workspace)
    before = outputs(workspace)
    monkeypatch.setattr(sys, "argv", ["pbkd", row.verb])
    with pytest.raises(SystemExit) as raised:
        main()
    assert raised.value.code == row.code
    captured = " ".join(capsys.readouterr().err.split())
    assert "Traceback" not in captured
    for text in row.said:
        assert text in captured
    assert outputs(workspace) == before
    assert not (workspace.root / "the-code-was-run").exists()


def test_a_corrupt_image_is_left_out_by_setting(
    workspace: Workspace, caplog: pytest.LogCaptureFixture
) -> None:
    corrupt_image(workspace)
    change(workspace, "prepare", on_corrupt="skip")
    run_stage("prepare", StageContext.load(workspace))
    meta = read_json(workspace.prepared / "meta.json")
    assert meta["skipped"] == ["dog/007.png"]
    assert sum(meta["num_images"].values()) == 39


def test_a_truncated_shard_is_removed_and_made_again(workspace: Workspace) -> None:
    for folder in (workspace.store.root / KIND, workspace.artifacts("activations")):
        shards = sorted(folder.rglob("shard-*.safetensors"))
        for shard in shards:
            content = bytearray(shard.read_bytes())
            content[-3] ^= 1  # of the right size: only the checksum tells
            shard.unlink()
            shard.write_bytes(content)
    change(workspace, "distill", epochs=1)
    with pytest.raises(ArtifactError, match=r"checksum differs; .* run again to refill it"):
        run_stage("distill", StageContext.load(workspace))
    for _ in range(20):  # each run finds the next one
        run_stage("activations", StageContext.load(workspace))
        try:
            run_stage("distill", StageContext.load(workspace))
        except ArtifactError:
            continue
        break
    assert len(read_json(workspace.artifacts("distill") / "distill.json")) == 5


# ---------------------------------------------------------------- disks and memory


def test_a_cache_that_does_not_fit_is_refused_before_it_is_written(
    workspace: Workspace, small_disk: Path
) -> None:
    shutil.rmtree(workspace.artifacts("activations"))
    change(workspace, "activations", source="cache", views=8)
    own = Workspace(workspace.root, small_disk / "state")
    with pytest.raises(ArtifactError, match=r"takes 0\.\d+ GB, .* GB free; free some space"):
        run_stage("activations", StageContext.load(own))
    assert list(own.store.root.rglob("*.safetensors")) == []


def test_a_disk_that_fills_up_while_the_cache_is_written_leaves_nothing_half(
    workspace: Workspace, small_disk: Path
) -> None:
    shutil.rmtree(workspace.artifacts("activations"))
    change(workspace, "activations", source="cache", views=1, chunk=50)
    own = Workspace(workspace.root, small_disk / "state")
    stop = threading.Event()

    def fill() -> None:
        """Take the rest of the disk once the first shard is there."""
        while not stop.is_set() and not list(small_disk.rglob("shard-*")):
            time.sleep(0.001)
        with (small_disk / "other").open("wb", buffering=0) as file:
            try:
                while not stop.is_set():
                    file.write(bytes(1 << 16))
            except OSError:
                return

    thread = threading.Thread(target=fill)
    thread.start()
    try:
        with pytest.raises(ArtifactError, match="No space left on device; free some space"):
            run_stage("activations", StageContext.load(own))
    finally:
        stop.set()
        thread.join()
    for marker in own.store.root.rglob("item.json"):
        own.store.verify(KIND, marker.parent.name)
    assert not list(small_disk.rglob("*.tmp"))
    (small_disk / "other").unlink()
    run_stage("activations", StageContext.load(own))
    assert (workspace.artifacts("activations") / "activations.json").is_file()


def test_a_disk_without_write_permission_is_told(
    workspace: Workspace,
    small_disk: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(
        workspace.root,
        small_disk / "w",
        ignore=shutil.ignore_patterns("store", "activations", "distill"),
    )
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    monkeypatch.chdir(small_disk / "w")
    monkeypatch.setattr(sys, "argv", ["pbkd", "shrink"])
    with pytest.raises(SystemExit) as raised:
        main()
    assert raised.value.code == 1
    captured = " ".join(capsys.readouterr().err.split())
    assert "Read-only file system; take a folder that can be written to" in captured


def test_a_batch_that_does_not_fit_into_memory_is_told(workspace: Workspace) -> None:
    change(workspace, "prepare", image_size=64)
    run_stage("prepare", StageContext.load(workspace))
    change(workspace, "teacher", width=1.0, batch_size=1200, epochs=1)
    before = outputs(workspace)
    process = subprocess.run(
        [sys.executable, "-m", "pbkd.cli", "teacher"],
        cwd=workspace.root,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (5 << 30, 5 << 30)),
        capture_output=True,
        text=True,
        check=False,
    )
    said = " ".join(process.stderr.split())
    assert process.returncode == 1, said
    assert "no memory for a batch of 1200 images" in said
    assert "lower `batch_size`" in said
    assert outputs(workspace) == before
    assert read_card(workspace.artifacts("teacher")).network.width == 0.25
