"""Files that are whole or absent, digests, and the store."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from pbkd.artifacts import (
    MARKER,
    Store,
    Workspace,
    atomic_dir,
    atomic_path,
    digest_of,
    link_tree,
    load_tensors,
    read_json,
    save_tensors,
    temporary_path,
    tensors_digest,
    write_json,
)
from pbkd.cli import app
from pbkd.config import AugmentConfig
from pbkd.errors import ArtifactError

# ---------------------------------------------------------------- digests


def test_a_digest_does_not_depend_on_the_order_of_mappings() -> None:
    assert digest_of({"a": 1, "b": {"c": 2, "d": 3}}) == digest_of({"b": {"d": 3, "c": 2}, "a": 1})


@pytest.mark.parametrize(
    "other", [{"a": [2, 1]}, {"a": [1, 2], "b": None}, {"b": [1, 2]}, {"a": [1, "2"]}, {"a": [1.5]}]
)
def test_a_digest_depends_on_everything_else(other: object) -> None:
    assert digest_of({"a": [1, 2]}) != digest_of(other)


def test_a_digest_takes_configurations_and_paths() -> None:
    assert digest_of(AugmentConfig(pad=1)) == digest_of({"erase": 0, "flip": False, "pad": 1})
    assert digest_of(Path("a/b")) == digest_of("a/b")
    with pytest.raises(TypeError, match="Tensor is not JSON"):
        digest_of(torch.zeros(1))


TENSORS = {"a": torch.tensor([1, 2], dtype=torch.int32), "b": torch.zeros(2, 3)}


@pytest.mark.parametrize(
    "changed",
    [
        {"a": TENSORS["a"]},
        {"a": TENSORS["a"], "c": TENSORS["b"]},
        {"a": TENSORS["b"], "b": TENSORS["a"]},
        {"a": TENSORS["a"].view(torch.float32), "b": TENSORS["b"]},
        {"a": TENSORS["a"], "b": TENSORS["b"].reshape(3, 2)},
        {"a": torch.tensor([1, 3], dtype=torch.int32), "b": TENSORS["b"]},
        {"a": TENSORS["a"], "b": -TENSORS["b"]},  # -0.0
    ],
    ids=["fewer", "name", "names swapped", "dtype", "shape", "value", "sign of zero"],
)
def test_the_digest_of_tensors_reacts_to(changed: dict[str, torch.Tensor]) -> None:
    assert tensors_digest(changed) != tensors_digest(TENSORS)


def test_the_digest_of_tensors_ignores_order_and_strides() -> None:
    tensor = torch.rand(3, 4)
    assert tensors_digest({"a": tensor, "b": tensor.T}) == tensors_digest(
        {"b": tensor.T.contiguous(), "a": tensor.T.contiguous().T}
    )


ODD_TENSORS = {
    "0-d": torch.tensor(3.0),
    "empty": torch.zeros(0, 3),
    "bool": torch.tensor([True, False]),
    "bfloat16": torch.tensor([1.5, -2], dtype=torch.bfloat16),
    "int64": torch.tensor(7),
    "parameter": torch.nn.Parameter(torch.ones(2)),
}


@pytest.mark.parametrize("kind", ODD_TENSORS)
def test_odd_tensors_have_digests_and_survive_a_file(tmp_path: Path, kind: str) -> None:
    tensor = ODD_TENSORS[kind]
    save_tensors(tmp_path / "t.safetensors", {"x": tensor, "same memory": tensor})
    loaded = load_tensors(tmp_path / "t.safetensors")
    assert loaded["x"].dtype == tensor.dtype
    assert torch.equal(loaded["x"], tensor)
    assert tensors_digest({"x": loaded["x"]}) == tensors_digest({"x": tensor})
    if tensor.numel():
        assert tensors_digest({"x": tensor}) != tensors_digest({"x": torch.zeros_like(tensor)})


# ---------------------------------------------------------------- whole files


def _write_half(path: Path) -> None:
    with path.open("w") as file:
        file.writelines(["half", 2])  # type: ignore[list-item]


@pytest.mark.parametrize("old", [None, "old"])
def test_a_writer_that_raises_leaves_the_old_file_or_none(tmp_path: Path, old: str | None) -> None:
    path = tmp_path / "file"
    if old:
        path.write_text(old)
    with pytest.raises(TypeError), atomic_path(path) as temporary:
        _write_half(temporary)
    assert [p.read_text() for p in tmp_path.iterdir()] == ([old] if old else [])


@pytest.mark.parametrize("old", [None, "old"])
def test_a_writer_that_raises_leaves_the_old_folder_or_none(
    tmp_path: Path, old: str | None
) -> None:
    path = tmp_path / "folder"
    if old:
        path.mkdir()
        (path / "file").write_text(old)
    with pytest.raises(TypeError), atomic_dir(path) as temporary:
        _write_half(temporary / "file")
    assert [p.read_text() for p in tmp_path.rglob("file")] == ([old] if old else [])
    assert [p.name for p in tmp_path.iterdir()] == (["folder"] if old else [])


def test_a_file_is_not_there_before_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    with atomic_path(path) as temporary:
        temporary.write_text("text")
        assert not path.exists()
    assert path.read_text() == "text"


def test_a_new_folder_replaces_all_of_the_old_one(tmp_path: Path) -> None:
    for name in ("first", "second"):
        with atomic_dir(tmp_path / "folder") as temporary:
            (temporary / name).touch()
    assert [p.name for p in (tmp_path / "folder").iterdir()] == ["second"]


@pytest.mark.parametrize("is_there", [True, False])
def test_a_linked_folder_stays_a_link_and_its_target_is_replaced(
    tmp_path: Path, is_there: bool
) -> None:
    target = tmp_path / "disk" / "target"
    if is_there:
        target.mkdir(parents=True)
        (target / "first").touch()
    path = tmp_path / "folder"
    path.symlink_to(target)
    with atomic_dir(path) as temporary:
        assert temporary.parent == target.parent
        (temporary / "second").touch()
    assert path.readlink() == target
    assert [p.name for p in target.iterdir()] == ["second"]
    assert [p.name for p in target.parent.iterdir()] == ["target"]


def test_the_current_folder_is_filled_and_stays_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    monkeypatch.chdir(folder)
    with pytest.raises(TypeError), atomic_dir(folder) as temporary:
        _write_half(temporary / "file")
    assert list(folder.iterdir()) == []
    with atomic_dir(folder) as temporary:
        (temporary / "below").mkdir()
        (temporary / "below" / "file").touch()
        assert not Path("below").exists()
    assert Path.cwd() == folder
    assert [str(p.relative_to(folder)) for p in folder.rglob("*")] == ["below", "below/file"]
    assert list(tmp_path.iterdir()) == [folder]


def test_json_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with pytest.raises(ArtifactError, match=r"a\.json is missing"):
        read_json(path)
    path.write_text('{"a": ')
    with pytest.raises(ArtifactError, match=r"a\.json is not JSON"):
        read_json(path)


@pytest.mark.parametrize("kept", [0, 4, 20, -1])
def test_truncated_tensors_are_named(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "t.safetensors"
    save_tensors(path, {"x": torch.ones(8)})
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ArtifactError, match=r"t\.safetensors is not a whole safetensors file"):
        load_tensors(path)


def test_missing_tensors_are_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"t\.safetensors is missing"):
        load_tensors(tmp_path / "t.safetensors")


# ---------------------------------------------------------------- the store

KEY = "0123"


def _write_item(folder: Path) -> None:
    (folder / "weights").write_bytes(b"0123456789")
    (folder / "below").mkdir()
    (folder / "below" / "log").write_text("line\n")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def _truncate(folder: Path) -> None:
    (folder / "weights").write_bytes(b"01234")


def _change_a_byte(folder: Path) -> None:
    (folder / "weights").write_bytes(b"0123456780")


def _change_a_byte_below(folder: Path) -> None:
    (folder / "below" / "log").write_text("lime\n")


def _remove_a_file(folder: Path) -> None:
    (folder / "below" / "log").unlink()


def _remove_the_marker(folder: Path) -> None:
    (folder / MARKER).unlink()


def _cut_the_marker(folder: Path) -> None:
    (folder / MARKER).write_text((folder / MARKER).read_text()[:20])


Damage = Callable[[Path], None]
SEEN_AT_ONCE: list[Damage] = [_truncate, _remove_a_file, _remove_the_marker, _cut_the_marker]
SEEN_BY_DIGEST: list[Damage] = [_change_a_byte, _change_a_byte_below]


def test_an_item_is_whole_under_its_key_and_under_no_other(store: Store) -> None:
    path = store.put("trainees", KEY, _write_item)
    assert path == store.path("trainees", KEY)
    assert store.has("trainees", KEY)
    assert not store.has("trainees", "4567")
    assert not store.has("scores", KEY)
    assert (path / "below" / "log").read_text() == "line\n"
    store.verify("trainees", KEY)


def test_an_item_under_the_wrong_key_is_not_taken(store: Store) -> None:
    path = store.put("trainees", KEY, _write_item)
    path.rename(path.with_name("4567"))
    assert not store.has("trainees", "4567")


def test_a_writer_that_raises_puts_nothing_into_the_store(store: Store) -> None:
    def fail(folder: Path) -> None:
        _write_item(folder)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        store.put("trainees", KEY, fail)
    assert not store.has("trainees", KEY)
    assert list((store.root / "trainees").iterdir()) == []


def test_the_first_writer_wins(store: Store) -> None:
    def must_not_run(folder: Path) -> None:
        raise AssertionError(folder)

    store.put("trainees", KEY, _write_item)
    store.put("trainees", KEY, must_not_run)


def test_a_writer_that_comes_second_keeps_what_the_first_put(store: Store) -> None:
    def write_while_another_does(folder: Path) -> None:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(store.put, "trainees", KEY, _write_item).result()
        (folder / "weights").write_bytes(b"mine")

    path = store.put("trainees", KEY, write_while_another_does)
    assert (path / "weights").read_bytes() == b"0123456789"
    assert list(path.parent.iterdir()) == [path]
    store.verify("trainees", KEY)


@pytest.mark.parametrize("broken", [False, True])
def test_writers_in_step_all_succeed(store: Store, broken: bool) -> None:
    keys = [f"{number:04}" for number in range(100)]
    if broken:
        for key in keys:
            _truncate(store.put("trainees", key, _write_item))
    num_writers = 3
    in_step = threading.Barrier(num_writers, timeout=20)

    def put_all() -> None:
        for key in keys:
            in_step.wait()
            path = store.put("trainees", key, _write_item)
            assert (path / "weights").read_bytes() == b"0123456789"

    with ThreadPoolExecutor(num_writers) as pool:
        for done in [pool.submit(put_all) for _ in range(num_writers)]:
            done.result()
    for key in keys:
        store.verify("trainees", key)
    assert sorted(path.name for path in (store.root / "trainees").iterdir()) == keys


def test_a_whole_item_that_took_the_place_of_a_broken_one_stays(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = store.put("trainees", KEY, _write_item)
    whole = path.rename(path.with_name("whole"))
    inode = (whole / "weights").stat().st_ino
    _truncate(store.put("trainees", KEY, _write_item))

    def wait_for_another_writer(file: object, operation: int) -> None:
        shutil.rmtree(path)
        whole.rename(path)

    monkeypatch.setattr(fcntl, "flock", wait_for_another_writer)
    store.put("trainees", KEY, _write_item)
    assert (path / "weights").stat().st_ino == inode
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("damage", SEEN_AT_ONCE)
def test_a_damaged_item_is_not_taken_for_whole_and_is_written_anew(
    store: Store, damage: Damage
) -> None:
    damage(store.put("trainees", KEY, _write_item))
    assert not store.has("trainees", KEY)
    store.put("trainees", KEY, _write_item)
    store.verify("trainees", KEY)


@pytest.mark.parametrize("damage", [*SEEN_AT_ONCE, *SEEN_BY_DIGEST])
def test_verify_removes_a_damaged_item(store: Store, damage: Damage) -> None:
    path = store.put("trainees", KEY, _write_item)
    damage(path)
    with pytest.raises(ArtifactError, match=f"{KEY} is damaged and was removed"):
        store.verify("trainees", KEY)
    assert not path.exists()


def test_adopting_links_an_item_into_the_store(store: Store, tmp_path: Path) -> None:
    output = tmp_path / "artifacts" / "conv1"
    output.parent.mkdir()
    link_tree(store.put("trainees", KEY, _write_item), output)
    fresh = Store(tmp_path / "fresh")
    assert fresh.adopt("trainees", output)
    fresh.verify("trainees", KEY)
    for name in ("weights", "below/log", MARKER):
        inodes = {root / name for root in (output, fresh.path("trainees", KEY))}
        assert len({path.stat().st_ino for path in inodes}) == 1


@pytest.mark.parametrize("damage", [*SEEN_AT_ONCE, *SEEN_BY_DIGEST])
def test_a_damaged_output_is_not_adopted(store: Store, tmp_path: Path, damage: Damage) -> None:
    output = tmp_path / "conv1"
    store.put("trainees", KEY, _write_item).rename(output)
    damage(output)
    assert not store.adopt("trainees", output)
    assert not store.has("trainees", KEY)
    assert not store.path("trainees", KEY).exists()


def test_adopting_replaces_a_damaged_item_of_the_store(store: Store, tmp_path: Path) -> None:
    output = tmp_path / "conv1"
    store.put("trainees", KEY, _write_item).rename(output)
    _truncate(store.put("trainees", KEY, _write_item))
    assert store.adopt("trainees", output)
    store.verify("trainees", KEY)


@pytest.mark.parametrize("marker", ["[]", '{"files": {}}', "3"])
def test_a_folder_with_another_kind_of_marker_is_not_adopted(
    store: Store, tmp_path: Path, marker: str
) -> None:
    (tmp_path / MARKER).write_text(marker)
    assert not store.adopt("trainees", tmp_path)


def test_writing_anew_does_not_reach_through_a_hard_link(tmp_path: Path) -> None:
    write_json(tmp_path / "a" / "x.json", 1)
    link_tree(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "a" / "x.json").samefile(tmp_path / "b" / "x.json")
    write_json(tmp_path / "b" / "x.json", 2)
    assert read_json(tmp_path / "a" / "x.json") == 1


# ---------------------------------------------------------------- the workspace


def test_a_killed_writers_folder_beside_a_links_target_is_swept(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as dead:
        pass
    target = tmp_path / "disk" / "activations"
    target.mkdir(parents=True)
    workspace = Workspace.find(tmp_path / "workspace")
    (workspace.root / "artifacts").mkdir(parents=True)
    workspace.artifacts("activations").symlink_to(target)
    name = temporary_path(target).name.replace(f"-{os.getpid()}-", f"-{dead.pid}-")
    target.with_name(name).mkdir()
    workspace.sweep()
    assert list(target.parent.iterdir()) == [target]


def test_gc_empties_a_linked_store_and_keeps_the_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    target = tmp_path / "disk"
    target.mkdir()
    store = Workspace.find().store
    store.root.parent.mkdir()
    store.root.symlink_to(target)
    store.put("trainees", KEY, _write_item)
    (store.root / "file").touch()
    result = CliRunner().invoke(app, ["gc"], catch_exceptions=False)
    assert result.output.startswith("emptied")
    assert store.root.readlink() == target
    assert list(target.iterdir()) == []


def test_gc_names_what_it_cannot_remove(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = Workspace.find().store.put("trainees", KEY, _write_item)
    unlink = os.unlink

    def refuse(name: str, **where: int) -> None:
        if name == "weights":
            raise PermissionError(1, "Operation not permitted", name)
        unlink(name, **where)

    monkeypatch.setattr(os, "unlink", refuse)
    result = CliRunner().invoke(app, ["gc"])
    assert isinstance(result.exception, ArtifactError)
    assert f"the first is {path / 'weights'};" in str(result.exception)
    assert "emptied" not in result.output
    assert [p.name for p in path.iterdir()] == ["weights"]


def test_the_state_lies_in_the_workspace_also_below_a_dvc_root(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / "above"))  # `dvc repro` sets it
    assert Workspace.find(tmp_path).state == (tmp_path / ".pbkd").resolve()
    assert Workspace.find(tmp_path, tmp_path / "given").state == (tmp_path / "given").resolve()
