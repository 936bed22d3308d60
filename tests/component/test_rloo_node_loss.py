"""RLOO on a cluster of several raylets that loses a raylet with its engine: the rest of the cluster takes over."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from rm_robust.rloo.controller import run_rloo
from rm_robust.runs.metrics import read_metrics
from tests.support.rloo_run import LengthScorer, actor_processes, rloo_config, rloo_run_dir, wait_for

pytestmark = pytest.mark.slow


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """Start a head for the trainer and two nodes for engines."""
    ray_dir = tempfile.mkdtemp(prefix="rn")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"RAY_AUTH_MODE": "disabled", "RAY_TMPDIR": ray_dir, "OMP_WAIT_POLICY": "PASSIVE"}.items():
            patch.setenv(name, value)
        patch.delenv("RAY_ADDRESS", raising=False)
        cluster = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 2,
                "resources": {"trainer": 1},
                "include_dashboard": False,
                "object_store_memory": 2**27,
            },
        )
        for _ in range(2):
            cluster.add_node(num_cpus=1, resources={"rollout": 1}, object_store_memory=2**27)
        ray.init(address=cluster.address, log_to_driver=False)
        try:
            yield cluster
        finally:
            ray.shutdown()
            cluster.shutdown()
    shutil.rmtree(ray_dir, ignore_errors=True)


def node_of_the_engine(cluster: Cluster) -> object:
    """Return the node whose raylet started the engine."""
    [engine] = actor_processes("RolloutEngine")
    [node] = [node for node in cluster.worker_nodes if node.all_processes["raylet"][0].process.pid == engine.ppid()]
    return node


def test_a_node_removed_with_its_engine_changes_nothing(cluster: Cluster, tmp_path: Path) -> None:
    trainers = {"num_workers": 1, "num_cpus_per_worker": 0.1, "resources_per_worker": {"trainer": 1}}
    config = rloo_config(tmp_path, num_steps=3, engine_resources={"rollout": 1}, trainers=trainers)
    undisturbed_dir, run_dir = (rloo_run_dir(config, tmp_path / name) for name in ("undisturbed", "run"))
    run_rloo(config, undisturbed_dir, proxy=LengthScorer(), gold=LengthScorer())
    removed: list[object] = []

    def remove_once() -> None:
        if len(read_metrics(run_dir, "rloo")) == 1 and not removed:
            removed.append(cluster)
            before = {process.pid for process in actor_processes("RolloutEngine")}
            cluster.remove_node(node_of_the_engine(cluster), allow_graceful=False)
            wait_for(
                lambda: not before & {process.pid for process in actor_processes("RolloutEngine")},
                what="the end of the node's engine",
            )

    result = run_rloo(config, run_dir, proxy=LengthScorer(), gold=LengthScorer(lambda inputs: remove_once()))
    assert len(removed) == 1
    counts = {name: result[name] for name in ("num_steps", "engines_replaced", "trainers_restarted")}
    assert counts == {"num_steps": 3, "engines_replaced": 1, "trainers_restarted": 0}
    keys = ("rloo/proxy_score_mean", "rloo/kl_mean", "rloo/loss", "rloo/gradient_norm")
    for actual, expected in zip(read_metrics(run_dir, "rloo"), read_metrics(undisturbed_dir, "rloo"), strict=True):
        assert {key: actual[key] for key in keys} == {key: expected[key] for key in keys}
