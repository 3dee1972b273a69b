"""The deployment of the flow: what Prefect's schedule and form start."""

from __future__ import annotations

import asyncio
from typing import Any
from uuid import UUID

from prefect import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.deployments.runner import RunnerDeployment
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from prefect.types.entrypoint import EntrypointType

from flows.compress import compress
from pbkd._version import __version__
from pbkd.artifacts import Workspace
from pbkd.errors import ConfigError, PbkdError

_POOL_TYPE = "process"


def deploy(
    workspace: Workspace,
    pool: str,
    name: str,
    cron: str | None,
    timezone: str | None,
    wait: bool,
) -> str:
    """Make, or renew, work pool and deployment.

    The deployment names the flow by its module, so that any machine with pbkd installed can run it,
    and the workspace by its absolute path.

    Args:
        pool: of processes; made where it is missing.
        cron: when to run by itself; None: never.
        timezone: of ``cron``, such as Europe/Berlin; None: UTC.
        wait: for a run that holds the workspace, instead of failing.

    Returns:
        ``compress/NAME``, for ``prefect deployment run``.

    Raises:
        ConfigError: the pool is of another type, or the schedule is not valid.
        PbkdError: the server does not take it.
    """
    try:
        asyncio.run(_make_pool(pool))
        _deployment(workspace, pool, name, cron, timezone, wait)
    except PrefectHTTPStatusError as error:
        raise PbkdError(f"Prefect does not take the deployment: {error}") from None
    return f"{compress.name}/{name}"


async def _make_pool(name: str) -> None:
    async with get_client() as client:
        try:
            pool = await client.read_work_pool(name)
        except ObjectNotFound:
            await client.create_work_pool(WorkPoolCreate(name=name, type=_POOL_TYPE))
            return
    if pool.type != _POOL_TYPE:
        raise ConfigError(
            f"--pool {name}: it is there, and of type {pool.type}; pbkd needs one of type process"
        )


def _deployment(
    workspace: Workspace,
    pool: str,
    name: str,
    cron: str | None,
    timezone: str | None,
    wait: bool,
) -> UUID:
    when: dict[str, Any] = {}
    if cron is not None:
        when["schedules"] = [_schedule(cron, timezone)]
    made = RunnerDeployment.from_flow(
        compress,
        name=name,
        description=f"Compresses the teacher of `{workspace.root}`; what is up to date is skipped.",
        version=__version__,
        tags=["pbkd"],
        parameters={
            "root": str(workspace.root),
            "state": str(workspace.state),
            "overrides": {},
            "if_busy": "wait" if wait else "fail",
        },
        work_pool_name=pool,
        # there a network of the user's own is found, as it is by `pbkd run`
        job_variables={"working_dir": str(workspace.root)},
        entrypoint_type=EntrypointType.MODULE_PATH,
        **when,
    )
    applied: Any = made.apply()
    return UUID(str(applied))


def _schedule(cron: str, timezone: str | None) -> Any:
    from prefect.client.schemas.schedules import CronSchedule

    try:
        return CronSchedule(cron=cron, timezone=timezone)
    except ValueError as error:
        wrong = "--timezone" if "timezone" in str(error) else "--cron"
        raise ConfigError(
            f"{wrong}: got `{cron}` in {timezone or 'UTC'}; expected five fields like `0 2 * * *`, "
            "and a time zone like Europe/Berlin"
        ) from None
