"""What comes from outside: no code is run, no memory is filled; and no password gets out."""

from __future__ import annotations

import ast
import base64
import io
import logging
import os
import pickle
import struct
import sys
import tarfile
import threading
import tracemalloc
import zipfile
import zlib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import pbkd
from pbkd.artifacts import Workspace, load_checkpoint, read_json, write_json
from pbkd.config import Params, PrepareConfig
from pbkd.data import prepare
from pbkd.errors import DataError, JobError, PbkdError, TeacherError, TrackingError
from pbkd.redaction import without_secrets

REPOSITORY = Path(__file__).parents[1]
SECRET = "s3cr/et:pass"
SOURCES = sorted(
    path for folder in ("pbkd", "flows") for path in (REPOSITORY / folder).rglob("*.py")
)


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


# ---------------------------------------------------------------- passwords


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("http://user:secret@host:5000/path", "http://host:5000/path"),
        ("postgresql+psycopg2://me:a/b@db/mlflow?x=1", "postgresql+psycopg2://db/mlflow?x=1"),
        ("at https://token@host: no", "at https://host: no"),
        ("postgresql://db/x?user=me&password=secret", "postgresql://db/x?user=me&password=***"),
        ("http://h/?access_token=secret#top", "http://h/?access_token=***#top"),
        ("two: a://u:secret@h/1 and b://u:secret@h/2", "two: a://h/1 and b://h/2"),
        ("sqlite:////folder/mlflow.db", "sqlite:////folder/mlflow.db"),
        ("models:/pbkd-digits@champion", "models:/pbkd-digits@champion"),
        ("somebody@example.org, x=1?", "somebody@example.org, x=1?"),
    ],
)
def test_a_text_loses_logins_and_keeps_the_rest(text: str, expected: str) -> None:
    assert without_secrets(text) == expected


def test_no_error_of_ours_holds_a_password_whatever_it_quotes() -> None:
    kinds = [PbkdError, *PbkdError.__subclasses__(), *JobError.__subclasses__()]
    for kind in kinds:
        if kind.__init__ is not PbkdError.__init__:  # MissingExtraError's words are its own
            continue
        error = kind(f"http://user:{SECRET}@host does not answer")
        assert str(error) == "http://host does not answer"
        assert str(pickle.loads(pickle.dumps(error))) == str(error)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> str:
    """A server that nobody is, and a password for it."""
    uri = f"http://user:{SECRET.replace('/', '%2F')}@127.0.0.1:9"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, "restored to what it was, after the test")
        monkeypatch.delenv(name)
    return uri


def test_a_tracking_server_that_does_not_answer_is_named_without_its_password(
    tmp_path: Path, server: str
) -> None:
    from pbkd.tracking.mlflow_run import mlflow_client

    with pytest.raises(TrackingError, match=r"MLflow at http://127\.0\.0\.1:9 does not") as raised:
        mlflow_client(Workspace(tmp_path, tmp_path / ".pbkd"))
    assert "pass" not in str(raised.value)
    assert raised.value.__suppress_context__


def test_a_server_gets_the_login_and_mlflow_does_not_know_it_as_part_of_the_uri(
    tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    from pbkd.tracking.mlflow_run import mlflow_client

    headers: list[str | None] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            headers.append(self.headers["Authorization"])
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(b"{}")

        do_POST = do_GET  # noqa: N815

        def log_message(self, format: str, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        uri = server.replace(":9", f":{listening.server_port}")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        mlflow_client(Workspace(tmp_path, tmp_path / ".pbkd"))
        listening.shutdown()
    expected = base64.b64encode(f"user:{SECRET}".encode()).decode()
    assert headers
    assert set(headers) == {f"Basic {expected}"}
    assert mlflow.get_tracking_uri() == f"http://127.0.0.1:{listening.server_port}"
    assert "pass" not in os.environ["MLFLOW_TRACKING_URI"]


@pytest.fixture
def _loggers() -> Iterator[None]:
    """As they were: the command line sets them up."""
    loggers = [logging.getLogger(name) for name in ("pbkd", "flows")]
    before = [(own, own.level, list(own.handlers), own.propagate) for own in loggers]
    yield
    for own, level, handlers, propagate in before:
        own.setLevel(level)
        own.handlers, own.propagate = handlers, propagate


@pytest.mark.usefixtures("_loggers")
@pytest.mark.parametrize("options", [[], ["--debug"]])
def test_the_command_line_prints_no_password(
    server: str,
    options: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from pbkd.cli import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["pbkd", *options, "pick", "--name", "any"])
    with pytest.raises(SystemExit) as raised:
        main()
    said = "".join(capsys.readouterr())
    assert raised.value.code == 1
    assert "127.0.0.1:9 does not answer" in said
    assert ("Traceback" in said) == bool(options)
    assert "pass" not in said


def test_a_log_line_with_a_uri_loses_its_password(capsys: pytest.CaptureFixture[str]) -> None:
    from pbkd.cli.app import _handler, _redacted

    handler = _handler(debug=False)
    handler.addFilter(_redacted)
    logger = logging.Logger("a logger of this test")
    logger.addHandler(handler)
    logger.warning("%s: %d tries", f"postgresql://user:{SECRET}@db/x", 3)
    error = capsys.readouterr().err
    assert "postgresql://db/x: 3 tries" in error
    assert "pass" not in error


def test_a_worker_that_fails_sends_no_password(monkeypatch: pytest.MonkeyPatch) -> None:
    from flows.slots import Slot
    from flows.worker import RESULT, call, pack_call, unpack_result

    payload = pack_call("any", _fail, (f"http://user:{SECRET}@host",))
    slot = Slot.__new__(Slot)
    object.__setattr__(slot, "name", "cpu0")
    with pytest.raises(JobError) as raised:
        unpack_result(call(payload, 1).removeprefix(RESULT), "any", slot)
    said = str(raised.value) + "".join(raised.value.__notes__)
    assert "http://host does not answer" in said
    assert "pass" not in said


def _fail(uri: str) -> None:
    raise OSError(f"{uri} does not answer")


def test_what_a_run_leaves_behind_holds_no_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store is a file here; its name has the form of a login all the same."""
    from flows.artifacts import mlflow_line
    from pbkd.tracking import PipelineRun
    from pbkd.tracking.registry import _public

    workspace = Workspace(tmp_path, tmp_path / ".pbkd")
    uri = f"sqlite:///{tmp_path}/user:hidden@store.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    run = PipelineRun.current(workspace, Params.model_validate({}))
    again = PipelineRun.current(workspace, Params.model_validate({}))
    assert again.run_id == run.run_id
    assert "hidden" not in (workspace.state / "pipeline_run.json").read_text()
    assert "hidden" not in mlflow_line(workspace, run)
    assert "hidden" not in _public(uri, workspace)
    data = run.client.get_run(run.run_id).data
    assert "hidden" not in str([data.tags, data.params])


# ---------------------------------------------------------------- code in files


def _calls(path: Path) -> list[tuple[str, dict[str, object]]]:
    """Every call in a file: its dotted name, and its constant keyword arguments."""
    return [
        (
            ast.unparse(node.func),
            {
                k.arg: k.value.value
                for k in node.keywords
                if k.arg and isinstance(k.value, ast.Constant)
            },
        )
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
    ]


def test_only_workers_unpickle_and_only_what_the_run_sends_them() -> None:
    calls = [(path, name, given) for path in SOURCES for name, given in _calls(path)]
    unpickling = {path.name for path, name, _ in calls if name in ("pickle.load", "pickle.loads")}
    assert unpickling == {"worker.py"}
    reading = [(path, given) for path, name, given in calls if name == "torch.load"]
    assert reading
    assert all(given.get("weights_only") is True for _, given in reading), reading
    assert all(
        given.get("allow_pickle", False) is False for _, name, given in calls if name == "np.load"
    )
    others = ("joblib.", "dill.", "cloudpickle.", "marshal.", "shelve.")
    assert not [name for _, name, _ in calls if name.startswith(others)]


def test_a_checkpoint_with_code_in_it_is_refused_and_nothing_runs(tmp_path: Path) -> None:
    made = tmp_path / "made"
    torch.save({"weight": Touch(made)}, tmp_path / "checkpoint.pt")
    with pytest.raises(pickle.UnpicklingError):
        load_checkpoint(tmp_path / "checkpoint.pt")
    assert not made.exists()
    torch.load(tmp_path / "checkpoint.pt", weights_only=False)
    assert made.exists()  # it would have run


def test_a_model_of_somebody_elses_imports_none_of_its_modules(
    finished: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = finished.artifacts("teacher")
    (finished.root / "evil_network.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(finished.root)
    card = read_json(folder / "model.json")
    card["network"] |= {"name": "evil_network:build", "width": 1.0}
    write_json(folder / "model.json", card)
    with pytest.raises(TeacherError, match="allow_code"):
        pbkd.load(folder)
    assert "evil_network" not in sys.modules


# ---------------------------------------------------------------- archives

UNPACKED = 64 * 2**20
LITTLE = 16 * 2**20


def _image() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


FILES = {f"{name}/{number}.png": _image() for name in ("cat", "dog") for number in range(8)}


def _refused(path: Path, match: str) -> None:
    """Preparing ends with an error, and takes little memory on the way."""
    config = PrepareConfig(source="image_folder", path=path.name, on_corrupt="skip")
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=match):
            prepare(config, 0, path.parent / "prepared", path.parent, path.parent / "downloads")
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < LITTLE
    assert {entry.name for entry in path.parent.iterdir()} == {path.name}


def _zip(path: Path, kind: int) -> None:
    with zipfile.ZipFile(path, "w", kind) as archive:
        for name, content in FILES.items():
            archive.writestr(name, content)
        archive.writestr("dog/bomb.png", bytes(UNPACKED))


def test_a_zip_that_understates_its_sizes_fills_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "set.zip"
    _zip(path, zipfile.ZIP_DEFLATED)
    path.write_bytes(path.read_bytes().replace(struct.pack("<L", UNPACKED), struct.pack("<L", 99)))
    _refused(path, "is not a whole archive")


@pytest.mark.parametrize("kind", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_zip_of_a_method_without_limits_is_refused(tmp_path: Path, kind: int) -> None:
    path = tmp_path / "set.zip"
    _zip(path, kind)
    _refused(path, r"compression of cat/0\.png is not")


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME])
def test_a_tar_with_a_huge_header_fills_no_memory(tmp_path: Path, kind: bytes) -> None:
    header = tarfile.TarInfo("attributes")
    header.type, header.size = kind, UNPACKED
    packer = zlib.compressobj(wbits=31)
    member = tarfile.TarInfo("cat/0.png").tobuf()
    packed = packer.compress(member + header.tobuf() + bytes(UNPACKED + 1024)) + packer.flush()
    (tmp_path / "set.tar.gz").write_bytes(packed)
    _refused(tmp_path / "set.tar.gz", "67,108,864 bytes of names and attributes")


def test_long_names_are_read_all_the_same(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "set.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        for name, content in FILES.items():
            info = tarfile.TarInfo(f"{'long' * 40}/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    config = PrepareConfig(source="image_folder", path="set.tar")
    prepared = prepare(config, 0, tmp_path / "prepared", tmp_path, tmp_path / "downloads")
    assert prepared.meta.class_names == ("cat", "dog")
