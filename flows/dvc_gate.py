"""The gate between a full flow run and DVC: both drivers agree on what is up to date.

The only file that imports DVC. In a flow run the gate of a stage takes DVC's rwlock on the stage's
files, skips what ``dvc repro`` would skip, runs the stage from a recorded copy of the parameters,
and commits to dvc.lock only what still belongs to the recorded inputs. Under ``dvc repro`` DVC
does all of that itself, and the gate does nothing.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pbkd.artifacts import Workspace, atomic_path
from pbkd.errors import ArtifactError, ConfigError, MissingExtraError, WorkspaceBusyError

logger = logging.getLogger(__name__)

REPO_LOCK_TIMEOUT_S = 60.0
# Levels of DVC's loggers while it works here; the last two decide about progress bars.
_QUIET_LEVELS = {
    "dvc": logging.WARNING,
    "dvc_data": logging.WARNING,
    "dvc_objects": logging.WARNING,
    "dvc.progress": logging.CRITICAL,
    "dvc_data.callbacks": logging.CRITICAL,
}


@dataclass(frozen=True)
class Gate:
    """What the gate of a stage decided.

    ``params`` is the params.yaml that the stage must read, ``reason`` says in words for the log why
    the stage is skipped or runs.
    """

    up_to_date: bool
    params: Path
    reason: str


@contextmanager
def gate(
    stage: str, workspace: Workspace, still_valid: Callable[[], bool] = lambda: True
) -> Iterator[Gate]:
    """Hold a stage for a flow run; run the body of the ``with`` only if it is not up to date.

    The outputs are committed to DVC when the body succeeds. Where a dependency, a parameter or the
    command changed meanwhile, nothing is committed and a warning says what; where the body raises,
    nothing is committed and the exception passes.

    Args:
        still_valid: asked where DVC finds nothing changed; False: the stage runs all the same. For
            what DVC cannot see, such as a registry.

    Raises:
        WorkspaceBusyError: another process works on the stage's files; the message has its pid.
        ArtifactError: a dependency, or after the body an output, is missing; or DVC refused.
        ConfigError: params.yaml is missing or lacks what the stage reads; dvc.yaml is not valid.
        MissingExtraError: the workspace is a DVC project and DVC is not installed.
    """
    if "DVC_STAGE" in os.environ:
        yield Gate(False, workspace.params, "dvc repro runs it")
        return
    if not _in_project(workspace) or stage not in stage_names(workspace):
        yield Gate(False, workspace.params, "DVC does not know it")
        return
    with ExitStack() as held:
        with _repo(stage, workspace) as repo:
            held.enter_context(_rwlock(repo, _load(repo, stage, workspace)))
            decision, facts = _decide(repo, stage, workspace, still_valid)
        yield decision
        if decision.up_to_date:
            return
        with _repo(stage, workspace) as repo:
            changed = _commit(repo, stage, workspace, facts)
        if changed:
            logger.warning(
                "stage %s: changed during the run: %s; its outputs are not committed to DVC, and "
                "the next run will run the stage again",
                stage,
                ", ".join(changed),
            )


@contextmanager
def hold_pipeline(workspace: Workspace) -> Iterator[None]:
    """Hold the files of all stages for a whole flow run.

    Between two gates a ``dvc repro`` could begin a stage, and clear its outputs away, before the
    stage's verb finds the workspace taken. Gates within take the same locks again at no cost.

    Raises:
        WorkspaceBusyError: another process works on some stage's files; the message has its pid.
    """
    if "DVC_STAGE" in os.environ or not _in_project(workspace) or not stage_names(workspace):
        yield
        return
    with ExitStack() as held:
        with _repo("all", workspace) as repo:
            for name in stage_names(workspace):
                held.enter_context(_rwlock(repo, _load(repo, name, workspace)))
        yield


def stage_names(workspace: Workspace) -> list[str]:
    """Names of the stages in the workspace's dvc.yaml, in its order; empty where there is none."""
    path = workspace.root / "dvc.yaml"
    try:
        content = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        return []
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    return list((content or {}).get("stages") or {})


# ---------------------------------------------------------------- deciding and committing


def _decide(
    repo: Any, stage: str, workspace: Workspace, still_valid: Callable[[], bool]
) -> tuple[Gate, dict[str, Any]]:
    """Judge as ``dvc repro`` does; outputs are restored, or cleared away for the body.

    Each step loads the stage anew: a judgement overwrites the hashes that came from dvc.lock.
    """
    loaded = _load(repo, stage, workspace)
    if loaded.frozen:
        return Gate(True, workspace.params, "frozen in dvc.yaml"), {}
    if not loaded.changed():
        if still_valid():
            return Gate(True, workspace.params, "unchanged"), {}
        reason = "unchanged, but no longer valid"
    else:
        reason = _why(loaded)
    if _check_out_missing(loaded) and not _load(repo, stage, workspace).changed():
        return Gate(True, workspace.params, "outputs restored from DVC's cache"), {}

    # Before the removal: a missing dependency must not cost the outputs.
    params, facts = _record(_load(repo, stage, workspace), workspace)
    loaded = _load(repo, stage, workspace)
    loaded.remove_outs()
    if _restore_run(repo, loaded, workspace) and not _commit(repo, stage, workspace, facts):
        return Gate(True, workspace.params, "outputs restored from DVC's run cache"), {}
    return Gate(False, params, reason), facts


def _commit(repo: Any, stage: str, workspace: Workspace, facts: dict[str, Any]) -> list[str]:
    """Commit the outputs into dvc.lock if the facts still hold; else return what changed."""
    loaded = _load(repo, stage, workspace)
    now = _facts(loaded)
    changed = sorted(key for key in facts.keys() | now.keys() if facts.get(key) != now.get(key))
    if changed:
        return changed
    # Not stage.save(): it would hash the dependencies again, after the comparison.
    loaded.save_outs()
    all_cached = all(out.use_cache or out.is_metric or out.is_plot for out in loaded.outs)
    if all_cached and _has_run_cache(workspace):
        repo.stage_cache.save(loaded)
    loaded.commit()
    loaded.dump(update_pipeline=False)
    return []


def _record(loaded: Any, workspace: Workspace) -> tuple[Path, dict[str, Any]]:
    """The facts as they are now, and a copy of params.yaml that agrees with them."""
    content: bytes | None = None
    facts: dict[str, Any] = {}
    try:
        # An edit between reading and hashing would pair old values with new hashes.
        while content != (latest := workspace.params.read_bytes()):
            content, facts = latest, _facts(loaded)
    except FileNotFoundError:
        raise ConfigError(
            f"{workspace.params} does not exist; run pbkd where params.yaml lies"
        ) from None
    digest = hashlib.blake2b(latest, digest_size=16).hexdigest()
    copy = workspace.state / "params" / f"{digest}.yaml"
    with atomic_path(copy) as temporary:
        temporary.write_bytes(latest)
    return copy, facts


def _facts(loaded: Any) -> dict[str, Any]:
    """What the outputs depend on, as it is now: DVC's hashes and values, by names for messages."""
    loaded.save_deps()
    facts: dict[str, Any] = {
        "dvc.yaml: cmd": loaded.cmd,
        "dvc.yaml: outs": sorted(out.def_path for out in loaded.outs),
    }
    for dep in loaded.deps:
        value = dep.hash_info.value
        if isinstance(value, dict):
            facts |= {f"{dep.def_path}: {name}": entry for name, entry in value.items()}
        else:
            facts[dep.def_path] = value
    return facts


def _why(loaded: Any) -> str:
    deps, outs, command = loaded.changed_entries()
    names = ", ".join([*deps, *outs, *([command] if command else [])])
    return f"changed: {names}" if names else "always changed, or not in DVC's cache"


def _check_out_missing(loaded: Any) -> bool:
    """Check out outputs that are gone but lie in DVC's cache, if the inputs are unchanged.

    ``dvc repro`` does so for stages with a run cache; a stage with persistent outputs has none.
    """
    if loaded.changed_stage() or loaded.changed_deps():
        return False
    gone = [out for out in loaded.outs if out.use_cache and out.hash_info and not out.exists]
    found = [out for out in gone if not out.changed_cache()]
    for out in found:
        out.checkout()
    return bool(found)


def _restore_run(repo: Any, loaded: Any, workspace: Workspace) -> bool:
    from dvc.stage.cache import RunCacheNotFoundError

    if not _has_run_cache(workspace):
        return False
    try:
        repo.stage_cache.restore(loaded)
    except RunCacheNotFoundError:
        return False
    return True


def _has_run_cache(workspace: Workspace) -> bool:
    # DVC's run cache builds its stage from "dvc.yaml" relative to the current folder.
    return Path.cwd() == workspace.root


# ---------------------------------------------------------------- DVC's objects and locks


def _in_project(workspace: Workspace) -> bool:
    root = workspace.root
    return any((folder / ".dvc").is_dir() for folder in (root, *root.parents))


def _load(repo: Any, stage: str, workspace: Workspace) -> Any:
    return repo.stage.load_one(path=str(workspace.root / "dvc.yaml"), name=stage)


@contextmanager
def _repo(stage: str, workspace: Workspace) -> Iterator[Any]:
    """DVC's repository, made anew and locked: for the short moments of reading and writing."""
    with _quiet():
        from dvc.dependency.param import BadParamFileError, MissingParamsError
        from dvc.exceptions import DvcException
        from dvc.lock import LockError
        from dvc.repo import Repo
        from dvc.utils.serialize import ParseError

        try:
            root = str(workspace.root)
            with Repo(root) as repo, _repo_lock(repo), repo.scm_context(quiet=True):
                _write_whole_files(repo.fs)
                _mend_rwlock(Path(repo.tmp_dir) / "rwlock")
                yield repo
        except LockError as error:
            raise WorkspaceBusyError(f"stage {stage}: {error}") from error
        except (BadParamFileError, MissingParamsError) as error:
            raise ConfigError(f"stage {stage}: {error}; add them, or correct dvc.yaml") from error
        except DvcException as error:
            hint = "see dvc.yaml and dvc status"
            if isinstance(error, ParseError) and error.path.endswith("dvc.lock"):
                hint = "take it from git, or delete it: finished blocks are not trained again"
            raise ArtifactError(f"stage {stage}: {error}; {hint}") from error


@contextmanager
def _repo_lock(repo: Any) -> Iterator[None]:
    from dvc.lock import LockError

    deadline = time.monotonic() + REPO_LOCK_TIMEOUT_S
    while True:
        try:
            repo.lock.lock()  # gives up after 3 s: too soon while another process commits
            break
        except LockError:
            if time.monotonic() >= deadline:
                raise
    try:
        yield
    finally:
        repo.lock.unlock()


def _write_whole_files(fs: Any) -> None:
    """Let DVC's file system replace dvc.lock and the rwlock in one step.

    It truncates them and writes: a signal in between would leave half a file.
    """
    in_place = fs.open

    @contextmanager
    def replaced(path: str, mode: str, **options: Any) -> Iterator[Any]:
        with (
            atomic_path(Path(path).resolve()) as temporary,
            in_place(str(temporary), mode, **options) as file,
        ):
            yield file

    def opened(path: str, mode: str = "r", **options: Any) -> Any:
        return (replaced if mode in {"w", "w+"} else in_place)(path, mode, **options)

    fs.open = opened


def _mend_rwlock(path: Path) -> None:
    """Remove DVC's rwlock where a kill of DVC cut it off; whoever writes it holds DVC's lock."""
    try:
        json.loads(path.read_text())
    except FileNotFoundError:
        pass
    except ValueError:
        logger.warning("%s was cut off when DVC was killed; it is made anew", path)
        path.unlink()


def _rwlock(repo: Any, loaded: Any) -> Any:
    """DVC's lock on the stage's files: as ``dvc repro`` takes it, readable by both."""
    from dvc.rwlock import rwlock

    return rwlock(
        repo.tmp_dir,
        repo.fs,
        # The same words as in DVC's own calls, or its stage methods would wait for this process.
        " ".join(sys.argv),
        [dep.fs_path for dep in loaded.deps if dep.protocol == "local"],
        [out.fs_path for out in loaded.outs if out.protocol == "local"],
        repo.config["core"].get("hardlink_lock", False),
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Import DVC and hold back its chatter and progress bars; leave the process as it was.

    The first import wraps the standard streams (colorama), adds handlers that write to them, and
    silences asyncio's logger: none of this is a library's business.
    """
    levels = {
        name: logging.getLogger(name).level for name in (*_QUIET_LEVELS, "asyncio", "aiohttp")
    }
    streams = sys.stdout, sys.stderr
    is_first = "dvc" not in sys.modules
    try:
        import dvc  # noqa: F401
    except ImportError:
        raise MissingExtraError("dvc", "pipeline", "a run in a DVC project") from None
    if is_first:
        sys.stdout, sys.stderr = streams
        for name in _QUIET_LEVELS:
            logging.getLogger(name).handlers.clear()
    try:
        for name, level in _QUIET_LEVELS.items():
            logging.getLogger(name).setLevel(level)
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
