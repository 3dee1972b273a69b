"""Verbs about servers: everything on one machine, and runs by schedule or from a form."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, Annotated

import typer

from pbkd.cli.app import app
from pbkd.cli.common import this_workspace, use_quiet_prefect
from pbkd.errors import ConfigError
from pbkd.redaction import without_secrets

if TYPE_CHECKING:
    from pbkd.artifacts import Workspace

_POOL = "pbkd"
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Signals that end `pbkd up`; a shell lets what it starts by `&` ignore the first."""


@app.command(rich_help_panel="Servers")
def up(
    pool: Annotated[str, typer.Option(help="Work pool of the worker; made if missing.")] = _POOL,
    prefect_port: Annotated[int, typer.Option(min=1, max=65535)] = 4200,
    mlflow_port: Annotated[int, typer.Option(min=1, max=65535)] = 5000,
    host: Annotated[str, typer.Option(help="Address that both servers listen on.")] = "127.0.0.1",
) -> None:
    """Start Prefect's server, MLflow's server and a worker; Ctrl-C ends all three.

    A server that PREFECT_API_URL or MLFLOW_TRACKING_URI names is used, and not started.
    """
    use_quiet_prefect()
    from flows.up import running, services_of, watch
    from pbkd.tracking import prepare_store

    workspace = this_workspace()
    services, addresses = services_of(workspace, pool, host, prefect_port, mlflow_port)
    for number in _ENDING:
        signal.signal(number, _as_interrupt)
    names = ", ".join(service.name for service in services)
    print(f"starting {names}; this takes half a minute", flush=True)
    try:
        prepare_store(workspace)
        with running(services):
            print(f"Prefect:  {without_secrets(addresses.prefect)}")
            print(f"MLflow:   {without_secrets(addresses.mlflow)}")
            print(f"Worker:   of pool {pool}; logs in {workspace.state / 'logs'}")
            print("\nIn another terminal, in this workspace:")
            print(f"  export PREFECT_API_URL={without_secrets(addresses.prefect_api)}")
            print(f"  pbkd deploy --pool {pool}        # once")
            print(f"  prefect deployment run compress/{deployment_name(workspace)}")
            print("\nCtrl-C ends all of it, running flows too.", flush=True)
            watch(services)
    except KeyboardInterrupt:
        print("ended")


@app.command(rich_help_panel="Servers")
def deploy(
    pool: Annotated[str, typer.Option(help="Work pool of processes; made if missing.")] = _POOL,
    cron: Annotated[str | None, typer.Option(help='Run by itself, like "0 2 * * *".')] = None,
    timezone: Annotated[str | None, typer.Option(help="Of --cron. [default: UTC]")] = None,
    name: Annotated[str | None, typer.Option(help="[default: the workspace's folder]")] = None,
    wait: Annotated[
        bool, typer.Option("--wait", help="For a run that holds the workspace, instead of failing.")
    ] = False,
) -> None:
    """Make this workspace a deployment in Prefect: runs by schedule, from its pages, or by command.

    Needs PREFECT_API_URL. A worker of the pool runs it: `pbkd up`, or `prefect worker start`.

    Example: `pbkd deploy --pool gpu --cron "0 2 * * *"`
    """
    use_quiet_prefect()
    workspace = this_workspace()
    _check_prefect_is_named()
    from flows.deploy import deploy as make

    full = make(workspace, pool, name or deployment_name(workspace), cron, timezone, wait)
    when = f"by itself at `{cron}` ({timezone or 'UTC'})" if cron else "when it is told to"
    print(f"{full} runs {when}, by a worker of pool {pool}")
    print(f"run it now:      prefect deployment run {full}")
    print(
        f"with overrides:  prefect deployment run {full} -p 'overrides={{\"distill.epochs\": 20}}'"
    )


def deployment_name(workspace: Workspace) -> str:
    """The workspace's folder."""
    return workspace.root.name or "root"


def _check_prefect_is_named() -> None:
    from prefect.settings import PREFECT_API_URL

    if not PREFECT_API_URL.value():
        raise ConfigError(
            "PREFECT_API_URL is not set, so there is no server to deploy to; start one by `pbkd up`"
        )


def _as_interrupt(*_: object) -> None:
    for number in _ENDING:
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt
