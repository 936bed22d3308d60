"""A real Ray and Serve of a test module's own, on loopback, in a folder of their own."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import ray
from ray import serve

from serve.launch import start_serve


@contextmanager
def local_serve(*, num_cpus: int) -> Iterator[str]:
    """The base URL of a Serve that ends, with its Ray, when the block does."""
    ray_dir = tempfile.mkdtemp(prefix="rs")  # short: Ray puts Unix sockets below it
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("RAY_AUTH_MODE", "disabled")
        environment.setenv("RAY_TMPDIR", ray_dir)
        environment.setenv("RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", "0")
        environment.delenv("RAY_ADDRESS", raising=False)
        ray.init(address="local", num_cpus=num_cpus, include_dashboard=False, _temp_dir=ray_dir, log_to_driver=False)
        try:
            yield start_serve("127.0.0.1", 0)
        finally:
            serve.shutdown()
            ray.shutdown()
    shutil.rmtree(ray_dir, ignore_errors=True)
