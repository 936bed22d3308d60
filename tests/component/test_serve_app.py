"""Test the application on one real Ray and Serve: scores, batches, refusals, queue limits, both kinds of model."""

import asyncio
import json
import re
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any
from unittest.mock import ANY

import httpx
import pytest
from starlette.routing import Route

from pipelines.command import main
from rm_robust.data.records import Message
from rm_robust.data.world.corpus import distinct_prompts
from rm_robust.data.world.gold_judge import gold_score
from rm_robust.errors import ScoringError
from rm_robust.models.checkpoint import read_manifest
from rm_robust.scoring.client import RewardClient
from rm_robust.scoring.contract import ScoreInput
from serve.http.middleware import OPEN_PATHS
from serve.http.pages import PAGES
from serve.http.routes import router
from serve.keys import new_key
from serve.settings import ModelSettings, ServiceLimits, ServiceSettings
from tests.support.local_serve import addresses_listening_at, local_ray, local_service
from tests.support.plain_transformers import PlainTransformers
from tests.support.tiny_reward_model import NUM_POSITIONS, save_tiny_reward_model, text

TOLERANCE = 1e-4
ALICE, ALICE_ENTRY = new_key("alice")
BOB, BOB_ENTRY = new_key("bob")
BOBS_REQUESTS_PER_MINUTE = 3


@dataclass(frozen=True)
class Services:
    """The URLs of the services.

    `proxy` serves a tiny checkpoint, `judge` the judge. `crowded` is a judge that takes three requests at a time, and
    `guarded` is a judge with keys.
    """

    proxy: str
    judge: str
    crowded: str
    guarded: str
    checkpoint_dir: Path


@pytest.fixture(scope="module")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Services]:
    checkpoint_dir = save_tiny_reward_model(tmp_path_factory.mktemp("models") / "tiny_rm")
    judge = ModelSettings(model_name="judge", embedded_judge=True)
    with local_ray(num_cpus=4), ExitStack() as stack:

        def url_of(model: ModelSettings, **changed: Any) -> str:
            settings = ServiceSettings(models=(model,), **({"insecure_no_auth": True} | changed))
            return stack.enter_context(local_service(settings)).url

        keys = (ALICE_ENTRY, BOB_ENTRY.model_copy(update={"requests_per_minute": BOBS_REQUESTS_PER_MINUTE}))
        yield Services(
            proxy=url_of(ModelSettings(model_name="tiny", checkpoint_dir=checkpoint_dir)),
            judge=url_of(judge),
            crowded=url_of(
                judge.model_copy(update={"model_name": "crowded"}),
                limits=ServiceLimits(max_queued_requests=3, max_completions=100_000),
            ),
            guarded=url_of(judge.model_copy(update={"model_name": "guarded"}), api_keys=keys, insecure_no_auth=False),
            checkpoint_dir=checkpoint_dir,
        )


@pytest.fixture(scope="module")
def plain(services: Services) -> PlainTransformers:
    return PlainTransformers(services.checkpoint_dir)


def mixed_inputs(seed: int, *, num_inputs: int) -> list[ScoreInput]:
    """Return prompts of 1 to 60 words with 1 to 4 completions of 0 to 60 words. Some prompts are conversations."""
    rng = Random(seed)
    inputs = []
    for index in range(num_inputs):
        prompt: str | list[Message] = text(rng, num_words=rng.randint(1, 60))
        if index % 3 == 0:
            prompt = [
                {"role": "system", "content": "be quiet"},
                {"role": "user", "content": text(rng, num_words=rng.randint(1, 40))},
            ]
        inputs.append(
            ScoreInput(
                prompt=prompt, completions=[text(rng, num_words=rng.randint(0, 60)) for _ in range(rng.randint(1, 4))]
            )
        )
    return inputs


def score_body(*inputs: ScoreInput) -> dict[str, object]:
    return {"inputs": [item.model_dump() for item in inputs]}


def assert_scores(rows: list[list[float]], inputs: list[ScoreInput], plain: PlainTransformers) -> None:
    for scores, item in zip(rows, inputs, strict=True):
        assert scores == pytest.approx(
            [plain.score(item.prompt, completion) for completion in item.completions], abs=TOLERANCE
        )


async def post_all(url: str, bodies: list[object]) -> list[httpx.Response]:
    """Send every body at once, and return the replies in order."""
    async with httpx.AsyncClient(timeout=60, trust_env=False, limits=httpx.Limits(max_connections=None)) as client:
        return await asyncio.gather(*(client.post(f"{url}/v1/score", json=body) for body in bodies))


def test_a_single_request_gets_plain_transformers_raw_score_and_the_contracts_shape(
    services: Services, plain: PlainTransformers
) -> None:
    item = ScoreInput(prompt="red green blue", completions=["seven apple"])
    response = httpx.post(f"{services.proxy}/v1/score", json=score_body(item))
    assert response.status_code == 200
    manifest = read_manifest(services.checkpoint_dir)
    expected = plain.score("red green blue", "seven apple")
    prompt = plain.tokenizer.apply_chat_template(
        [{"role": "user", "content": "red green blue"}], add_generation_prompt=True, return_dict=False
    )
    completion = plain.tokenizer("seven apple", add_special_tokens=False)["input_ids"]
    counts = {"prompt": len(prompt), "completions": [len(completion) + 1]}  # one more for its end of turn
    assert response.json() == {
        "model": "tiny",
        "checkpoint": manifest.content_sha256,
        "template": manifest.template_sha256,
        "results": [{"scores": [pytest.approx(expected, abs=TOLERANCE)], "token_counts": counts}],
    }


def test_the_models_are_listed_with_their_identity_and_limit(services: Services) -> None:
    manifest = read_manifest(services.checkpoint_dir)
    unset = {"calibration": None, "reload_error": None}
    tiny = {
        "id": "tiny",
        "checkpoint": manifest.content_sha256,
        "template": manifest.template_sha256,
        "max_length_tokens": 256,
        **unset,
    }
    assert httpx.get(f"{services.proxy}/v1/models").json() == {"object": "list", "data": [tiny]}
    judge = {"id": "judge", "checkpoint": ANY, "template": None, "max_length_tokens": None, **unset}
    assert httpx.get(f"{services.judge}/v1/models").json() == {"object": "list", "data": [judge]}


def test_a_scorer_is_ready_while_it_has_room_and_alive_without(services: Services) -> None:
    async def probe_while_full() -> list[tuple[int, int]]:
        async with httpx.AsyncClient(
            base_url=services.crowded, timeout=60, limits=httpx.Limits(max_connections=None)
        ) as client:
            busy = [asyncio.create_task(client.post("/v1/score", json=score_body(slow))) for _ in range(40)]
            probes = []
            while not all(task.done() for task in busy):
                probes.append(((await client.get("/readyz")).status_code, (await client.get("/healthz")).status_code))
            await asyncio.gather(*busy)
            return probes

    slow = ScoreInput(prompt=next(distinct_prompts(Random(7))), completions=["seven"] * 20_000)
    probes = asyncio.run(probe_while_full())
    assert {alive for _, alive in probes} == {200}
    assert 503 in {ready for ready, _ in probes}
    response = httpx.get(f"{services.crowded}/readyz")
    assert (response.status_code, response.json()) == (200, {"status": "ready"})


def test_raw_scores_are_not_squashed(services: Services) -> None:
    with RewardClient(services.proxy) as client:
        scores = [score for scores in client.score(mixed_inputs(1, num_inputs=30)).scores for score in scores]
    assert min(scores) < 0
    assert max(scores) > 1


def test_a_score_does_not_depend_on_its_batch_mates(services: Services, plain: PlainTransformers) -> None:
    inputs = mixed_inputs(2, num_inputs=40)
    together = asyncio.run(post_all(services.proxy, [score_body(item) for item in inputs]))
    assert_scores([response.json()["results"][0]["scores"] for response in together], inputs, plain)


def test_one_request_with_many_prompts_is_scored_in_order(services: Services, plain: PlainTransformers) -> None:
    inputs = mixed_inputs(3, num_inputs=25)
    with RewardClient(services.proxy, max_completions_per_request=1000) as client:
        assert_scores(client.score(inputs).scores, inputs, plain)


def test_a_text_prompt_is_one_user_turn(services: Services) -> None:
    as_text = ScoreInput(prompt="red stone", completions=["river"])
    as_turn = ScoreInput(prompt=[{"role": "user", "content": "red stone"}], completions=["river"])
    with RewardClient(services.proxy) as client:
        first, second = client.score([as_text, as_turn]).scores
    assert first == pytest.approx(second, abs=1e-6)


def test_an_empty_completion_is_scored_at_its_end_of_turn(services: Services, plain: PlainTransformers) -> None:
    item = ScoreInput(prompt="red stone", completions=["", "river"])
    with RewardClient(services.proxy) as client:
        assert_scores(client.score([item]).scores, [item], plain)


TOO_LONG = "red " * NUM_POSITIONS
WRONG_REQUESTS = {
    "not JSON": (b"{", 422, "body: Invalid JSON"),
    "not UTF-8": (b'{"inputs": [{"prompt": "\xff\xfe", "completions": ["a"]}]}', 422, "body: Invalid JSON"),
    "half a surrogate pair": (b'{"inputs": [{"prompt": "\\ud800", "completions": ["a"]}]}', 422, "body: Invalid JSON"),
    "nested without end": (b"[" * 100_000, 422, "body: Invalid JSON"),
    "empty body": (b"", 422, "body: Invalid JSON"),
    "a list": (b"[]", 422, "body: "),
    "no inputs field": (b"{}", 422, "inputs: Field required"),
    "no inputs": (b'{"inputs": []}', 422, "inputs: List should have at least 1 item"),
    "no completions": (
        b'{"inputs": [{"prompt": "a", "completions": []}]}',
        422,
        "inputs[0].completions: List should have at least 1 item",
    ),
    "a completion that is a number": (
        b'{"inputs": [{"prompt": "a", "completions": ["b", 3]}]}',
        422,
        "inputs[0].completions[1]: ",
    ),
    "a prompt that is a number": (b'{"inputs": [{"prompt": 3, "completions": ["b"]}]}', 422, "inputs[0].prompt"),
    "an unknown field": (
        b'{"inputs": [{"prompt": "a", "completions": ["b"]}], "sigmoid": true}',
        422,
        "sigmoid: Extra inputs",
    ),
    "an empty prompt": (b'{"inputs": [{"prompt": "", "completions": ["b"]}]}', 422, "inputs[0].prompt: "),
    "no messages": (b'{"inputs": [{"prompt": [], "completions": ["b"]}]}', 422, "inputs[0].prompt: "),
    "an unknown role": (
        b'{"inputs": [{"prompt": [{"role": "robot", "content": "a"}], "completions": ["b"]}]}',
        422,
        "'robot'",
    ),
    "no last user turn": (
        b'{"inputs": [{"prompt": [{"role": "assistant", "content": "a"}], "completions": ["b"]}]}',
        422,
        "'assistant' last",
    ),
    "too long": (
        json.dumps(
            {"inputs": [{"prompt": "a", "completions": ["b"]}, {"prompt": "a", "completions": ["b", TOO_LONG]}]}
        ).encode(),
        413,
        f"the limit max_length_tokens is {NUM_POSITIONS}",
    ),
}


@pytest.mark.parametrize("wrong", WRONG_REQUESTS.values(), ids=WRONG_REQUESTS.keys())
def test_a_wrong_request_is_refused_with_the_field_that_is_wrong(
    services: Services, wrong: tuple[bytes, int, str]
) -> None:
    body, status, message = wrong
    response = httpx.post(f"{services.proxy}/v1/score", content=body)
    assert response.status_code == status
    error = response.json()["error"]
    assert set(error) == {"type", "message"}
    assert message in error["message"]


def test_a_request_that_is_too_long_names_its_input_and_completion(services: Services) -> None:
    inputs = [ScoreInput(prompt="red", completions=["blue"]), ScoreInput(prompt="red", completions=["blue", TOO_LONG])]
    response = httpx.post(f"{services.proxy}/v1/score", json=score_body(*inputs))
    assert (response.status_code, response.json()["error"]["type"]) == (413, "too_long")
    assert response.json()["error"]["message"].startswith("inputs[1].completions[1] has ")


def test_refused_requests_leave_their_batch_mates_alone(services: Services, plain: PlainTransformers) -> None:
    inputs = mixed_inputs(4, num_inputs=20)
    too_long = {"inputs": [{"prompt": "red", "completions": [TOO_LONG]}]}
    no_user_turn = {"inputs": [{"prompt": [{"role": "system", "content": "red"}], "completions": ["blue"]}]}
    bodies = [body for item in inputs for body in (score_body(item), too_long, no_user_turn)]
    responses = asyncio.run(post_all(services.proxy, bodies))
    assert [response.status_code for response in responses] == [200, 413, 422] * 20
    assert_scores([response.json()["results"][0]["scores"] for response in responses[::3]], inputs, plain)


def test_a_full_queue_is_429_with_retry_after_and_nothing_else_fails(services: Services) -> None:
    slow = ScoreInput(prompt=next(distinct_prompts(Random(7))), completions=["seven"] * 3000)
    responses = asyncio.run(post_all(services.crowded, [score_body(slow)] * 40))
    refused = [response for response in responses if response.status_code == 429]
    assert {response.status_code for response in responses} == {200, 429}
    for response in refused:
        assert response.json()["error"]["type"] == "overloaded"
        assert 1 <= int(response.headers["retry-after"]) <= 30


def test_the_client_turns_a_full_queue_into_every_score(services: Services) -> None:
    prompts = [prompt for prompt, _ in zip(distinct_prompts(Random(8)), range(60), strict=False)]
    inputs = [ScoreInput(prompt=prompt, completions=["seven"]) for prompt in prompts]
    with RewardClient(
        services.crowded, max_completions_per_request=1, max_concurrent_requests=30, max_retries=30
    ) as client:
        assert client.score(inputs).scores == [[gold_score(prompt, "seven")] for prompt in prompts]


def test_the_judge_serves_exactly_the_gold_score(services: Services) -> None:
    rng = Random(6)
    prompts = [prompt for prompt, _ in zip(distinct_prompts(rng), range(20), strict=False)]
    inputs = [ScoreInput(prompt=prompt, completions=["", "seven", prompt]) for prompt in prompts]
    inputs += [ScoreInput(prompt=[{"role": "user", "content": prompt}], completions=["seven"]) for prompt in prompts]
    with RewardClient(services.judge) as client:
        reply = client.score(inputs)
    plain_prompts = [*prompts, *prompts]
    assert reply.scores == [
        [gold_score(prompt, c) for c in item.completions] for prompt, item in zip(plain_prompts, inputs, strict=True)
    ]
    assert reply.model == "judge"
    assert reply.checkpoint.startswith("sha256:")
    assert reply.template is None
    assert {result.token_counts for result in reply.results} == {None}


@pytest.mark.parametrize(
    "prompt",
    [
        "What is love?",
        [{"role": "system", "content": "be kind"}, {"role": "user", "content": next(distinct_prompts(Random(6)))}],
    ],
)
def test_the_judge_refuses_prompts_it_cannot_judge(services: Services, prompt: str | list[Message]) -> None:
    good = ScoreInput(prompt=next(distinct_prompts(Random(6))), completions=["seven"])
    response = httpx.post(
        f"{services.judge}/v1/score", json=score_body(good, ScoreInput(prompt=prompt, completions=["a"]))
    )
    assert response.status_code == 422
    assert response.json()["error"]["message"].startswith("inputs[1].prompt: The embedded ")


def test_every_application_says_that_it_is_alive_under_its_own_prefix(services: Services) -> None:
    for url in (services.proxy, services.judge, services.crowded):
        assert httpx.get(f"{url}/healthz").json() == {"status": "alive"}


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", "/v1/score", 405), ("POST", "/healthz", 405), ("GET", "/nothing", 404)]
)
def test_unknown_paths_and_methods_get_the_error_body_too(
    services: Services, method: str, path: str, status: int
) -> None:
    response = httpx.request(method, services.proxy + path)
    assert response.status_code == status
    assert set(response.json()["error"]) == {"type", "message"}


def test_the_openapi_schema_describes_the_contract_without_dangling_references(services: Services) -> None:
    schema = httpx.get(f"{services.proxy}/openapi.json").json()
    operation = schema["paths"]["/v1/score"]["post"]
    item = operation["requestBody"]["content"]["application/json"]["schema"]["properties"]["inputs"]["items"]
    assert set(item["properties"]) == {"prompt", "completions"}
    assert {"200", "404", "413", "422", "429", "500", "503", "504"} <= set(operation["responses"])
    names = set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(schema)))
    assert names <= set(schema["components"]["schemas"])
    assert "$defs" not in json.dumps(schema)


DECLARED = sorted(
    (method, route.path) for route in router.routes if isinstance(route, Route) for method in route.methods or ()
)
UNKNOWN = [("POST", "/"), ("GET", "/openapi.json"), ("POST", "/nothing"), ("GET", "/v1/score/")]
UNKNOWN += [("GET", "/healthz/"), ("GET", "/healthz/../v1/models"), ("GET", "//healthz")]


WRONG_HEADERS = {
    "none": None,
    "wrong": "Bearer wrong",
    "scheme": f"Basic {ALICE}",
    "bare": ALICE,
    "hash": f"Bearer {ALICE_ENTRY.sha256}",
}


@pytest.mark.parametrize(("method", "path"), [*DECLARED, *UNKNOWN])
@pytest.mark.parametrize("header", WRONG_HEADERS.values(), ids=WRONG_HEADERS.keys())
def test_no_path_but_health_answers_anything_but_401_without_a_key(
    services: Services, method: str, path: str, header: str | None
) -> None:
    headers = {} if header is None else {"authorization": header}
    response = httpx.request(method, services.guarded + path, headers=headers)
    if path in OPEN_PATHS:
        assert response.status_code == 200
    else:
        assert (response.status_code, response.headers["www-authenticate"]) == (401, "Bearer")
        assert (
            method == "HEAD"
            or (method == "GET" and path in PAGES)
            or set(response.json()["error"]) == {"type", "message"}
        )


def test_every_route_of_the_app_is_one_that_the_keys_test_asks() -> None:
    assert {type(route) for route in router.routes if not isinstance(route, Route)} == set()
    assert ("POST", "/v1/score") in DECLARED


def test_the_holder_of_a_key_gets_scores_and_others_an_error_that_says_why(services: Services) -> None:
    prompt = next(distinct_prompts(Random(9)))
    item = ScoreInput(prompt=prompt, completions=["seven"])
    with RewardClient(services.guarded, api_key=ALICE) as client:
        assert client.score([item]).scores == [[gold_score(prompt, "seven")]]
    with (
        RewardClient(services.guarded, api_key="wrong") as client,
        pytest.raises(ScoringError, match="HTTP 401: A valid key is needed"),
    ):
        client.score([item])
    assert httpx.get(f"{services.guarded}/nothing", headers={"authorization": f"Bearer {ALICE}"}).status_code == 404


def test_a_key_with_a_rate_limit_gets_429_beyond_it_and_others_go_on(services: Services) -> None:
    responses = [
        httpx.get(f"{services.guarded}/v1/models", headers={"authorization": f"Bearer {BOB}"})
        for _ in range(BOBS_REQUESTS_PER_MINUTE + 1)
    ]
    assert [response.status_code for response in responses] == [200] * BOBS_REQUESTS_PER_MINUTE + [429]
    assert responses[-1].json()["error"]["type"] == "rate_limited"
    assert 0 < int(responses[-1].headers["retry-after"]) <= 60
    assert httpx.get(f"{services.guarded}/v1/models", headers={"authorization": f"Bearer {ALICE}"}).status_code == 200


def test_the_service_listens_on_loopback_only(services: Services) -> None:
    assert addresses_listening_at(int(services.proxy.rsplit(":", 1)[1])) == ["0100007F"]


def test_a_checkpoint_its_workers_and_its_endpoint_get_the_same_report(
    services: Services, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inputs = [item for item in mixed_inputs(7, num_inputs=60) if len(item.completions) > 1]
    data = tmp_path / "ranked.jsonl"
    rows = [item.model_dump() | {"gold_scores": list(range(len(item.completions)))} for item in inputs]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    results = {}
    checkpoint = ["--model", str(services.checkpoint_dir)]
    for name, source in {
        "checkpoint": checkpoint,
        "workers": [*checkpoint, "--workers=2", "--cpus-per-worker=0.25"],
        "endpoint": ["--url", services.proxy],
    }.items():
        status = main(
            [
                "evaluate",
                *source,
                "--suite=preferences",
                f"--data={data}",
                f"--out={tmp_path / name}",
                "--require=all.kendall_tau>=1",
            ],
        )
        assert status == 1, capsys.readouterr().err  # a random model does not order texts that well
        log = (tmp_path / name / "scores.jsonl").read_text().splitlines()
        scores = [score for line in log[1:] for score in json.loads(line)["scores"]]
        results[name] = (json.loads((tmp_path / name / "result.json").read_text()), scores)
    ours, our_scores = results.pop("checkpoint")
    for others, scores in results.values():
        assert scores == pytest.approx(our_scores, abs=1e-4)
        for figure, our_value in ours["figures"].items():
            assert others["figures"][figure] == pytest.approx(our_value, abs=1e-4)
        assert {key: ours[key] for key in ours if key != "figures"} == {
            key: others[key] for key in others if key != "figures"
        }
    assert ours["num_refused"] == 0
    assert "not met: all.kendall_tau >= 1" in capsys.readouterr().err
