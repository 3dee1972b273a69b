"""The gate against the real DVC: both drivers must agree, and a commit must never lie."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import runpy
import shutil
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TextIO

import pytest
import yaml

from flows import dvc_gate
from flows.dvc_gate import Gate, gate, stage_names
from pbkd.artifacts import Workspace
from pbkd.errors import ArtifactError, ConfigError, MissingExtraError, WorkspaceBusyError

STAGES = ["prepare", "train", "report"]

# One body for both drivers. runs.log, which DVC does not know, counts what really ran.
BODY = """
import os, sys, yaml
from pathlib import Path
from typing import TextIO

FILES = {
    "prepare": ("raw.txt", ["data/prepared/rows.txt"]),
    "train": ("data/prepared/rows.txt", ["artifacts/train/{train}.txt"]),
    "report": ("data/prepared/rows.txt", ["results/table.txt", "results/metrics.json"]),
}

def run(stage, root, params):
    values = yaml.safe_load(Path(params).read_text())
    source, targets = FILES[stage]
    for target in targets:
        path = root / target.format(train=values["train"]["width"])
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name("." + path.name)
        content = (root / source).read_text() + f"{stage} {values[stage]}\\n"
        temporary.write_text(repr(content) if path.suffix == ".json" else content)
        os.replace(temporary, path)
    with (root / "runs.log").open("a") as log:
        log.write(stage + "\\n")

if __name__ == "__main__":
    run(sys.argv[1], Path.cwd(), "params.yaml")
"""

PARAMS = {"seed": 1, "prepare": {"size": 8}, "train": {"width": 4}, "report": {"title": "t"}}


def pipeline() -> dict[str, object]:
    def stage(name: str, dep: str, **outs: object) -> dict[str, object]:
        command = f"{sys.executable} body.py {name}"
        return {"cmd": command, "deps": [dep], "params": ["seed", name], **outs}

    return {
        "stages": {
            "prepare": stage("prepare", "raw.txt", outs=["data/prepared"]),
            "train": stage("train", "data/prepared", outs=[{"artifacts/train": {"persist": True}}]),
            "report": stage(
                "report",
                "data/prepared",
                outs=["results/table.txt"],
                metrics=[{"results/metrics.json": {"cache": False}}],
            ),
        }
    }


def dvc(root: Path, *arguments: str, code: int | None = 0) -> str:
    environ = {key: value for key, value in os.environ.items() if not key.startswith("DVC_")}
    done = subprocess.run(
        [sys.executable, "-m", "dvc", *arguments],
        cwd=root,
        env={**environ, "DVC_NO_ANALYTICS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    output = done.stdout + done.stderr
    assert code is None or done.returncode == code, output
    return output


def make_project(root: Path, site_cache: Path) -> None:
    root.mkdir()
    dvc(root, "init", "--no-scm", "--quiet")
    (root / ".dvc" / "config").write_text(
        textwrap.dedent(f"""\
        [core]
            analytics = false
            check_update = false
            no_scm = true
            site_cache_dir = {site_cache}
        [cache]
            type = "hardlink,symlink"
        """)
    )
    (root / "raw.txt").write_text("raw\n")
    (root / "body.py").write_text(BODY)
    (root / "params.yaml").write_text(yaml.safe_dump(PARAMS))
    (root / "dvc.yaml").write_text(yaml.safe_dump(pipeline(), sort_keys=False))
    (root / ".dvcignore").write_text("/.pbkd\n")


class Project:
    """A workspace copied from a template, and how the tests look at it and run it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.workspace = Workspace(root, root / ".pbkd")
        self.body = runpy.run_path(str(root / "body.py"))["run"]

    def run(self, stage: str, inside: Callable[[Gate], object] = lambda gate: None) -> Gate:
        """As the flow does: the body runs if the gate lets it, ``inside`` before it."""
        with gate(stage, self.workspace) as decision:
            if not decision.up_to_date:
                inside(decision)
                self.body(stage, self.root, decision.params)
        return decision

    def run_all(self) -> list[str]:
        return [stage for stage in STAGES if not self.run(stage).up_to_date]

    def set_param(self, section: str, **values: object) -> None:
        params = yaml.safe_load((self.root / "params.yaml").read_text())
        params[section] |= values
        (self.root / "params.yaml").write_text(yaml.safe_dump(params))

    def runs(self) -> list[str]:
        log = self.root / "runs.log"
        return log.read_text().split() if log.exists() else []

    def locked(self) -> dict[str, object]:
        lock = self.root / "dvc.lock"
        return dict(yaml.safe_load(lock.read_text())["stages"]) if lock.exists() else {}

    def rwlock(self) -> dict[str, object]:
        return dict(json.loads((self.root / ".dvc" / "tmp" / "rwlock").read_text()))

    def status(self) -> dict[str, object]:
        return dict(json.loads(dvc(self.root, "status", "--json")))

    def assert_repro_runs_nothing(self) -> None:
        before = self.runs()
        dvc(self.root, "repro")
        assert self.runs() == before


@pytest.fixture(scope="module")
def fresh_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("template")
    make_project(folder / "fresh", folder / "site")
    return folder / "fresh"


@pytest.fixture(scope="module")
def done_template(fresh_template: Path) -> Path:
    """The project after a ``dvc repro``."""
    root = fresh_template.with_name("done")
    shutil.copytree(fresh_template, root)
    dvc(root, "repro")
    return root


def copy(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    monkeypatch.delenv("DVC_STAGE", raising=False)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    root = tmp_path / "project"
    shutil.copytree(template, root)
    monkeypatch.chdir(root)
    return Project(root)


@pytest.fixture
def fresh(fresh_template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    return copy(fresh_template, tmp_path, monkeypatch)


@pytest.fixture
def done(done_template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    return copy(done_template, tmp_path, monkeypatch)


# ---------------------------------------------------------------- agreement of the two drivers


def test_after_a_gate_run_dvc_has_nothing_to_do(fresh: Project) -> None:
    assert fresh.run_all() == STAGES
    assert fresh.status() == {}
    fresh.assert_repro_runs_nothing()
    assert fresh.run_all() == []


def test_after_dvc_repro_the_gate_has_nothing_to_do(done: Project) -> None:
    before = (done.root / "dvc.lock").read_text()
    assert done.runs() == STAGES
    assert done.run_all() == []
    assert (done.root / "dvc.lock").read_text() == before


def test_the_gate_works_from_another_folder(
    fresh: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir("/")
    assert fresh.run_all() == STAGES
    fresh.assert_repro_runs_nothing()


def test_the_gate_works_in_task_threads(fresh: Project) -> None:
    for stage in STAGES:
        with ThreadPoolExecutor(1) as pool:
            assert not pool.submit(fresh.run, stage).result().up_to_date
    assert fresh.run_all() == []


def test_a_parameter_of_another_section_changes_nothing(done: Project) -> None:
    done.set_param("report", title="other")
    assert done.run("train").up_to_date
    assert not done.run("report").up_to_date


def test_an_own_parameter_runs_the_stage_once(done: Project) -> None:
    done.set_param("train", width=5)
    decision = done.run("train")
    assert not decision.up_to_date
    assert "params.yaml" in decision.reason
    assert done.run_all() == []
    done.assert_repro_runs_nothing()


def test_a_changed_command_runs_the_stage(done: Project) -> None:
    content = pipeline()
    content["stages"]["train"]["cmd"] += " --again"  # type: ignore[index]
    (done.root / "dvc.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    assert done.run_all() == ["train"]


def test_a_frozen_stage_does_not_run(done: Project) -> None:
    content = pipeline()
    content["stages"]["train"] |= {"frozen": True, "cmd": "false"}  # type: ignore[index]
    (done.root / "dvc.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    done.set_param("train", width=5)
    assert done.run_all() == []


def test_an_earlier_result_comes_from_the_run_cache(done: Project) -> None:
    table = done.root / "results" / "table.txt"
    first = table.read_text()
    done.set_param("report", title="other")
    done.run("report")
    assert table.read_text() != first
    done.set_param("report", title="t")
    assert done.run("report").up_to_date
    assert table.read_text() == first
    assert done.status() == {}


def test_dvc_repro_finds_our_run_in_its_run_cache(done: Project) -> None:
    done.set_param("report", title="other")
    done.run("report")
    done.set_param("report", title="t")
    done.run("report")
    done.set_param("report", title="other")
    done.assert_repro_runs_nothing()
    assert "other" in (done.root / "results" / "table.txt").read_text()


def test_git_project_with_autostage(
    fresh_template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = copy(fresh_template, tmp_path, monkeypatch)
    config = project.root / ".dvc" / "config"
    config.write_text(config.read_text().replace("no_scm = true", "autostage = true"))
    subprocess.run(["git", "init", "--quiet"], cwd=project.root, check=True)
    assert project.run_all() == STAGES
    staged = subprocess.run(
        ["git", "diff", "--cached", "--name-only"],
        cwd=project.root,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()
    assert "dvc.lock" in staged
    assert "artifacts/.gitignore" in staged
    assert project.status() == {}


# ---------------------------------------------------------------- a commit must not lie


def test_params_edited_during_the_body(done: Project, caplog: pytest.LogCaptureFixture) -> None:
    done.set_param("train", width=5)
    before = done.locked()

    def edit(decision: Gate) -> None:
        done.set_param("train", width=6)
        assert yaml.safe_load(decision.params.read_text())["train"] == {"width": 5}
        assert decision.params.is_relative_to(done.workspace.state)

    done.run("train", edit)
    assert (done.root / "artifacts" / "train" / "5.txt").exists()
    assert done.locked() == before
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert "stage train: changed during the run: params.yaml: train" in record.getMessage()
    assert "train" in done.status()
    assert not done.run("train").up_to_date


def test_another_section_edited_during_the_body_is_committed(done: Project) -> None:
    done.set_param("train", width=5)
    done.run("train", lambda decision: done.set_param("report", title="other"))
    assert done.run("train").up_to_date


def test_params_edited_between_reading_and_hashing(
    done: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    done.set_param("train", width=5)
    facts, edits = dvc_gate._facts, [6]

    def edit_then_hash(loaded: object) -> dict[str, object]:
        if edits:
            done.set_param("train", width=edits.pop())
        return facts(loaded)

    monkeypatch.setattr(dvc_gate, "_facts", edit_then_hash)
    decision = done.run("train")
    assert yaml.safe_load(decision.params.read_text())["train"] == {"width": 6}


def test_dependency_edited_during_the_body(done: Project) -> None:
    done.set_param("train", width=5)
    before = done.locked()
    rows = done.root / "data" / "prepared" / "new.txt"
    done.run("train", lambda decision: rows.write_text("new\n"))
    assert done.locked() == before


def test_command_edited_during_the_body(done: Project) -> None:
    done.set_param("train", width=5)
    before = done.locked()
    path = done.root / "dvc.yaml"
    text = path.read_text()
    done.run("train", lambda decision: path.write_text(text.replace("body.py", "./body.py")))
    assert done.locked() == before


def test_a_body_that_raises_commits_nothing_and_frees_the_lock(done: Project) -> None:
    done.set_param("train", width=5)
    before = done.locked()
    error = ZeroDivisionError("boom")

    def fail(decision: Gate) -> None:
        assert done.rwlock()["write"]
        raise error

    with pytest.raises(ZeroDivisionError) as caught:
        done.run("train", fail)
    assert caught.value is error
    assert caught.value.__context__ is None
    assert done.locked() == before
    assert not any(done.rwlock().values())
    assert not done.run("train").up_to_date
    assert done.run("train").up_to_date


@pytest.mark.parametrize("content", ["", '{"write": {"/some/wh'])
def test_a_lock_that_a_kill_of_dvc_cut_off_is_made_anew(
    done: Project, caplog: pytest.LogCaptureFixture, content: str
) -> None:
    (done.root / ".dvc" / "tmp" / "rwlock").write_text(content)
    assert done.run("train").up_to_date
    assert "rwlock was cut off" in caplog.text
    assert not any(done.rwlock().values())
    done.assert_repro_runs_nothing()


def test_a_broken_lock_file_says_what_to_do(done: Project) -> None:
    (done.root / "dvc.lock").write_text("stages: {")
    with pytest.raises(ArtifactError, match=r"dvc\.lock.* take it from git, or delete it"):
        done.run("train")


def test_an_interrupted_write_of_the_lock_leaves_the_old_one(
    done: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    done.set_param("train", width=5)

    def write_a_half(value: object, file: TextIO) -> None:
        file.write("{")
        file.flush()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("dvc.rwlock.json.dump", write_a_half)
        with pytest.raises(KeyboardInterrupt):
            done.run("train")
    assert isinstance(done.rwlock(), dict)
    assert not done.run("train").up_to_date
    assert not list((done.root / ".dvc" / "tmp").glob("*.tmp"))


def test_an_interrupted_write_of_dvcs_lock_file_leaves_the_old_one(
    done: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    done.set_param("train", width=5)
    before = done.locked()

    def write_a_half(data: object, stream: TextIO) -> None:
        stream.write("schema: '2.0'\nstages: {")
        stream.flush()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("dvc.utils.serialize._yaml._dump", write_a_half)
        with pytest.raises(KeyboardInterrupt):
            done.run("train")
    assert done.locked() == before
    assert not done.run("train").up_to_date
    done.assert_repro_runs_nothing()


def test_a_missing_output_is_an_error(done: Project) -> None:
    done.set_param("report", title="other")
    before = done.locked()
    with (
        pytest.raises(ArtifactError, match=r"stage report: .*table\.txt.* does not exist"),
        gate("report", done.workspace),
    ):
        pass
    assert done.locked() == before


def test_a_missing_dependency_is_an_error_and_costs_no_output(done: Project) -> None:
    shutil.rmtree(done.root / "data" / "prepared")
    with pytest.raises(ArtifactError, match=r"stage report: .*data/prepared.* does not exist"):
        done.run("report")
    assert (done.root / "results" / "table.txt").exists()


def test_a_missing_parameter_is_an_error(done: Project) -> None:
    (done.root / "params.yaml").write_text("seed: 1\n")
    with pytest.raises(ConfigError, match=r"stage train: .*train.*missing from 'params\.yaml'"):
        done.run("train")


# ---------------------------------------------------------------- locks


def test_a_concurrent_dvc_repro_is_refused(done: Project) -> None:
    done.set_param("train", width=5)
    output = []
    done.run("train", lambda decision: output.append(dvc(done.root, "repro", "train", code=None)))
    assert "is busy" in output[0]
    assert f"(PID {os.getpid()}): {' '.join(sys.argv)}" in output[0]
    assert done.runs() == [*STAGES, "train"]
    assert done.run("train").up_to_date


def test_another_stage_may_be_reproduced_meanwhile(done: Project) -> None:
    done.set_param("train", width=5)
    done.set_param("report", title="other")
    done.run("train", lambda decision: print(dvc(done.root, "repro", "--single-item", "report")))
    assert done.runs() == [*STAGES, "report", "train"]
    assert done.run_all() == []


def write_rwlock(project: Project, pid: int) -> None:
    holder = {"pid": pid, "cmd": "dvc repro train"}
    content = {"write": {str(project.root / "artifacts" / "train"): holder}}
    (project.root / ".dvc" / "tmp" / "rwlock").write_text(json.dumps(content))


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as running:
        yield running
        running.kill()


def test_a_live_holder_is_named(done: Project, process: subprocess.Popen[bytes]) -> None:
    write_rwlock(done, process.pid)
    with pytest.raises(WorkspaceBusyError, match=rf"(?s)train.*PID {process.pid}\): dvc repro"):
        done.run("train")
    assert done.run("report").up_to_date


def test_a_dead_holder_is_no_obstacle(done: Project, process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    write_rwlock(done, process.pid)
    assert done.run("train").up_to_date


@pytest.fixture
def impatient_dvc(monkeypatch: pytest.MonkeyPatch) -> None:
    """DVC's own wait, 3 s, shortened to keep the tests short."""
    with dvc_gate._quiet():  # the first import of DVC has side effects on the process
        import dvc.lock  # noqa: F401
    monkeypatch.setattr("dvc.lock.DEFAULT_TIMEOUT", 0.1)


@pytest.mark.usefixtures("impatient_dvc")
def test_the_repository_lock_is_waited_for(done: Project) -> None:
    with (done.root / ".dvc" / "tmp" / "lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        threading.Timer(2.0, fcntl.flock, (file, fcntl.LOCK_UN)).start()
        start = time.monotonic()
        assert done.run("train").up_to_date
        assert time.monotonic() - start > 1.5


@pytest.mark.usefixtures("impatient_dvc")
def test_the_repository_lock_is_waited_for_in_vain(
    done: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dvc_gate, "REPO_LOCK_TIMEOUT_S", 0.0)
    with (done.root / ".dvc" / "tmp" / "lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(WorkspaceBusyError, match="another DVC process"):
            done.run("train")


def test_the_repository_lock_is_free_during_the_body(done: Project) -> None:
    def take(decision: Gate) -> None:
        with (done.root / ".dvc" / "tmp" / "lock").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    done.set_param("train", width=5)
    assert not done.run("train", take).up_to_date


# ---------------------------------------------------------------- outputs


def test_persistent_outputs_stay_and_others_go(done: Project) -> None:
    def look(decision: Gate) -> None:
        assert (done.root / "artifacts" / "train" / "4.txt").exists()

    def look_again(decision: Gate) -> None:
        assert not (done.root / "results" / "table.txt").exists()
        assert not (done.root / "results" / "metrics.json").exists()

    done.set_param("train", width=5)
    done.run("train", look)
    done.set_param("report", title="other")
    done.run("report", look_again)
    assert done.runs() == [*STAGES, "train", "report"]


def cached(root: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_persistent_outputs_are_unprotected_and_the_cache_stays_whole(fresh: Project) -> None:
    fresh.run_all()
    old = fresh.root / "artifacts" / "train" / "4.txt"
    assert old.stat().st_nlink == 2  # committed as a hard link, or this test shows nothing
    before = cached(fresh.root / ".dvc" / "cache" / "files")

    def write_in_place(decision: Gate) -> None:
        assert old.stat().st_nlink == 1
        old.write_text("written in place\n")

    fresh.set_param("train", width=5)
    fresh.run("train", write_in_place)
    after = cached(fresh.root / ".dvc" / "cache" / "files")
    assert before.items() <= after.items()
    assert fresh.status() == {}


@pytest.mark.parametrize(("stage", "output"), [("train", "artifacts"), ("prepare", "data")])
def test_missing_outputs_come_from_the_cache(done: Project, stage: str, output: str) -> None:
    shutil.rmtree(done.root / output)
    assert done.run(stage).up_to_date
    assert done.runs() == STAGES
    assert done.status() == {}


def test_missing_outputs_that_are_not_cached_are_made_again(done: Project) -> None:
    shutil.rmtree(done.root / "artifacts")
    shutil.rmtree(done.root / ".dvc" / "cache")
    assert not done.run("train").up_to_date
    assert done.run("train").up_to_date


def test_modified_outputs_do_not_count_as_up_to_date(done: Project) -> None:
    path = done.root / "artifacts" / "train" / "4.txt"
    path.unlink()
    path.write_text("modified\n")
    assert not done.run("train").up_to_date
    assert done.status() == {}


# ---------------------------------------------------------------- where the gate stays out


def test_under_dvc_repro_it_does_nothing(done: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DVC_STAGE", "train")
    write_rwlock(done, os.getpid())
    before = done.locked()
    decision = done.run("train")
    assert not decision.up_to_date
    assert decision.params == done.workspace.params
    assert done.locked() == before


def test_outside_a_dvc_project_it_does_nothing(fresh: Project) -> None:
    shutil.rmtree(fresh.root / ".dvc")
    assert fresh.run("prepare").params == fresh.workspace.params
    assert not (fresh.root / "dvc.lock").exists()


def test_a_stage_that_dvc_does_not_know(fresh: Project) -> None:
    with gate("unknown", fresh.workspace) as decision:
        assert not decision.up_to_date
        assert decision.params == fresh.workspace.params


def test_stage_names(fresh: Project) -> None:
    assert stage_names(fresh.workspace) == STAGES
    (fresh.root / "dvc.yaml").unlink()
    assert stage_names(fresh.workspace) == []


def test_without_dvc_the_extra_is_named(done: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dvc", None)
    with pytest.raises(MissingExtraError, match=r"pbkd\[pipeline\]"):
        done.run("train")


def test_dvc_is_quiet_and_leaves_the_process_as_it_was(
    fresh_template: Path, tmp_path: Path
) -> None:
    root = tmp_path / "project"
    shutil.copytree(fresh_template, root)
    script = f"""
import logging, runpy, sys
from pathlib import Path
from typing import TextIO
from flows.dvc_gate import gate
from pbkd.artifacts import Workspace

assert "dvc" not in sys.modules
logging.basicConfig(level=logging.INFO)
names = ["dvc", "dvc.progress", "dvc_data", "dvc_data.callbacks", "asyncio", "aiohttp"]
before = [logging.getLogger(name).level for name in names], sys.stdout, sys.stderr
root = Path({str(root)!r})
body = runpy.run_path("body.py")["run"]
for stage in {STAGES!r}:
    with gate(stage, Workspace(root, root / ".pbkd")) as decision:
        body(stage, root, decision.params)
assert ([logging.getLogger(name).level for name in names], sys.stdout, sys.stderr) == before
assert not logging.getLogger("dvc").handlers
"""
    environ = {key: value for key, value in os.environ.items() if not key.startswith("DVC_")}
    path = str(Path(dvc_gate.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=root,
        env={**environ, "PYTHONPATH": path, "DVC_IGNORE_ISATTY": "1"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (root / "dvc.lock").exists()
