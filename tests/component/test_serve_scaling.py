"""Test a service under load, and while something changes.

Full queues, more and fewer replicas, swaps of the checkpoint, keys, ensembles, and the end of the process.
"""

import asyncio
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import httpx
import pytest
import ray.serve as ray_serve

from rm_robust.errors import CheckpointError
from rm_robust.models.checkpoint import read_manifest
from rm_robust.scoring.client import RewardClient
from rm_robust.scoring.contract import ScoreInput
from serve.app import scorer_app
from serve.batching.front import DESCRIPTION_IS_FRESH_S
from serve.cluster_scorer import ClusterScorer
from serve.keys import new_key
from serve.launch import deploy_models, deploy_service, start_serve
from serve.settings import Aggregation, EnsembleSettings, ModelSettings, ServiceLimits, ServiceSettings
from tests.e2e.pipeline_process import wait_until
from tests.support.http_load import Reply, metric, post, post_all, score_body
from tests.support.local_serve import LocalService, local_ray, local_service
from tests.support.plain_transformers import PlainTransformers
from tests.support.serve_process import replica_process_ids, serve_process
from tests.support.tiny_reward_model import save_tiny_reward_model, text

TOLERANCE = 1e-4
NUM_BURST = 1000
MAX_QUEUED = 100
DEADLINE_S = 120.0
CALIBRATIONS = {"one": {"score_mean": 0.25, "score_std": 2.0}, "two": {"score_mean": -0.5, "score_std": 0.5}}
PUSH_EVERY = {
    "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "0.5",
    "RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "0.5",
}
ALICE, ALICE_ENTRY = new_key("alice")
BOB, BOB_ENTRY = new_key("bob")


def random_inputs(seed: int, num_inputs: int, *, num_words: int = 30) -> list[ScoreInput]:
    """Return random inputs with one completion each."""
    rng = Random(seed)
    return [
        ScoreInput(
            prompt=text(rng, num_words=rng.randint(1, num_words)),
            completions=[text(rng, num_words=rng.randint(0, num_words))],
        )
        for _ in range(num_inputs)
    ]


POOL = random_inputs(0, 300)


@dataclass(frozen=True)
class Checkpoints:
    """Two tiny checkpoints with their own tokenizers. `plain` scores with the one that a reply names."""

    one: Path
    two: Path
    plain: dict[str, PlainTransformers]

    def id_of(self, folder: Path) -> str:
        return read_manifest(folder).content_sha256


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    folder = tmp_path_factory.mktemp("models")
    one, two = (
        save_tiny_reward_model(folder / name, seed=seed, **CALIBRATIONS[name]) for seed, name in enumerate(CALIBRATIONS)
    )
    plain = {read_manifest(path).content_sha256: PlainTransformers(path) for path in (one, two)}
    text_ids = [scorer.tokenizer("seven apple river stone")["input_ids"] for scorer in plain.values()]
    assert text_ids[0] != text_ids[1]
    return Checkpoints(one, two, plain)


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """Start Ray and Serve, and give the URL of Serve's own proxy."""
    with local_ray(num_cpus=8, **PUSH_EVERY):
        yield start_serve("127.0.0.1", 0)


def model_of(name: str, checkpoint_dir: Path, **options: Any) -> ModelSettings:
    return ModelSettings(**({"model_name": name, "checkpoint_dir": checkpoint_dir, "max_batch_tokens": 512} | options))


@pytest.fixture(scope="module")
def members(cluster: str, checkpoints: Checkpoints) -> Iterator[LocalService]:
    """Serve models `one` and `two` and every kind of ensemble of them, with two keys and a short queue."""
    ensembles = [
        EnsembleSettings(model_name=str(how), members=("one", "two"), aggregation=how, uncertainty_weight=0.7)
        for how in Aggregation
    ]
    ensembles += [
        EnsembleSettings(
            model_name="careful", members=("two", "one"), aggregation=Aggregation.MIN, calibrate_members=True
        )
    ]
    settings = ServiceSettings(
        models=(model_of("one", checkpoints.one), model_of("two", checkpoints.two)),
        ensembles=tuple(ensembles),
        api_keys=(ALICE_ENTRY, BOB_ENTRY),
        limits=ServiceLimits(max_queued_requests=MAX_QUEUED),
    )
    with local_service(settings) as service:
        yield service


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def assert_right(reply: Reply, inputs: list[ScoreInput], checkpoints: Checkpoints) -> None:
    """Check the status, the scores of the checkpoint that the reply names, and the token counts of its tokenizer."""
    assert reply.status == 200, reply.body[:500]
    plain = checkpoints.plain[reply.json["checkpoint"]]
    assert reply.scores == [pytest.approx(plain.scores(item), abs=TOLERANCE) for item in inputs]
    counted = reply.json["results"][0]["token_counts"]["completions"]
    assert counted == [
        len(plain.tokenizer(completion, add_special_tokens=False)["input_ids"]) + 1
        for completion in inputs[0].completions
    ]


def test_a_burst_beyond_the_queue_gets_right_scores_and_429_and_nothing_else(
    members: LocalService, checkpoints: Checkpoints
) -> None:
    inputs = [POOL[index % len(POOL)] for index in range(NUM_BURST)]
    replies = asyncio.run(post_all(members.url, [score_body(item) for item in inputs], bearer(ALICE)))
    statuses = [reply.status for reply in replies]
    print(f"\nburst: {statuses.count(200)} x 200, {statuses.count(429)} x 429")
    assert set(statuses) == {200, 429}
    assert statuses.count(200) >= MAX_QUEUED
    for reply, item in zip(replies, inputs, strict=True):
        if reply.status == 200:
            assert_right(reply, [item], checkpoints)
        else:
            assert reply.json["error"]["type"] == "overloaded"
            assert 1 <= int(reply.headers["retry-after"]) <= 30
    assert metric(members.url, "rm_robust_queued_requests", bearer(ALICE)) == 0
    assert metric(members.url, "rm_robust_queued_tokens", bearer(ALICE)) == 0


def test_the_client_library_turns_a_burst_beyond_the_queue_into_every_score(
    members: LocalService, checkpoints: Checkpoints
) -> None:
    inputs = [POOL[index % len(POOL)] for index in range(NUM_BURST)]
    refused_before = metric(members.url, "rm_robust_refusals_total", bearer(ALICE))
    with RewardClient(
        members.url, api_key=ALICE, max_completions_per_request=1, max_concurrent_requests=150, max_retries=60
    ) as client:
        reply = client.score(inputs)
    plain = checkpoints.plain[reply.checkpoint]
    assert reply.scores == [pytest.approx(plain.scores(item), abs=TOLERANCE) for item in inputs]
    refused = metric(members.url, "rm_robust_refusals_total", bearer(ALICE)) - refused_before
    print(f"\nclient: {NUM_BURST} scores, {refused:.0f} requests refused on the way")
    assert refused > 0


HAND_WORKED: dict[str, Callable[[float, float], float]] = {
    "mean": lambda one, two: (one + two) / 2,
    "min": min,
    # The variance of two numbers is the square of half their distance.
    "uncertainty_weighted": lambda one, two: (one + two) / 2 - 0.7 * ((one - two) / 2) ** 2,
    "careful": lambda one, two: min((one - 0.25) / 2.0, (two + 0.5) / 0.5),
}


@pytest.mark.parametrize("ensemble", HAND_WORKED)
def test_an_ensembles_scores_are_those_of_its_members_aggregated(
    members: LocalService, checkpoints: Checkpoints, ensemble: str
) -> None:
    inputs = [ScoreInput(prompt=item.prompt, completions=[*item.completions, "red stone", ""]) for item in POOL[:20]]
    one, two = (checkpoints.plain[checkpoints.id_of(folder)] for folder in (checkpoints.one, checkpoints.two))
    expected = [
        [HAND_WORKED[ensemble](*pair) for pair in zip(one.scores(item), two.scores(item), strict=True)]
        for item in inputs
    ]
    reply = asyncio.run(post(members.url, score_body(*inputs, model=ensemble), bearer(ALICE)))
    assert reply.status == 200
    assert reply.scores == [pytest.approx(row, abs=5 * TOLERANCE) for row in expected]
    assert reply.json["model"] == ensemble
    listed = {
        entry["id"]: entry["checkpoint"]
        for entry in httpx.get(f"{members.url}/v1/models", headers=bearer(ALICE)).json()["data"]
    }
    assert reply.json["checkpoint"] == listed[ensemble]
    assert len(set(listed.values())) == len(listed)


@pytest.mark.parametrize("name", CALIBRATIONS)
def test_calibrated_scores_are_less_the_manifests_mean_over_its_std(
    members: LocalService, checkpoints: Checkpoints, name: str
) -> None:
    inputs, (mean, std) = POOL[:20], CALIBRATIONS[name].values()
    plain = checkpoints.plain[checkpoints.id_of({"one": checkpoints.one, "two": checkpoints.two}[name])]
    reply = asyncio.run(post(members.url, score_body(*inputs, model=name, calibrated=True), bearer(ALICE)))
    assert reply.scores == [
        pytest.approx([(score - mean) / std for score in plain.scores(item)], abs=TOLERANCE / std) for item in inputs
    ]
    assert reply.json["calibration"] == {"mean": mean, "std": std}


def test_an_ensemble_has_no_calibration_of_its_own(members: LocalService) -> None:
    reply = asyncio.run(post(members.url, score_body(POOL[0], model="mean", calibrated=True), bearer(ALICE)))
    assert reply.status == 422
    assert reply.json["error"]["message"].startswith("calibrated: mean has no score_mean")


def test_a_key_that_is_taken_away_is_401_from_then_on(members: LocalService) -> None:
    def statuses() -> list[int]:
        return [asyncio.run(post(members.url, score_body(POOL[0]), bearer(key))).status for key in (ALICE, BOB)]

    assert statuses() == [200, 200]
    members.guard.replace_keys((ALICE_ENTRY,))
    assert statuses() == [200, 401]
    members.guard.replace_keys((BOB_ENTRY,))
    assert statuses() == [401, 200]
    members.guard.replace_keys((ALICE_ENTRY, BOB_ENTRY))
    assert statuses() == [200, 200]


def test_requests_whose_clients_go_away_leave_the_queue(members: LocalService, checkpoints: Checkpoints) -> None:
    """The only replica is stopped meanwhile, so that everything queues."""
    (replica,) = replica_process_ids(os.getsid(0), "one")
    inputs, alice = POOL[:64], bearer(ALICE)
    cancelled_before = metric(members.url, "rm_robust_cancelled_total", alice)

    async def until(name: str, value: float) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while await asyncio.to_thread(metric, members.url, name, alice) != value:
                await asyncio.sleep(0.05)

    async def leave_and_stay() -> list[Reply]:
        os.kill(replica, signal.SIGSTOP)
        try:
            staying = [asyncio.create_task(post(members.url, score_body(*inputs), alice)) for _ in range(10)]
            leaving = [asyncio.create_task(post(members.url, score_body(*inputs), alice)) for _ in range(20)]
            await until("rm_robust_queued_requests", 30)
            for task in leaving:
                task.cancel()
            await until("rm_robust_queued_requests", 10)
            await until("rm_robust_cancelled_total", cancelled_before + 20)
        finally:
            os.kill(replica, signal.SIGCONT)
        return await asyncio.gather(*staying)

    for reply in asyncio.run(leave_and_stay()):
        assert_right(reply, inputs, checkpoints)
    assert (
        metric(members.url, "rm_robust_queued_requests", alice)
        == metric(members.url, "rm_robust_queued_tokens", alice)
        == 0
    )


@pytest.mark.parametrize(("key", "status", "reason"), [(ALICE, 413, "body_too_large"), ("wrong", 401, "unauthorized")])
def test_a_large_body_that_is_refused_gets_its_refusal_and_no_reset(
    members: LocalService, key: str, status: int, reason: str
) -> None:
    body = b" " * (members.front.settings.limits.max_body_bytes + 1)
    for _ in range(5):
        reply = asyncio.run(post(members.url, body, bearer(key)))
        assert (reply.status, reply.json["error"]["type"]) == (status, reason)


class Load:
    """Clients that send requests from a thread of their own, without a break, until the block ends.

    Every other client sends 64 inputs at a time, the rest one.
    """

    def __init__(self, url: str, *, num_clients: int, pause_s: float = 0.0) -> None:
        self._url, self._num_clients, self._pause_s = url, num_clients, pause_s
        self.answered: list[tuple[Reply, list[ScoreInput]]] = []
        self._failures: list[BaseException] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)

    def __enter__(self) -> "Load":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive()
        assert not self._failures

    async def _run(self) -> None:
        results = await asyncio.gather(
            *(self._client(index) for index in range(self._num_clients)), return_exceptions=True
        )
        self._failures += [result for result in results if result is not None]

    async def _client(self, index: int) -> None:
        rng = Random(index)
        while not self._over.is_set():
            inputs = rng.sample(POOL, 64 if index % 2 else 1)
            self.answered.append((await post(self._url, score_body(*inputs)), inputs))
            await asyncio.sleep(self._pause_s)

    def wait_for_more(self, count: int) -> None:
        num_expected = len(self.answered) + count
        wait_until(
            lambda: len(self.answered) >= num_expected,
            DEADLINE_S,
            lambda: f"{len(self.answered)} answers, not {num_expected}; failures: {self._failures}",
        )


def num_running(model_name: str) -> int:
    status = ray_serve.status().applications[model_name].deployments[f"scorer_{model_name}"]
    return sum(count for state, count in status.replica_states.items() if state == "RUNNING")


@pytest.mark.slow
def test_replicas_are_added_while_batches_queue_and_taken_away_again_without_a_failure(
    cluster: str, checkpoints: Checkpoints
) -> None:
    model = model_of(
        "elastic", checkpoints.one, max_replicas=2, upscale_delay_s=0.5, downscale_delay_s=1, max_batch_tokens=256
    )
    with local_service(ServiceSettings(models=(model,), insecure_no_auth=True)) as service:
        assert num_running("elastic") == 1
        with Load(service.url, num_clients=8) as busy:
            wait_until(lambda: num_running("elastic") == 2, DEADLINE_S, lambda: str(ray_serve.status()))
            busy.wait_for_more(50)
        with Load(service.url, num_clients=1, pause_s=0.2) as idle:
            wait_until(lambda: num_running("elastic") == 1, DEADLINE_S, lambda: str(ray_serve.status()))
            idle.wait_for_more(5)
    print(f"\nscaling: {len(busy.answered)} answers while busy, {len(idle.answered)} while idle")
    for reply, inputs in busy.answered + idle.answered:
        assert_right(reply, inputs, checkpoints)


@pytest.fixture(scope="module")
def swapped(cluster: str, checkpoints: Checkpoints) -> Iterator[tuple[LocalService, ServiceSettings]]:
    """Serve checkpoint `one` with two replicas."""
    settings = ServiceSettings(models=(model_of("swapped", checkpoints.one, num_replicas=2),), insecure_no_auth=True)
    with local_service(settings) as service:
        yield service, settings


def with_checkpoint(settings: ServiceSettings, checkpoint_dir: Path) -> ServiceSettings:
    return settings.model_copy(
        update={"models": (settings.models[0].model_copy(update={"checkpoint_dir": checkpoint_dir}),)}
    )


def listed_after_deployment(service: LocalService) -> list[Any]:
    """Return four answers of /v1/models, none of which is an answer from before the call that the front repeats."""
    time.sleep(DESCRIPTION_IS_FRESH_S)
    return [listed_model(service) for _ in range(4)]


def listed_model(service: LocalService) -> Any:
    (entry,) = httpx.get(f"{service.url}/v1/models", timeout=10).json()["data"]
    return entry


def test_a_swap_under_load_fails_no_request_and_mixes_no_reply(
    swapped: tuple[LocalService, ServiceSettings], checkpoints: Checkpoints
) -> None:
    service, settings = swapped
    replicas = replica_process_ids(os.getsid(0), "swapped")
    assert len(replicas) == 2
    with Load(service.url, num_clients=8) as load:
        for folder in (checkpoints.two, checkpoints.one, checkpoints.two):
            load.wait_for_more(40)
            deploy_models(with_checkpoint(settings, folder))
            entries = listed_after_deployment(service)  # some from each replica
            assert {(entry["checkpoint"], entry["reload_error"]) for entry in entries} == {
                (checkpoints.id_of(folder), None)
            }
        load.wait_for_more(40)
    for reply, inputs in load.answered:
        assert_right(reply, inputs, checkpoints)
    checkpoint_ids = [reply.json["checkpoint"] for reply, _ in load.answered]
    num_of_one, num_of_two = (
        checkpoint_ids.count(checkpoints.id_of(folder)) for folder in (checkpoints.one, checkpoints.two)
    )
    print(f"\nswaps: {len(checkpoint_ids)} answers, {num_of_one} of one, {num_of_two} of two")
    assert set(checkpoint_ids) == set(checkpoints.plain)
    assert replica_process_ids(os.getsid(0), "swapped") == replicas


def test_a_swap_to_an_altered_checkpoint_leaves_the_old_one_serving_and_says_why(
    swapped: tuple[LocalService, ServiceSettings], checkpoints: Checkpoints, tmp_path: Path
) -> None:
    service, settings = swapped
    deploy_models(with_checkpoint(settings, checkpoints.two))
    altered = shutil.copytree(checkpoints.one, tmp_path / "altered")
    with (altered / "model.safetensors").open("r+b") as weights:
        weights.seek(-1, os.SEEK_END)
        weights.write(b"\x7f")
    with pytest.raises(CheckpointError, match="was altered after its commit"):
        deploy_models(with_checkpoint(settings, altered))
    assert listed_model(service)["reload_error"] is None  # nothing was deployed

    def deploy_unverified(folder: Path) -> None:  # as if it was altered after deploy_models had verified it
        (model,) = with_checkpoint(settings, folder).models
        ray_serve.run(scorer_app(model, settings), name="swapped", route_prefix=None)

    with Load(service.url, num_clients=4) as load:
        load.wait_for_more(10)
        deploy_unverified(altered)
        entries = listed_after_deployment(service)
        load.wait_for_more(20)
    assert {entry["checkpoint"] for entry in entries} == {checkpoints.id_of(checkpoints.two)}
    assert all("was altered after its commit" in entry["reload_error"] for entry in entries)
    for reply, inputs in load.answered:
        assert_right(reply, inputs, checkpoints)
        assert reply.json["checkpoint"] == checkpoints.id_of(checkpoints.two)
    deploy_models(with_checkpoint(settings, checkpoints.one))
    assert {(entry["checkpoint"], entry["reload_error"]) for entry in listed_after_deployment(service)} == {
        (checkpoints.id_of(checkpoints.one), None)
    }


@pytest.mark.slow
def test_inside_the_cluster_the_scores_are_those_over_http(cluster: str, checkpoints: Checkpoints) -> None:
    settings = ServiceSettings(models=(model_of("inside", checkpoints.one),), insecure_no_auth=True)
    url = deploy_service(settings, "whole", "/whole")
    over_handles = ClusterScorer("whole", "inside").score(POOL)
    with RewardClient(url) as client:
        over_http = client.score(POOL)
    assert (over_handles.model, over_handles.checkpoint, over_handles.template) == (
        over_http.model,
        over_http.checkpoint,
        over_http.template,
    )
    assert over_handles.scores == [pytest.approx(row, abs=1e-5) for row in over_http.scores]
    plain = checkpoints.plain[over_handles.checkpoint]
    assert over_handles.scores == [pytest.approx(plain.scores(item), abs=TOLERANCE) for item in POOL]
    ray_serve.delete("whole")


@pytest.mark.slow
def test_the_service_process_reloads_on_sighup_and_answers_what_it_has_before_it_ends(
    checkpoints: Checkpoints, tmp_path: Path
) -> None:
    link, keys = tmp_path / "model", tmp_path / "keys.toml"
    link.symlink_to(checkpoints.one)
    keys.write_text(f'alice = {{ sha256 = "{ALICE_ENTRY.sha256}" }}\n')
    with serve_process(tmp_path, "--checkpoint", str(link), "--keys", str(keys), "--replicas", "1") as process:

        def ask(key: str) -> tuple[int, str | None]:
            reply = asyncio.run(post(process.url, score_body(POOL[0]), bearer(key)))
            return reply.status, reply.json.get("checkpoint")

        assert ask(ALICE) == (200, checkpoints.id_of(checkpoints.one))
        assert ask(BOB) == (401, None)
        (tmp_path / "next").symlink_to(checkpoints.two)
        (tmp_path / "next").replace(link)
        keys.write_text(f'bob = {{ sha256 = "{BOB_ENTRY.sha256}" }}\n')
        process.running.process.send_signal(signal.SIGHUP)
        wait_until(lambda: ask(BOB) == (200, checkpoints.id_of(checkpoints.two)), DEADLINE_S, process.running.output)
        assert ask(ALICE) == (401, None)

        inputs = [POOL[index % len(POOL)] for index in range(640)]
        (replica,) = replica_process_ids(process.running.session, "model")

        async def stop_while_busy() -> list[Reply]:
            os.kill(replica, signal.SIGSTOP)  # so that all requests are in flight when the process is told to end
            try:
                asking = [asyncio.create_task(post(process.url, score_body(*inputs), bearer(BOB))) for _ in range(20)]
                async with asyncio.timeout(DEADLINE_S):
                    while await asyncio.to_thread(metric, process.url, "rm_robust_queued_requests", bearer(BOB)) < len(
                        asking
                    ):
                        await asyncio.sleep(0.05)
                process.running.process.send_signal(signal.SIGTERM)
                await asyncio.sleep(0.5)
                assert not any(task.done() for task in asking)
            finally:
                os.kill(replica, signal.SIGCONT)
            return await asyncio.gather(*asking)

        for reply in asyncio.run(stop_while_busy()):
            assert_right(reply, inputs, checkpoints)
        assert process.running.wait(DEADLINE_S) == 0, process.running.output()[-4000:]
        assert "(raylet)" not in process.running.output(), "Ray reports a failed task of a service that ended well"
