"""A run in an object store, on a cluster whose nodes share no disk, is killed, submitted again, and read from outside.

The store is moto's S3 server. A node is a raylet in a mount namespace of its own, where an empty file system covers the
folder in which all nodes keep their copies.
"""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from tests.e2e.pipeline_process import REPOSITORY, RUN_DEADLINE_S, STAGE_DEADLINE_S, wait_until
from tests.e2e.ray_cluster import Cluster, ray_cluster
from tests.support.s3_server import S3Server, s3_server

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3 * RUN_DEADLINE_S)]

ROOT = "s3://runs/team"
ALONE = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs tmpfs "$0" && exec "$@"']
"""The beginning of a command; a folder and the command itself follow.

The folder is empty when the command starts, and nothing else sees what the command writes there.
"""


@pytest.fixture
def server() -> Iterator[S3Server]:
    with s3_server() as started:
        started.put("runs", {})
        yield started


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    folder = tmp_path / "cache"
    folder.mkdir()
    if subprocess.run([*ALONE, str(folder), "true"], capture_output=True).returncode:
        pytest.skip(
            "needs the right to make mount namespaces (root): nodes without a disk in common cannot be had otherwise"
        )
    return folder


@pytest.fixture
def cluster(tmp_path: Path, cache: Path, server: S3Server) -> Iterator[Cluster]:
    environment = {**server.environment, "RM_ROBUST_RUN_ROOT": ROOT, "RM_ROBUST_CACHE": str(cache)}
    with ray_cluster(tmp_path, "ray start --head --num-cpus=0", environment=environment) as started:
        started.launcher.environment |= environment
        for _ in range(2):
            started.add_worker("--num-cpus=2", within=(*ALONE, str(cache)))
        yield started


def committed_steps(server: S3Server) -> list[int]:
    return [
        int(step)
        for key in server.keys("runs")
        for step in re.findall(r"^team/smoke/rloo/state/step-(\d+)/\.commit\.json$", key)
    ]


def test_a_killed_run_goes_on_from_the_store_and_its_results_are_read_from_there(
    cluster: Cluster, server: S3Server, cache: Path, tmp_path: Path
) -> None:
    first = cluster.submit()

    def has_a_state() -> bool:
        assert first.process.poll() is None, first.output()[-4000:]
        return bool(committed_steps(server))

    wait_until(has_a_state, RUN_DEADLINE_S, lambda: first.output()[-4000:])
    (driver,) = cluster.drivers()
    os.kill(driver, signal.SIGKILL)
    assert first.wait() != 0
    committed = committed_steps(server)[-1]
    second = cluster.submit()
    assert second.wait() == 0, second.output()[-4000:]
    assert set(re.findall(r"stage (\w+): already committed, skipped", second.output())) == {
        "sft",
        "preferences",
        "reward_model",
        "evaluation",
    }
    assert f"report: {ROOT}/smoke/report.html" in second.output()
    assert not list(cache.rglob("model.safetensors")), "the head has no disk in common with the nodes that did the work"

    objects = {key.removeprefix("team/smoke/"): key for key in server.keys("runs")}
    record = json.loads(server.client().get_object(Bucket="runs", Key=objects["stages/rloo.json"])["Body"].read())
    assert record["resumed_from_step"] >= committed  # its task may have gone on for a moment after the driver
    text = server.client().get_object(Bucket="runs", Key=objects["metrics.jsonl"])["Body"].read().decode()
    lines = [line for line in map(json.loads, text.splitlines()) if line["stage"] == "rloo"]
    assert [line["step"] for line in lines] == list(range(1, lines[0]["num_steps"] + 1))
    assert {"summary.json", "evaluation.json", "evaluation/scores.parquet", "rloo/samples.jsonl"} <= objects.keys()

    def outside(*arguments: str) -> str:
        command = cluster.launcher.command(sys.executable, *arguments)
        assert command.wait(STAGE_DEADLINE_S) == 0, command.output()
        return command.output()

    assert re.search(r"rloo +done", outside("pipelines/status.py", f"{ROOT}/smoke"))
    outside("-m", "rm_robust.runs.storage", f"{ROOT}/smoke/checkpoints/policy", str(tmp_path / "policy"))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "policy").num_parameters() > 0


def test_a_store_that_is_not_there_is_refused_in_one_line(tmp_path: Path) -> None:
    environment = os.environ | {
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9",
        "AWS_ACCESS_KEY_ID": "any",
        "AWS_SECRET_ACCESS_KEY": "any",
        "AWS_REGION": "us-east-1",
    }
    command = [
        sys.executable,
        "pipelines/full_rlhf.py",
        "--config",
        "pipelines/configs/smoke.toml",
        "--run-dir",
        "s3://runs/mine",
    ]
    refused = subprocess.run(
        command,
        cwd=REPOSITORY,
        env=environment | {"RM_ROBUST_CACHE": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert refused.returncode == 2, refused.stderr
    (line,) = [line for line in refused.stderr.splitlines() if line.startswith("error: ")]
    assert "s3://runs" in line
