"""Start one Ray cluster on loopback for all of our contenders.

With several clusters, the idle ones would take cores from the contender whose turn it is.
"""

import os
import secrets
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from research.bench.rloo_turns import Contender, Turns

ADDRESS = "address"
NUM_CPUS = 2


@dataclass(frozen=True)
class Cluster:
    """The Ray cluster to start. The path of `folder` must be short, because Ray puts Unix sockets below it."""

    folder: Path


def start_local_ray(folder: Path, stack: ExitStack) -> int:
    """Start the cluster and name it in this process's environment. `stack` ends it.

    Returns the id of the process above all of the cluster's processes.
    """
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}
    os.environ.pop("RAY_ADDRESS", None)
    holder = Contender("the Ray cluster", _hold, Cluster(folder), stack).wait_until_ready()
    os.environ["RAY_ADDRESS"] = (folder / ADDRESS).read_text()
    return holder.process_id


def _hold(turns: Turns, cluster: Cluster) -> None:
    import ray

    ray.init(
        address="local",
        num_cpus=NUM_CPUS,
        include_dashboard=False,
        log_to_driver=False,
        _temp_dir=str(cluster.folder),
        _node_ip_address="127.0.0.1",
    )
    (cluster.folder / ADDRESS).write_text(ray.get_runtime_context().gcs_address)
    turns.next(None)
