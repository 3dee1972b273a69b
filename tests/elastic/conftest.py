"""A Ray cluster of this machine, for the tests that need it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pbkd.elastic.actors import NAMESPACE, ray_module


@pytest.fixture(scope="module")  # its processes must not be in other tests' way
def cluster() -> Iterator[str]:
    """The address of a cluster with room for four teachers."""
    ray = ray_module()
    try:
        ray.init(
            "local", num_cpus=4, include_dashboard=False, log_to_driver=False, namespace=NAMESPACE
        )
    except Exception as error:  # noqa: BLE001 - whatever keeps Ray from starting
        pytest.skip(f"Ray does not start on this machine: {error}")
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()
