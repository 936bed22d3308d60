"""Ray's autoscaler with its fake provider: stages and load on a served model bring their own kind of node.

The nodes go again when nothing needs them. The provider is Ray's own for tests, and private: its nodes are raylets on
this machine. The autoscaler that decides is the real one, version 2.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import ray._private.services

from tests.e2e.pipeline_process import RUN_DEADLINE_S, Running, session_processes, wait_until
from tests.e2e.ray_cluster import Cluster, free_ports, ray_cluster
from tests.support.tiny_reward_model import save_tiny_reward_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2 * RUN_DEADLINE_S)]

HEAD_ID = "fffffffffffffffffffffffffffffffffffffffffffffffffff00000"
HEAD_TYPE = "ray.head.default"
"""The head's id and type, as in the fake provider."""
IDLE_S = 12
SCALED_WITHIN_S = 120
KINDS = {
    "data": {"CPU": 2, "data": 2},
    "trainer": {"CPU": 2, "GPU": 2, "trainer": 2},
    "rollout": {"CPU": 1, "GPU": 1, "rollout": 1},
    "serving": {"CPU": 1, "GPU": 2, "serving": 2},
}
"""The kinds of node, as in cluster.yaml.

Nothing uses the GPUs. They only keep other work away: the autoscaler starts a GPU node only for a process that asks for
something that the node has.
"""
SETTINGS = (
    "data.task_resources={data=1}",
    "sft.workers.resources_per_worker={trainer=1}",
    "reward_model.workers.resources_per_worker={trainer=1}",
    "evaluation.resources={trainer=1}",
    "rloo.trainers.resources_per_worker={rollout=1}",  # so that no trainer node is needed while the policy trains
    "rloo.num_steps=60",
    "rloo.engine_resources={rollout=1}",
    "serve.proxy_replica.resources={serving=1}",
    "serve.gold_replica.resources={serving=1}",
)
WATCH = """
import json, sys, time, ray
ray.init(log_to_driver=False)
with open(sys.argv[1], "a") as file:
    while True:
        kinds = [kind for node in ray.nodes() if node["Alive"] for kind in sys.argv[2:] if node["Resources"].get(kind)]
        file.write(json.dumps([time.time(), {kind: kinds.count(kind) for kind in sys.argv[2:]}]) + "\\n")
        file.flush()
        time.sleep(1)
"""
SERVE = """
import asyncio, sys
from pathlib import Path
import ray
import ray.serve as ray_serve
from rm_robust.scoring.contract import ScoreInput, ScoreRequest
from serve.batching.front import Front
from serve.launch import deploy_models, start_serve_without_http
from serve.settings import ModelSettings, ServiceSettings

checkpoint, load_ends, serving_ends = map(Path, sys.argv[1:])
model = ModelSettings(
    model_name="elastic", checkpoint_dir=checkpoint, max_replicas=2, upscale_delay_s=0.5, downscale_delay_s=1,
    max_batch_tokens=256, resources={"serving": 2},
)
inputs = [ScoreInput(prompt="apple river", completions=[f"stone {number}"]) for number in range(64)]
request = ScoreRequest(inputs=inputs)

async def ask(front):
    while not load_ends.exists():
        await front.score(request, "elastic")

async def work():
    settings = ServiceSettings(models=(model,), insecure_no_auth=True)
    front = Front(settings, deploy_models(settings))
    await front.start()
    print("serving", flush=True)
    await asyncio.gather(*(ask(front) for _ in range(8)))
    print("the load has ended", flush=True)
    while not serving_ends.exists():
        await asyncio.sleep(0.1)

ray.init(log_to_driver=False)
start_serve_without_http()
asyncio.run(work())
ray_serve.shutdown()
"""
"""A script that serves a model, of which a node has room for one replica, with clients that ask it all the time."""


def autoscaler_settings(gcs_address: str) -> dict[str, object]:
    """Return the settings that `ray up` would write on the head."""
    workers = {
        kind: {"resources": resources, "node_config": {}, "min_workers": 0, "max_workers": 2}
        for kind, resources in KINDS.items()
    }
    empty_lists = (
        "cluster_synced_files", "rsync_exclude", "rsync_filter", "initialization_commands", "setup_commands",
        "head_setup_commands", "worker_setup_commands", "head_start_ray_commands", "worker_start_ray_commands",
    )  # fmt: skip
    return {
        "cluster_name": "fake",
        "max_workers": 6,
        "idle_timeout_minutes": IDLE_S / 60,
        "upscaling_speed": 1.0,
        "provider": {
            "type": "external",  # "fake_multinode" needs an example file that Ray's wheel lacks
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "launch_multiple": True,
            "head_node_id": HEAD_ID,
            "gcs_address": gcs_address,
        },
        "available_node_types": {HEAD_TYPE: {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}, **workers},
        "head_node_type": HEAD_TYPE,
        "file_mounts": {},
        "file_mounts_sync_continuously": False,
        "auth": {},
        **{name: [] for name in empty_lists},
    }


@dataclass(frozen=True)
class Watched:
    cluster: Cluster
    watch: Path

    def counts(self) -> list[dict[str, int]]:
        """Return the number of nodes of each kind, second by second."""
        return [json.loads(line)[1] for line in self.watch.read_text().splitlines()] if self.watch.exists() else []

    def wait_until_all_are_gone(self) -> None:
        """Wait until all nodes and their processes are gone.

        For Ray a node is dead a little before the provider ends the node's log monitor. Once the head has stopped,
        nothing ends it.
        """

        def remaining() -> list[str]:
            log_monitors = [
                command
                for command in session_processes(self.cluster.head.session).values()
                if "log_monitor.py" in command
            ]
            kinds = [kind for kind, count in self.counts()[-1].items() if count]
            return kinds + log_monitors[1:]  # one log monitor is the head's

        wait_until(lambda: not remaining(), 10 * IDLE_S, lambda: f"still there: {remaining()}")


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    folder = tmp_path_factory.mktemp("autoscaler")
    port = free_ports(1)[0]
    config = folder / "autoscaler.json"
    config.write_text(json.dumps(autoscaler_settings(f"{ray._private.services.get_node_ip_address()}:{port}")))
    environment = {
        "RAY_FAKE_CLUSTER": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
    }
    with ray_cluster(
        folder, "ray start --head --num-cpus=0", f"--autoscaling-config={config}", port=port, environment=environment
    ) as cluster:
        (folder / "watch.py").write_text(WATCH)
        watching = Watched(cluster, folder / "watch.jsonl")
        watcher = cluster.launcher.command(
            "python",
            str(folder / "watch.py"),
            str(watching.watch),
            *KINDS,
            environment={"RAY_ADDRESS": cluster.gcs_address},
        )
        wait_until(lambda: bool(watching.counts()), RUN_DEADLINE_S, watcher.output)
        yield watching
        watcher.clean_up()


def test_every_stage_brings_its_kind_of_node_which_goes_again(watched: Watched) -> None:
    assert watched.counts()[-1] == dict.fromkeys(KINDS, 0)
    job: Running = watched.cluster.submit_in_place(*(part for setting in SETTINGS for part in ("--set", setting)))
    assert job.wait() == 0, job.output()[-4000:]
    most = {kind: max(count[kind] for count in watched.counts()) for kind in KINDS}
    assert all(1 <= count <= 2 for count in most.values()), most
    first = {kind: next(index for index, count in enumerate(watched.counts()) if count[kind]) for kind in KINDS}
    assert first["data"] < first["trainer"] < min(first["serving"], first["rollout"]), (
        "a kind of node comes when a stage needs it, not before"
    )
    at_work = [count for count in watched.counts()[first["trainer"] :] if count["rollout"]]
    assert any(count["trainer"] == 0 for count in at_work), (
        "nodes that no stage needs any more go while the pipeline still works"
    )
    watched.wait_until_all_are_gone()


def test_what_the_autoscaler_may_never_start_is_refused_at_once(watched: Watched) -> None:
    job = watched.cluster.submit_in_place(
        "--set", "name=large", "--set", "reward_model.workers.num_workers=5", "--set", SETTINGS[2]
    )
    assert job.wait(RUN_DEADLINE_S) != 0
    assert (
        "reward_model asks for 5 x {CPU: 1, trainer: 1} (reward_model.workers.num_workers), "
        "the cluster's maximum is 4 of them" in job.output()
    )


def test_load_on_a_served_model_brings_a_second_node_which_goes_with_it(watched: Watched, tmp_path: Path) -> None:
    checkpoint = save_tiny_reward_model(tmp_path / "model")
    (tmp_path / "service.py").write_text(SERVE)
    load_ends, serving_ends = tmp_path / "load_ends", tmp_path / "serving_ends"
    environment = {
        "RAY_ADDRESS": watched.cluster.gcs_address,
        "PYTHONPATH": ".",
        "RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "0.5",
    }
    service = watched.cluster.launcher.command(
        "python",
        str(tmp_path / "service.py"),
        str(checkpoint),
        str(load_ends),
        str(serving_ends),
        environment=environment,
    )

    def has(text: str, num_nodes: int) -> bool:
        assert service.process.poll() is None, service.output()[-4000:]
        return text in service.output() and watched.counts()[-1]["serving"] == num_nodes

    before = len(watched.counts())
    wait_until(
        lambda: has("serving", 2), SCALED_WITHIN_S, lambda: f"{watched.counts()[before:]}\n{service.output()[-4000:]}"
    )
    assert 1 in [count["serving"] for count in watched.counts()[before:]], (
        "the first replica had a node of its own before that"
    )
    load_ends.touch()
    wait_until(
        lambda: has("the load has ended", 1),
        SCALED_WITHIN_S,
        lambda: f"{watched.counts()[before:]}\n{service.output()[-4000:]}",
    )
    serving_ends.touch()
    assert service.wait(SCALED_WITHIN_S) == 0, service.output()[-4000:]
    watched.wait_until_all_are_gone()
