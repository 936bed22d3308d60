"""Nodes end, hang and come back while a job runs on them.

The job ends correctly, every step is there once, and what was committed is not done again.
"""

import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from rm_robust.runs.metrics import read_metrics
from tests.e2e.pipeline_process import (
    POLL_EVERY_S,
    RUN_DEADLINE_S,
    STAGE_DEADLINE_S,
    Running,
    session_processes,
    wait_until,
)
from tests.e2e.ray_cluster import NUM_RLOO_STEPS, Cluster, ray_cluster
from tests.e2e.test_kill_and_resume import check_resumed, committed_steps, lines_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(4 * RUN_DEADLINE_S)]

HEAD = "ray start --head --num-cpus=0"
SOONER_DEAD = {"RAY_health_check_period_ms": "1000", "RAY_health_check_failure_threshold": "5"}
ONE_WORKER = ("sft.workers.num_workers=1", "reward_model.workers.num_workers=1")
LONG_ENOUGH = (
    "sft.num_epochs=20",
    "reward_model.num_epochs=20",
    "evaluation.max_tokens_per_batch=64",
    "rloo.num_steps=200",
    "rloo.evaluation.every_steps=100",
    "world.num_training_prompts=400",
)
"""The settings with which every stage runs long enough to be caught at work."""
HANGS_S = 12.0
"""Seconds for which a node hangs. Ray takes a node for dead only after minutes."""


@dataclass
class Nodes:
    """The workers of a cluster. Each has a resource of its own name, by which Ray's listing identifies it."""

    cluster: Cluster
    running: dict[str, Running]
    num_started: int = 0

    def add(self, num_cpus: int) -> None:
        name = f"w{self.num_started}"
        self.num_started += 1
        self.running[name] = self.cluster.add_worker(f"--num-cpus={num_cpus}", f'--resources={{"{name}": 1}}')

    def of(self, node_id: str) -> str:
        (node,) = [node for node in self.cluster.states_of("nodes") if node["node_id"] == node_id]
        (name,) = self.running.keys() & node["resources_total"].keys()
        return name

    def kill(self, name: str) -> None:
        """Kill a worker's processes, as when a machine is lost."""
        node = self.running.pop(name)
        os.killpg(node.session, signal.SIGKILL)
        node.clean_up()
        self.cluster.workers.remove(node)


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    with ray_cluster(tmp_path, HEAD, environment=SOONER_DEAD) as cluster:
        cluster.launcher.environment |= SOONER_DEAD
        started = Nodes(cluster, {})
        for num_cpus in (2, 2, 2):
            started.add(num_cpus)
        yield started


def node_of(nodes: Nodes, job: Running, what: str, is_it: Callable[[dict[str, Any]], bool]) -> str:
    """Wait for a task or actor for which `is_it` is true, and return the worker on which it is."""
    found: list[str] = []

    def is_there() -> bool:
        assert job.process.poll() is None, job.output()[-4000:]
        found[:] = [own["node_id"] for own in nodes.cluster.states_of(what) if is_it(own) and own["node_id"]]
        return bool(found)

    wait_until(is_there, RUN_DEADLINE_S, lambda: job.output()[-4000:])
    return nodes.of(found[-1])


def is_task(name: str) -> Callable[[dict[str, Any]], bool]:
    return lambda task: task["name"] == name and task["state"] == "RUNNING"


def is_training(actor: dict[str, Any]) -> bool:
    return "TrainWorker" in actor["class_name"] and actor["state"] == "ALIVE"


def newest_step(run_dir: Path) -> int:
    """Return the newest committed step of the policy."""
    return max(committed_steps(run_dir / "rloo" / "state"), default=0)


def steps_of(run_dir: Path, stage: str) -> list[int]:
    return [int(line["step"]) for line in read_metrics(run_dir, stage)]


def test_a_node_is_lost_in_every_stage_of_one_run(nodes: Nodes) -> None:
    run_dir = nodes.cluster.run_root / "smoke"
    job = nodes.cluster.submit_in_place(
        *(part for setting in (*ONE_WORKER, *LONG_ENOUGH) for part in ("--set", setting))
    )
    job.wait_for_file(run_dir / "sft" / "state", "step-*", RUN_DEADLINE_S)
    nodes.kill(node_of(nodes, job, "actors", is_training))  # the driver may be on it too: then both start again
    nodes.add(2)
    job.wait_for_file(run_dir / "stages", "sft.json", RUN_DEADLINE_S)
    nodes.kill(node_of(nodes, job, "tasks", is_task("driver smoke")))
    assert not (run_dir / "stages" / "preferences.json").exists(), (
        "the driver's node was lost while it prepared the preferences"
    )
    nodes.add(2)
    job.wait_for_file(run_dir / "reward_model" / "state", "step-*", RUN_DEADLINE_S)
    nodes.kill(node_of(nodes, job, "actors", is_training))
    assert not (run_dir / "stages" / "reward_model.json").exists()
    nodes.add(2)
    job.wait_for_file(run_dir / "stages", "reward_model.json", RUN_DEADLINE_S)
    nodes.kill(node_of(nodes, job, "tasks", is_task("evaluation of smoke")))
    nodes.add(2)
    for kind in ("PolicyTrainer", "ServeReplica"):
        committed = newest_step(run_dir)
        wait_until(lambda: newest_step(run_dir) > committed, RUN_DEADLINE_S, lambda: job.output()[-4000:])  # noqa: B023
        at_work = lambda actor, kind=kind: kind in actor["class_name"] and actor["state"] == "ALIVE"  # noqa: E731
        nodes.kill(node_of(nodes, job, "actors", at_work))
        assert not (run_dir / "stages" / "rloo.json").exists()
        nodes.add(2)
    assert job.wait() == 0, job.output()[-4000:]
    for stage in ("sft", "reward_model", "rloo"):
        steps = steps_of(run_dir, stage)
        assert steps == list(range(1, int(read_metrics(run_dir, stage)[0]["num_steps"]) + 1)), stage
    assert "stage sft: already committed, skipped" in job.output(), (
        "the driver's next attempt goes on from what is committed"
    )


def test_a_node_that_hangs_for_a_while_holds_the_run_up_and_changes_nothing(tmp_path: Path) -> None:
    with ray_cluster(tmp_path, HEAD) as cluster:
        nodes = Nodes(cluster, {})
        for _ in range(2):
            nodes.add(2)
        run_dir = cluster.run_root / "smoke"
        job = cluster.submit_script("train_sft.py", "sft.workers.num_workers=2", "sft.num_epochs=20")
        job.wait_for_file(run_dir / "sft" / "state", "step-*", RUN_DEADLINE_S)
        node = nodes.running[node_of(nodes, job, "actors", is_training)]
        hung = list(session_processes(node.session))  # raylet and workers have process groups of their own
        for pid in hung:
            os.kill(pid, signal.SIGSTOP)
        try:
            stopped_at = time.monotonic()
            wait_until(lambda: time.monotonic() - stopped_at > HANGS_S, 2 * HANGS_S, str)
            seen = steps_of(run_dir, "sft")
        finally:
            for pid in hung:
                os.kill(pid, signal.SIGCONT)
        assert job.wait() == 0, job.output()[-4000:]
        lines = read_metrics(run_dir, "sft")
        assert [int(line["step"]) for line in lines] == list(range(1, int(lines[0]["num_steps"]) + 1))
        assert len(seen) < len(lines), "it was over before the node hung"
        gaps = [float(later["time"]) - float(earlier["time"]) for earlier, later in zip(lines, lines[1:], strict=False)]
        assert max(gaps) > HANGS_S - 1, "two workers take each step together, so one of them waited"


def test_a_head_that_is_lost_costs_a_new_cluster_and_the_same_submit(tmp_path: Path) -> None:
    run_dir = tmp_path / "runs" / "smoke"
    with ray_cluster(tmp_path, HEAD) as cluster:
        cluster.add_worker("--num-cpus=4")
        first = cluster.submit()
        first.wait_for_file(run_dir / "rloo" / "state", "step-*", RUN_DEADLINE_S)
        os.killpg(cluster.head.session, signal.SIGKILL)
        cluster.head.clean_up()
        assert first.wait(STAGE_DEADLINE_S) != 0
        for worker in cluster.workers:
            os.killpg(worker.session, signal.SIGKILL)
            worker.clean_up()
        time.sleep(POLL_EVERY_S)
    before, committed = lines_of(run_dir, "rloo"), committed_steps(run_dir / "rloo" / "state")[-1]
    with ray_cluster(tmp_path, HEAD) as cluster:
        cluster.add_worker("--num-cpus=4")
        second = cluster.submit()
        assert second.wait() == 0, second.output()[-4000:]
        assert set(re.findall(r"stage (\w+): already committed, skipped", second.output())) == {
            "sft",
            "preferences",
            "reward_model",
            "evaluation",
        }
    check_resumed(run_dir, "rloo", before, committed, num_steps=NUM_RLOO_STEPS)
