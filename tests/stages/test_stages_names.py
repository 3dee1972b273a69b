"""One name everywhere, and each stage reads only the parameters that dvc.yaml lists for it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import yaml

from pbkd.cli import app
from pbkd.config import Params
from pbkd.stages import STAGES

ROOT = Path(__file__).parents[2]
DVC = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]

LOGS_ALL_PARAMETERS = {"register"}
"""`register` records the whole of params.yaml with the run; its result depends on its own only."""

READ_BY_HELPERS = {"finetune": {"teacher"}}
"""What another file of a stage reads: `baselines` takes the teacher's recipe."""


def cli_verbs() -> set[str]:
    commands = [c for c in app.registered_commands if c.rich_help_panel == "Stages"]
    return {command.name or command.callback.__name__ for command in commands}


def sections() -> set[str]:
    return {field.alias or name for name, field in Params.model_fields.items()} - {"seed"}


def stage_files() -> set[str]:
    names = {path.stem for path in (ROOT / "pbkd" / "stages").glob("*.py")}
    shared = {"__init__", "context", "preflight", "preview", "budgets"}
    of_one_stage = {"planning", "repair_job", "student_job", "labels", "baselines", "run_page"}
    return names - shared - of_one_stage - {"device_time", "runtimes"}


@pytest.mark.parametrize(
    ("where", "names"),
    [
        ("verbs of the panel Stages", cli_verbs()),
        ("sections of params.yaml", sections()),
        ("stages of dvc.yaml", set(DVC)),
        ("files in pbkd/stages", stage_files()),
    ],
)
def test_a_stage_has_one_name_everywhere(where, names):
    assert names == set(STAGES), where


def test_the_repositorys_params_name_stages_only():
    assert set(yaml.safe_load((ROOT / "params.yaml").read_text())) - {"seed"} <= set(STAGES)


def test_the_flow_runs_the_stages_in_their_order():
    tree = ast.parse((ROOT / "flows" / "compress.py").read_text())
    imported = [
        node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and any(name.name == "STAGES" for name in node.names)
    ]
    loops = [ast.unparse(node.iter) for node in ast.walk(tree) if isinstance(node, ast.For)]
    assert imported == ["pbkd.stages"]
    assert loops.count("STAGES") == 1


def test_stages_follow_what_they_depend_on():
    for index, name in enumerate(STAGES):
        used = {dep.removeprefix("artifacts/") for dep in DVC[name].get("deps", ())}
        assert not used & set(STAGES[index:]), name


@pytest.mark.parametrize("name", STAGES)
def test_the_command_is_the_verb_and_the_outputs_lie_where_the_stage_writes(name):
    assert DVC[name]["cmd"] == f"pbkd {name}"
    outs = [*DVC[name].get("outs", ()), *DVC[name].get("metrics", ())]
    paths = {next(iter(out)) if isinstance(out, dict) else out for out in outs}
    expected = {
        "prepare": {"data/prepared"},
        "evaluate": {
            f"results/{name}"
            for name in ("metrics.json", "measured.json", "models.json", "report.html")
        },
        "register": {"results/registered.json"},
    }
    assert paths == expected.get(name, {f"artifacts/{name}"})


def sections_read(source: str) -> set[str]:
    """Names behind ``params.`` in ``run`` and in the functions of the file that it reaches."""
    functions = {
        node.name: node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)
    }
    reached: set[str] = set()
    todo = ["run"]
    while todo:
        name = todo.pop()
        if name in reached:
            continue
        reached.add(name)
        names = {n.id for n in ast.walk(functions[name]) if isinstance(n, ast.Name)}
        todo += names & set(functions)
    return {
        node.attr.rstrip("_")
        for name in reached
        for node in ast.walk(functions[name])
        if isinstance(node, ast.Attribute) and ast.unparse(node.value).endswith("params")
    }


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_reads_the_sections_that_dvc_watches_for_it_and_no_others(name):
    read = sections_read((ROOT / "pbkd" / "stages" / f"{name}.py").read_text())
    declared = {param.split(".")[0] for param in DVC[name]["params"]}
    assert read | READ_BY_HELPERS.get(name, set()) == declared


@pytest.mark.parametrize("name", sorted(set(STAGES) - LOGS_ALL_PARAMETERS))
def test_no_stage_hands_all_parameters_on(name):
    tree = ast.parse((ROOT / "pbkd" / "stages" / f"{name}.py").read_text())
    whole = {
        ast.unparse(node)
        for call in ast.walk(tree)
        if isinstance(call, ast.Call)
        for node in call.args
        if ast.unparse(node).endswith("context.params")
    }
    assert whole == set()
