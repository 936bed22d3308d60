"""Elastic reward-model training goes on when a node is killed, grows when a node comes, and keeps the same batches."""

import os
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from rm_robust.data.token_files import read_token_groups
from rm_robust.models.packing import group_length
from rm_robust.runs.layout import RunLayout
from rm_robust.runs.metrics import MetricsLine, read_metrics
from rm_robust.training.loop import batch_indices
from tests.e2e.pipeline_process import RUN_DEADLINE_S, wait_until
from tests.e2e.ray_cluster import Cluster, ray_cluster

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3 * RUN_DEADLINE_S)]

SETTINGS = (
    "sft.workers={num_workers=1, num_cpus_per_worker=1}",
    "reward_model.workers={num_workers=2, min_workers=1, num_cpus_per_worker=0, resources_per_worker={trainer=1}, "
    "resize_every_s=5}",
    "reward_model.num_epochs=200",
    "reward_model.checkpoint_every_steps=20",
    "reward_model.evaluate_every_steps=100000",
)
BATCH_SIZE = 32
"""The batch size in smoke.toml."""
TRAINER = ("--num-cpus=0", '--resources={"trainer": 1}')
STARTS_WITHIN_S = "15"
"""Seconds in which a worker group must start before Ray Train tries a smaller one. Ray's default is a minute."""


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    environment = {
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": STARTS_WITHIN_S,
        "RAY_health_check_period_ms": "1000",
        "RAY_health_check_failure_threshold": "3",
    }
    with ray_cluster(tmp_path, "ray start --head --num-cpus=0", environment=environment) as started:
        started.launcher.environment |= environment
        started.add_worker("--num-cpus=2")  # the driver and the other stages
        yield started


def test_training_loses_a_node_goes_on_and_grows_again_over_the_same_batches(cluster: Cluster) -> None:
    cluster.add_worker(*TRAINER)
    victim = cluster.add_worker(*TRAINER)
    run_dir = cluster.run_root / "elastic"
    job = cluster.submit_script("full_reward_model.py", *SETTINGS, "name=elastic")

    def lines() -> list[MetricsLine]:
        return read_metrics(run_dir, "reward_model") if (run_dir / "metrics.jsonl").exists() else []

    def wait_for(num_workers: int, *, after: int) -> int:
        """Wait until `num_workers` workers have done a step after the step `after`, and return that step."""
        steps: list[int] = []

        def is_there() -> bool:
            assert job.process.poll() is None, job.output()[-4000:]
            steps[:] = [
                int(line["step"])
                for line in lines()
                if line["throughput/num_workers"] == num_workers and int(line["step"]) > after
            ]
            return bool(steps)

        wait_until(is_there, RUN_DEADLINE_S, lambda: job.output()[-4000:])
        return steps[0]

    before = wait_for(2, after=40)
    os.killpg(victim.session, signal.SIGKILL)
    victim.clean_up()
    cluster.workers.remove(victim)
    alone = wait_for(1, after=before - 20)
    cluster.add_worker(*TRAINER)
    wait_for(2, after=alone)
    assert job.wait() == 0, job.output()[-4000:]

    disturbed = lines()
    num_steps = int(disturbed[0]["num_steps"])
    assert [line["step"] for line in disturbed] == list(range(1, num_steps + 1)), "every step once"
    lengths = [
        group_length(row.tokens) for row in read_token_groups(RunLayout(run_dir).preference_tokens / "scenario=train")
    ]
    assert len(set(lengths)) > 10, "rows are told apart by their tokens"
    seen: Counter[int] = Counter()
    for line in disturbed:
        rows = batch_indices(int(line["step"]) - 1, num_rows=len(lengths), batch_size=BATCH_SIZE, seed=0)
        assert line["reward_model/num_tokens"] == sum(lengths[row] for row in rows), (
            f"step {line['step']} had other rows than the sampler says"
        )
        seen.update(rows)
    assert set(seen) == set(range(len(lengths))), "every pair was seen"
    assert max(seen.values()) - min(seen.values()) <= 1, (
        "no pair was seen more often than another, except in the epoch that is not over"
    )
    undisturbed_dir = cluster.run_root / "undisturbed"
    settings = ["reward_model.workers={num_workers=1}", *SETTINGS[2:]]
    plain = cluster.launcher.pipeline(
        "full_reward_model.py",
        "--config",
        "pipelines/configs/smoke.toml",
        "--run-dir",
        str(undisturbed_dir),
        *(f"--set={setting}" for setting in settings),
    )
    assert plain.wait() == 0, plain.output()[-3000:]
    undisturbed = read_metrics(undisturbed_dir, "reward_model")
    for name in ("reward_model/num_tokens", "reward_model/num_repeated_tokens"):
        assert [line[name] for line in disturbed] == [line[name] for line in undisturbed], (
            "the same rows in every step: none missed, none twice"
        )
    early = slice(0, alone + 20)
    assert [line["reward_model/loss"] for line in disturbed[early]] == pytest.approx(
        [line["reward_model/loss"] for line in undisturbed[early]], rel=0.05, abs=0.01
    )
