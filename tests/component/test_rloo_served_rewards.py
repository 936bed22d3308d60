"""RLOO with served reward models.

One loses a replica and one answers 429 for twenty seconds, but every score arrives; none outlives its stage.
"""

import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import ray.serve as ray_serve

from pipelines.stages import rloo_stage
from rm_robust.errors import RolloutError
from rm_robust.rloo.controller import run_rloo
from rm_robust.runs.directory import Run
from rm_robust.runs.layout import RunLayout
from rm_robust.runs.metrics import read_metrics
from rm_robust.scoring.client import RewardClient
from rm_robust.scoring.contract import ScoreReply, ScoreRequest, ScoreResult
from serve.cluster_scorer import ClusterScorer
from serve.keys import new_key
from serve.launch import deploy_service, start_serve
from serve.settings import ModelSettings, ServiceSettings
from tests.support.local_serve import local_ray
from tests.support.rloo_run import Killer, LengthScorer, actor_processes, rloo_config, rloo_run_dir, wait_for
from tests.support.tiny_reward_model import save_tiny_reward_model

BUSY_S = 20.0


@pytest.fixture(scope="module", autouse=True)
def ray_session() -> Iterator[None]:
    with local_ray(num_cpus=4, OMP_WAIT_POLICY="PASSIVE"):
        yield


@pytest.mark.slow
def test_a_reward_model_replica_killed_in_the_middle_costs_no_score(tmp_path: Path) -> None:
    start_serve("127.0.0.1", 0)
    model = ModelSettings(
        model_name="proxy",
        checkpoint_dir=save_tiny_reward_model(tmp_path / "reward_model"),
        max_length_tokens=256,
        num_cpus=0.1,
    )
    deploy_service(
        ServiceSettings(models=(model,), api_keys=(new_key("run")[1],)), app_name="rewards", route_prefix="/rewards"
    )
    config = rloo_config(tmp_path, num_steps=3)
    run_dir = rloo_run_dir(config, tmp_path / "run")
    proxy = ClusterScorer("rewards", "proxy")
    killed: list[psutil.Process] = []

    def kill_once() -> None:
        if len(read_metrics(run_dir, "rloo")) == 1 and not killed:
            killed.extend(actor_processes("ServeReplica:rewards:scorer_proxy"))
            killed[0].kill()

    run_rloo(config, run_dir, proxy=proxy, gold=LengthScorer(lambda inputs: kill_once()))
    steps = read_metrics(run_dir, "rloo")
    assert len(killed) == 1
    assert [line["rloo/num_failed_scores"] for line in steps] == [0, 0, 0]
    assert all(line["rloo/proxy_score_std"] > 0 for line in steps)
    ray_serve.delete("rewards")


class BusyServer(ThreadingHTTPServer):
    """A scoring server that answers 429 until BUSY_S after its first request, and then with the right scores."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.first_request_s: float | None = None
        self.num_refused = 0
        self.lock = threading.Lock()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: BusyServer

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        with self.server.lock:
            self.server.first_request_s = self.server.first_request_s or time.monotonic()
            is_busy = time.monotonic() < self.server.first_request_s + BUSY_S
            self.server.num_refused += is_busy
        if is_busy:
            self._reply(429, b'{"error": {"type": "overloaded", "message": "full"}}')
            return
        request = ScoreRequest.model_validate_json(body)
        results = [ScoreResult(scores=[-len(text) / 10 for text in item.completions]) for item in request.inputs]
        self._reply(200, ScoreReply(model="length", checkpoint="length", results=results).model_dump_json().encode())

    def _reply(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None: ...


@pytest.mark.slow
def test_a_reward_model_that_is_busy_for_twenty_seconds_is_waited_for(tmp_path: Path) -> None:
    config = rloo_config(tmp_path, num_steps=2)
    plain_dir, busy_dir = (rloo_run_dir(config, tmp_path / name) for name in ("plain", "busy"))
    run_rloo(config, plain_dir, proxy=LengthScorer(), gold=LengthScorer())
    server = BusyServer()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        with RewardClient(f"http://127.0.0.1:{server.server_port}") as client:
            run_rloo(config, busy_dir, proxy=client, gold=LengthScorer())
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert server.num_refused >= 3
    plain, busy = read_metrics(plain_dir, "rloo"), read_metrics(busy_dir, "rloo")
    assert [line["rloo/proxy_score_mean"] for line in busy] == pytest.approx(
        [line["rloo/proxy_score_mean"] for line in plain]
    )
    assert max(float(line["time/wait_for_scores_s"]) for line in busy) > BUSY_S / 2
    assert [line["rloo/num_failed_scores"] for line in busy] == [0, 0]


def served_run(folder: Path, **rloo: Any) -> Run:
    """Return a run that has reached its RLOO stage; the stage itself serves the proxy and a gold checkpoint."""
    replica = {"num_cpus": 0.1, "num_threads": 1}
    services = {
        "gold": str(save_tiny_reward_model(folder / "gold", seed=1)),
        "proxy_replica": replica,
        "gold_replica": replica,
    }
    config = rloo_config(folder, **rloo)
    config = type(config).model_validate(config.model_dump() | {"serve": services})
    run_dir = rloo_run_dir(config, folder / "run")
    save_tiny_reward_model(RunLayout(run_dir).reward_model_checkpoint)
    return Run(config, run_dir)


def require_nothing_left() -> None:
    """Assert that nothing of the stage is left, after waiting for Ray to end replicas and killed processes."""
    assert ray_serve.status().applications == {}
    for name in ("ServeReplica", "RolloutEngine", "PolicyTrainer"):
        wait_for(lambda name=name: not actor_processes(name), what=f"the end of {name}")
    assert not [group for group in ray.util.placement_group_table().values() if group["state"] != "REMOVED"]


@pytest.mark.parametrize(
    "end", ["failure", *(pytest.param(end, marks=pytest.mark.slow) for end in ("success", "ctrl_c"))]
)
@pytest.mark.usefixtures("ctrl_c")
def test_nothing_of_the_stage_remains_however_it_ends(end: str, tmp_path: Path) -> None:
    run = served_run(tmp_path, max_restarts=0, checkpoint_every_steps=4)

    def interrupt() -> None:
        wait_for(lambda: len(read_metrics(run.run_dir, "rloo")) == 1, what="the first step")
        os.kill(os.getpid(), signal.SIGINT)

    if end == "success":
        rloo_stage(run)
    elif end == "failure":
        names: list[str] = []

        def both_are_there() -> bool:
            names[:] = ray.util.list_named_actors()
            return len(names) == 2

        threading.Thread(
            target=wait_for, args=(both_are_there,), kwargs={"what": "an engine and a trainer"}, daemon=True
        ).start()
        Killer("PolicyTrainer", lambda: len(read_metrics(run.run_dir, "rloo")) == 1)
        with pytest.raises(RolloutError, match="without a committed step between"):
            rloo_stage(run)
        assert sorted(re.sub(" [0-9a-f]{6}$", "", name) for name in names) == ["faults engine 0", "faults trainer 0"]
    else:
        threading.Thread(target=interrupt, daemon=True).start()
        with pytest.raises(KeyboardInterrupt):
            rloo_stage(run)
    assert RunLayout(run.run_dir).is_done("rloo") == (end == "success")
    require_nothing_left()
