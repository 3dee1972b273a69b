"""The command line: help, exit codes, what the views print, and the lock."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import yaml
from typer.testing import CliRunner

from pbkd import __version__
from pbkd.artifacts import Workspace
from pbkd.cli import app, main
from pbkd.errors import ArtifactError, ConfigError
from pbkd.stages import STAGES

VERBS = sorted(command.name or command.callback.__name__ for command in app.registered_commands)


def invoke(*arguments: str) -> str:
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


def exit_code(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """What the installed command would give to the shell."""
    monkeypatch.setattr(sys, "argv", ["pbkd", *arguments])
    with pytest.raises(SystemExit) as raised:
        main()
    return raised.value.code or 0


def change(workspace: Workspace, section: str, **values: object) -> None:
    params = yaml.safe_load(workspace.params.read_text())
    params[section].update(values)
    workspace.params.write_text(yaml.safe_dump(params))


# ---------------------------------------------------------------- help


def test_every_stage_is_a_verb_and_so_are_the_drivers():
    assert set(VERBS) >= {*STAGES, "run", "inspect", "plan", "report", "gc"}


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_says_what_it_does(verb):
    (command,) = (
        c for c in app.registered_commands if verb in (c.name, getattr(c.callback, "__name__", ""))
    )
    output = invoke(verb, "--help")
    first_line = command.callback.__doc__.strip().splitlines()[0]
    assert " ".join(first_line.split()[:4]) in " ".join(output.split())


def test_the_top_level_help_has_examples_and_every_verb():
    output = invoke("--help")
    assert "Examples" in output
    assert "pbkd run" in output
    assert all(verb in output for verb in VERBS)


@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help_is_quick_because_it_imports_no_heavy_library(option):
    code = (
        "import sys; from pbkd.cli import app\n"
        f"try: app(['{option}'])\nexcept SystemExit: pass\n"
        "print([m for m in ('torch', 'mlflow', 'prefect', 'dvc') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_version():
    assert invoke("--version").strip() == f"pbkd {__version__}"


# ---------------------------------------------------------------- exit codes


def test_unknown_verbs_and_options_are_usage_errors(monkeypatch, capsys):
    assert exit_code(monkeypatch, "destill") == 2
    assert exit_code(monkeypatch, "plan", "--wrokers", "2") == 2
    assert "wrokers" in capsys.readouterr().err


def test_wrong_parameters_are_a_usage_error_with_a_hint(workspace, monkeypatch, capsys):
    change(workspace, "distill", epoch=3)
    assert exit_code(monkeypatch, "stitch") == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "error:" in error
    assert "distill.epoch: unknown key; did you mean `epochs`?" in error
    assert "Traceback" not in error


def test_wrong_settings_are_a_usage_error(workspace, monkeypatch, capsys):
    monkeypatch.setenv("PBKD_WORKER", "2")
    assert exit_code(monkeypatch, "report") == 2
    assert "unknown setting PBKD_WORKER" in capsys.readouterr().err


def test_no_parameters_at_all_are_a_usage_error(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert exit_code(monkeypatch, "inspect") == 2
    assert "run pbkd where params.yaml lies" in " ".join(capsys.readouterr().err.split())


def test_other_errors_of_ours_give_1_and_no_traceback(workspace, monkeypatch, capsys):
    shutil.rmtree(workspace.artifacts("stitch"))
    assert exit_code(monkeypatch, "finetune") == 1
    error = capsys.readouterr().err
    assert "run: pbkd stitch" in error
    assert "Traceback" not in error


def test_global_options_may_stand_behind_the_command(workspace, monkeypatch, capsys):
    shutil.rmtree(workspace.artifacts("stitch"))
    assert exit_code(monkeypatch, "finetune", "--debug") == 1
    assert "Traceback" in capsys.readouterr().err
    assert exit_code(monkeypatch, "finetune", "-q") == 1
    assert logging.getLogger("pbkd").level == logging.WARNING


def test_debug_shows_the_traceback(workspace, monkeypatch, capsys):
    shutil.rmtree(workspace.artifacts("stitch"))
    assert exit_code(monkeypatch, "--debug", "finetune") == 1
    error = capsys.readouterr().err
    assert "Traceback (most recent call last)" in error
    assert "ArtifactError" in error


def test_square_brackets_in_a_message_are_not_taken_for_markup(workspace, monkeypatch, capsys):
    change(workspace, "blocks", select="[red]")
    assert exit_code(monkeypatch, "blocks") == 2
    assert "[red]" in capsys.readouterr().err


def test_a_success_gives_0_in_a_shell(workspace):
    command = [sys.executable, "-m", "pbkd.cli", "-q", "shrink"]
    done = subprocess.run(command, cwd=workspace.root, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# ---------------------------------------------------------------- views


def test_inspect_shows_every_block_with_its_candidates_and_what_is_left_out(workspace):
    output = invoke("inspect")
    for path in ("features.3", "features.7", "features.10", "features.14", "features.17"):
        assert path in output
    assert "separable" in output


def test_inspect_needs_no_trained_teacher(workspace):
    shutil.rmtree(workspace.root / "artifacts")
    assert "features.17" in invoke("inspect")


def test_plan_compares_numbers_of_workers_and_draws_them(workspace, tmp_path, monkeypatch):
    monkeypatch.setenv("PBKD_WORKERS", "1")
    monkeypatch.setenv("PBKD_LOCK_DIR", str(tmp_path / "locks"))
    before = sorted(workspace.artifacts("").rglob("*"))
    output = invoke("plan", "--workers", "64,4,4")
    workers = re.findall(r"^│ (\d+(?: \(here\))?) +│", output, flags=re.M)
    assert workers == ["1 (here)", "4", "64"]
    assert "64 workers: " in output
    assert output.count("features.3/separable") == 1
    assert re.search(r"1 worker with \d+ CPU threads? measured on", " ".join(output.split()))
    page = workspace.state / "plan.html"
    assert str(Path(".pbkd") / "plan.html") in output
    assert "vgg_small, planned" in page.read_text()
    assert sorted(workspace.artifacts("").rglob("*")) == before

    profiles = {path: path.stat().st_mtime_ns for path in (workspace.state / "profiles").iterdir()}
    shutil.rmtree(workspace.artifacts("distill"))  # nothing of it is needed
    assert output.endswith(invoke("plan", "--workers", "64,4,4"))
    kept = {path: path.stat().st_mtime_ns for path in (workspace.state / "profiles").iterdir()}
    assert kept == profiles  # nothing is measured twice


def test_plan_names_what_is_missing_of_the_stages_before(workspace):
    shutil.rmtree(workspace.artifacts("blocks"))
    with pytest.raises(ArtifactError, match=r"blocks\.json is missing; run"):
        invoke("plan")


@pytest.mark.parametrize("workers", ["x", "", "0", "1,-2", "1,,2", "1.5"])
def test_plan_refuses_what_is_no_number_of_workers(workspace, workers):
    with pytest.raises(ConfigError, match=r"--workers: got .* expected numbers from 1 on"):
        invoke("plan", "--workers", workers)


def test_report_prints_the_table_and_where_things_are(workspace):
    receipt = {"tracking_uri": "sqlite:///.pbkd/mlflow.db", "name": "tiny", "versions": {}}
    for champion in (None, "7"):
        text = json.dumps(receipt | {"champion": champion})
        (workspace.results / "registered.json").write_text(text)
        output = invoke("report")
        assert "accuracy (test)" in output
        assert "Wall time per stage" in output
        assert "The teacher at " in output
        assert str(Path("results") / "report.html") in output
        assert f"champion: version {champion or 'none'}" in output
        assert ("models:/tiny@champion" in output) == (champion is not None)


def test_report_gives_commands_for_the_store_in_use(workspace, monkeypatch):
    receipt = {"tracking_uri": "sqlite:my.db", "name": "tiny", "versions": {}, "champion": "7"}
    (workspace.results / "registered.json").write_text(json.dumps(receipt))
    assert "in sqlite:my.db; set MLFLOW_TRACKING_URI" in invoke("report")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:////a b/my.db")
    output = invoke("report")
    assert "open it: mlflow server --backend-store-uri 'sqlite:////a b/my.db'\n" in output
    assert "load it: MLFLOW_TRACKING_URI='sqlite:////a b/my.db' python" in output


def test_report_says_that_nothing_is_registered_yet(workspace):
    output = invoke("report")
    assert "accuracy (test)" in output
    assert "pbkd register" in output


def test_report_before_a_run_names_the_stage_to_run(workspace):
    shutil.rmtree(workspace.results)
    with pytest.raises(ArtifactError, match="pbkd evaluate"):
        invoke("report")


def test_gc_empties_the_store_and_leaves_the_outputs(workspace):
    before = sorted(workspace.artifacts("").rglob("*"))
    assert str(workspace.store.root) in invoke("gc").replace("\n", "")
    assert not workspace.store.root.exists()
    assert sorted(workspace.artifacts("").rglob("*")) == before


def test_remeasure_forgets_the_latencies(workspace):
    kept = workspace.state / "measured"
    (old,) = [path.read_text() for path in kept.rglob("*.json")]
    invoke("evaluate")
    assert [path.read_text() for path in kept.rglob("*.json")] == [old]
    invoke("evaluate", "--remeasure")
    assert [path.read_text() for path in kept.rglob("*.json")] != [old]


# ---------------------------------------------------------------- the lock

HOLD = """
import sys, time
from pathlib import Path
from pbkd.locks import workspace_lock
root = Path(sys.argv[1])
with workspace_lock(root, root / ".pbkd"):
    Path(sys.argv[2]).touch()
    time.sleep(60)
"""


def test_verbs_that_write_refuse_a_workspace_that_another_process_holds(
    workspace, tmp_path, monkeypatch, capsys
):
    held = tmp_path / "held"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(workspace.root), str(held)])
    try:
        deadline = time.monotonic() + 60
        while not held.exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        for verb in ("shrink", "evaluate", "gc"):
            assert exit_code(monkeypatch, verb) == 1
            error = " ".join(capsys.readouterr().err.split())
            assert f"in use by process {holder.pid}" in error, verb
        assert workspace.store.root.exists()
        assert "accuracy (test)" in invoke("report")  # reading is free
    finally:
        holder.kill()
        holder.wait()
    assert exit_code(monkeypatch, "shrink") == 0  # a killed holder blocks nobody


STAGE = """
import time
from pbkd.cli.common import end_with_dvc
end_with_dvc()
print(1)
time.sleep(60)
"""
DVC = """
import os, subprocess, sys
command = [sys.executable, "-u", "-c", os.environ["STAGE"]]
stage = subprocess.Popen(
    ["sh", "-c", '"$0" "$@"; true', *command], env=os.environ | {"DVC_STAGE": "x"}
)
stage.wait()
"""


def test_a_stage_of_dvc_repro_ends_when_dvc_is_killed() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", DVC],
        env=os.environ | {"STAGE": STAGE},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as dvc:
        assert dvc.stdout is not None
        assert dvc.stderr is not None
        try:
            assert dvc.stdout.readline() == "1\n"
            (shell,) = psutil.Process(dvc.pid).children()
            (stage,) = shell.children()
            dvc.kill()
            psutil.wait_procs([stage], timeout=10)
            assert not stage.is_running()
            assert "DVC is gone" in dvc.stderr.read()
        finally:
            with suppress(ProcessLookupError):
                os.killpg(dvc.pid, signal.SIGKILL)
