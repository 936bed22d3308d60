"""A head that does no work and two workers, with a token, as docs/cluster/machines.md starts them.

The tests submit a job, kill its driver, resume it, and check what is refused.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from tests.e2e.pipeline_process import RUN_DEADLINE_S, SMOKE_CONFIG, STAGE_DEADLINE_S, wait_until
from tests.e2e.ray_cluster import Cluster, free_ports, kill_the_driver_and_submit_again, ray_cluster

pytestmark = [pytest.mark.slow, pytest.mark.timeout(4 * RUN_DEADLINE_S)]

NUM_WORKERS = 2
CPUS_OF_A_WORKER = 2
NUM_STOPPED_STEPS = 300
"""A number of steps that is not reached while a second submit is refused."""
OF_RAY_ITSELF = re.compile(
    r"ServeController|ProxyActor|Keeper|JobSupervisor|PreemptionWatcher|_StatsActor|AutoscalingRequester"
    r"|DatasetStats|ActorLocation|AutoscalingCoordinator|StatsSummary|UsageCollection"
)
"""The actors that Ray keeps on the head or near the driver, and that do no work of ours."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with ray_cluster(tmp_path_factory.mktemp("cluster"), "ray start --head --num-cpus=0") as started:
        for _ in range(NUM_WORKERS):
            started.add_worker(f"--num-cpus={CPUS_OF_A_WORKER}")
        wait_until(lambda: len(started.states_of("nodes")) == 1 + NUM_WORKERS, STAGE_DEADLINE_S, started.head.output)
        yield started


def test_a_job_uses_the_workers_and_not_the_head_and_resumes_after_its_driver_was_killed(cluster: Cluster) -> None:
    kill_the_driver_and_submit_again(cluster)
    (head_id,) = (node["node_id"] for node in cluster.states_of("nodes") if node["is_head_node"])
    actors = [actor for actor in cluster.states_of("actors") if not OF_RAY_ITSELF.search(actor["class_name"])]
    tasks = [task for task in cluster.states_of("tasks") if task["type"] == "NORMAL_TASK"]
    assert {"RolloutEngine", "PolicyTrainer"} <= {actor["class_name"] for actor in actors}
    assert [actor["class_name"] for actor in actors if actor["node_id"] == head_id] == []
    assert [task["name"] for task in tasks if task["node_id"] == head_id] == []
    assert len({process["node_id"] for process in actors + tasks if process["node_id"]}) == NUM_WORKERS
    assert any(task["name"] == "driver smoke" for task in tasks)


def test_a_stopped_job_leaves_nothing_running_and_goes_on_when_it_is_submitted_again(cluster: Cluster) -> None:
    run_dir = cluster.run_root / "stopped"
    first = cluster.submit("--set", "name=stopped", "--set", f"rloo.num_steps={NUM_STOPPED_STEPS}")
    first.wait_for_file(run_dir / "rloo" / "state", "step-*", RUN_DEADLINE_S)
    beside = cluster.submit("--set", "name=stopped", "--set", f"rloo.num_steps={NUM_STOPPED_STEPS}")
    assert beside.wait(STAGE_DEADLINE_S) != 0
    assert f"Another job writes the run directory {run_dir}: python pipelines/full_rlhf.py" in beside.output()
    assert first.process.poll() is None, "the first had ended before the second was refused"
    (job_id,) = re.findall(r"Job '(raysubmit_\w+)' submitted", first.output())
    assert cluster.ray("job", "stop", job_id).wait() == 0
    first.wait(STAGE_DEADLINE_S)
    assert "was stopped" in first.output()

    def is_idle() -> bool:
        alive = [actor["class_name"] for actor in cluster.states_of("actors") if actor["state"] == "ALIVE"]
        return not cluster.served() and all(OF_RAY_ITSELF.search(name) for name in alive)

    wait_until(
        is_idle, STAGE_DEADLINE_S, lambda: str([a for a in cluster.states_of("actors") if a["state"] == "ALIVE"])[:2000]
    )
    second = cluster.submit("--set", "name=stopped", "--set", f"rloo.num_steps={NUM_STOPPED_STEPS}")
    assert second.wait() == 0, second.output()[-4000:]
    assert "already committed, skipped" in second.output()


def test_what_the_drivers_task_refuses_is_one_line_on_the_submitters_terminal(cluster: Cluster) -> None:
    absent = '["/absent/rows.jsonl"]'
    settings = ["name=absent", "data.source=scenarios", 'serve.gold="/absent/gold"']
    settings += [f"data.{key}={absent}" for key in ("train", "in_domain", "sft", "rloo_prompts")]
    asking = cluster.submit(*(part for setting in settings for part in ("--set", setting)))
    assert asking.wait(STAGE_DEADLINE_S) != 0
    assert "\nerror: There is no file or folder at /absent/rows.jsonl.\n" in asking.output(), asking.output()[-3000:]
    assert "Traceback" not in asking.output()


def test_a_cluster_that_can_never_run_a_config_says_so_at_once(cluster: Cluster) -> None:
    asking = cluster.submit(
        "--set",
        "name=large",
        "--set",
        "reward_model.workers.num_workers=8",
        "--set",
        "reward_model.workers.num_gpus_per_worker=1",
    )
    assert asking.wait(STAGE_DEADLINE_S) != 0
    output = asking.output()
    assert (
        "reward_model asks for 8 x {CPU: 1, GPU: 1} (reward_model.workers.num_workers), "
        "the cluster's maximum is 0 of them" in output
    )
    assert f"At most it has 1 x {{CPU: {CPUS_OF_A_WORKER}}}; 1 x {{CPU: {CPUS_OF_A_WORKER}}}." in output
    assert not (cluster.run_root / "large" / "stages").exists()


def refusal(cluster: Cluster, folder: Path, **environment: str) -> str:
    """Start a pipeline beside the cluster, as `RAY_ADDRESS=head:6379 python pipelines/…` does, and return its error."""
    running = cluster.launcher.pipeline(
        "full_rlhf.py",
        "--config",
        SMOKE_CONFIG,
        "--run-dir",
        str(folder / "run"),
        environment={"RAY_ADDRESS": cluster.gcs_address, **environment},
    )
    assert running.wait(STAGE_DEADLINE_S) == 2, running.output()[-3000:]
    (line,) = [line for line in running.output().splitlines() if line.startswith("error: ")]
    return line


def test_a_cluster_that_is_not_there_is_named(cluster: Cluster, tmp_path: Path) -> None:
    address = f"127.0.0.1:{free_ports(1)[0]}"
    assert f"No Ray cluster can be reached at RAY_ADDRESS = {address}" in refusal(
        cluster, tmp_path, RAY_ADDRESS=address
    )


def test_a_wrong_token_is_named(cluster: Cluster, tmp_path: Path) -> None:
    message = refusal(cluster, tmp_path, RAY_AUTH_TOKEN="0" * 64)
    assert "does not let this process in" in message
    assert "RAY_AUTH_TOKEN" in message


def test_a_job_is_not_taken_without_the_clusters_token(cluster: Cluster) -> None:
    """`ray job submit` itself refuses the job, in Ray's own words."""
    job = cluster.launcher.command(
        "ray", "job", "submit", "--", "true", environment={"RAY_ADDRESS": cluster.dashboard, "RAY_AUTH_TOKEN": "0" * 64}
    )
    assert job.wait(STAGE_DEADLINE_S) != 0
    assert "Authentication token" in job.output() or "authentication token" in job.output(), job.output()[-2000:]


def test_a_cluster_of_another_ray_is_named(cluster: Cluster, tmp_path: Path) -> None:
    """The test changes the version in this cluster's GCS to that of another Ray, and changes it back."""
    note = tmp_path / "note.py"
    note.write_text(
        "import json, sys\n"
        "from ray._raylet import GcsClient\n"
        "client = GcsClient(address=sys.argv[1])\n"
        "note = json.loads(client.internal_kv_get(b'CLUSTER_METADATA', b'cluster'))\n"
        "note['ray_version'] = sys.argv[2]\n"
        "client.internal_kv_put(b'CLUSTER_METADATA', json.dumps(note).encode(), True, b'cluster')\n"
    )

    def pretend(version: str) -> None:
        changed = cluster.launcher.command("python", str(note), cluster.gcs_address, version)
        assert changed.wait() == 0, changed.output()

    pretend("2.59.0")
    try:
        message = refusal(cluster, tmp_path)
    finally:
        pretend(ray.__version__)
    assert "Version mismatch" in message
    assert "2.59.0" in message
    assert "Install the same versions" in message
