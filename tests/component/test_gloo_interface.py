"""Gloo in the process group that Ray Train makes uses Ray's address, whatever address the machine's name has."""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import ray
import torch.distributed as dist
from ray import cloudpickle

from rm_robust.cluster.environment import INTERFACE_VARIABLE
from rm_robust.cluster.workers import run_on_workers
from rm_robust.config.run import PipelineConfig
from rm_robust.config.shared import WorkersConfig
from tests.support.local_serve import local_ray

pytestmark = pytest.mark.timeout(240)
cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import this file


@pytest.fixture(scope="module", autouse=True)
def _ray() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(INTERFACE_VARIABLE, raising=False)
        with local_ray(num_cpus=2):
            yield


def note_connections(config: PipelineConfig, run_dir: Path) -> dict[str, float]:
    """Write this rank's TCP connections and the interface that gloo was given to a file."""
    dist.barrier()
    connections = [
        [*connection.laddr, *connection.raddr]
        for connection in psutil.Process().net_connections("tcp")
        if connection.raddr
    ]
    (run_dir / f"{dist.get_rank()}.json").write_text(json.dumps([os.environ.get(INTERFACE_VARIABLE), connections]))
    dist.barrier()
    return {}


def test_train_workers_meet_at_rays_address(tmp_path: Path) -> None:
    address = ray.util.get_node_ip_address()
    run_on_workers(
        note_connections,
        stage="sft",
        config=PipelineConfig.model_validate({"name": "test"}),
        run_dir=tmp_path,
        workers=WorkersConfig(num_workers=2, num_cpus_per_worker=0.5),
    )
    (interface_0, connections_0), (interface_1, connections_1) = (
        json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)
    )
    assert interface_0 == interface_1
    assert address in [entry.address for entry in psutil.net_if_addrs()[interface_0]]
    other_ends = {tuple(connection[2:] + connection[:2]) for connection in connections_1}
    between = [connection for connection in connections_0 if tuple(connection) in other_ends]
    assert between, "gloo connects the ranks"
    assert {ip.removeprefix("::ffff:") for connection in between for ip in connection[::2]} == {address}
