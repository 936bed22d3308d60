"""Start a real Ray and Serve for one test module, on loopback and in a folder of their own.

`local_service` starts a service on them as `python -m serve` does.
"""

import asyncio
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import ray
import ray.serve as ray_serve

from rm_robust.cluster.environment import free_port
from serve.__main__ import http_server
from serve.batching.front import Front
from serve.http.middleware import Guard
from serve.launch import deploy_models, start_serve_without_http
from serve.settings import ServiceSettings

STOPPED_WITHIN_S = 30.0


@dataclass(frozen=True)
class LocalService:
    """The HTTP side of a service, in a thread of the test's process, and the objects behind it."""

    url: str
    front: Front
    guard: Guard


@contextmanager
def local_ray(*, num_cpus: int, **environment: str) -> Iterator[None]:
    """Start a Ray that ends, with everything that runs on it, when the block ends.

    All of its processes get `environment`.
    """
    ray_dir = tempfile.mkdtemp(prefix="rs")  # short: Ray puts Unix sockets below it
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "RAY_AUTH_MODE": "disabled",
            "RAY_TMPDIR": ray_dir,
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
            **environment,
        }.items():
            patch.setenv(name, value)
        patch.delenv("RAY_ADDRESS", raising=False)
        ray.init(address="local", num_cpus=num_cpus, include_dashboard=False, _temp_dir=ray_dir, log_to_driver=False)
        try:
            yield
        finally:
            ray_serve.shutdown()
            ray.shutdown()
    shutil.rmtree(ray_dir, ignore_errors=True)


@contextmanager
def local_service(settings: ServiceSettings) -> Iterator[LocalService]:
    """Start a service inside `local_ray`. No other service there may have a model with the same name."""
    start_serve_without_http()
    front, guard = Front(settings, deploy_models(settings)), Guard(settings.api_keys)
    port = free_port("127.0.0.1")
    server = http_server(front, guard, "127.0.0.1", port)
    is_up = threading.Event()

    async def run() -> None:
        await front.start()
        serving = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        is_up.set()
        await serving

    thread = threading.Thread(target=asyncio.run, args=(run(),), name="front")
    thread.start()
    assert is_up.wait(60), "the front is not up"
    try:
        yield LocalService(f"http://127.0.0.1:{port}", front, guard)
    finally:
        server.should_exit = True
        thread.join(STOPPED_WITHIN_S)
        assert not thread.is_alive(), "the front did not stop"


def addresses_listening_at(port: int) -> list[str]:
    """Return the IPv4 addresses that listen at `port`, in the form of /proc/net/tcp: 0100007F is 127.0.0.1."""
    listening = [
        line.split()[1] for line in Path("/proc/net/tcp").read_text().splitlines()[1:] if line.split()[3] == "0A"
    ]
    return [address.split(":")[0] for address in listening if address.endswith(f":{port:04X}")]
