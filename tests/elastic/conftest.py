"""A Ray cluster of this machine, started once for the tests that need it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pbkd.elastic.pool import NAMESPACE, ray_module


@pytest.fixture(scope="session")
def cluster() -> Iterator[str]:
    """The address of a cluster with room for four teachers."""
    ray = ray_module()
    ray.init("local", num_cpus=4, include_dashboard=False, log_to_driver=False, namespace=NAMESPACE)
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()
