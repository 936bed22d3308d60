"""Test other servers' clients on one real Serve.

Every dialect gives the same score as /v1/score, or a refusal, in its own JSON.
"""

import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import httpx
import pytest
from pydantic import TypeAdapter
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rm_robust.data.records import Message
from rm_robust.data.world.corpus import distinct_prompts
from rm_robust.data.world.gold_judge import gold_score
from rm_robust.models.checkpoint import read_manifest
from rm_robust.scoring.client import RewardClient
from rm_robust.scoring.contract import ScoreInput
from serve.settings import ModelSettings, ServiceSettings
from tests.support.local_serve import local_ray, local_service
from tests.support.tiny_reward_model import NUM_POSITIONS, save_tiny_reward_model, text

TOLERANCE = 1e-5
TURN_END = "<|im_end|>"


@dataclass(frozen=True)
class Services:
    proxy: str
    judge: str
    checkpoint_dir: Path


@dataclass(frozen=True)
class Conversation:
    """One conversation in every form that some client sends, and its score from /v1/score."""

    prompt: list[Message]
    completion: str
    rendered: str
    token_ids: list[int]
    score: float

    @property
    def turns(self) -> list[Message]:
        return [*self.prompt, {"role": "assistant", "content": self.completion}]


@pytest.fixture(scope="module")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Services]:
    checkpoint_dir = save_tiny_reward_model(tmp_path_factory.mktemp("models") / "tiny_rm")
    tiny = ServiceSettings(
        models=(ModelSettings(model_name="tiny", checkpoint_dir=checkpoint_dir),), insecure_no_auth=True
    )
    judge = ServiceSettings(models=(ModelSettings(model_name="judge", embedded_judge=True),), insecure_no_auth=True)
    with local_ray(num_cpus=3), local_service(tiny) as proxy, local_service(judge) as gold:
        yield Services(proxy.url, gold.url, checkpoint_dir)


@pytest.fixture(scope="module")
def tokenizer(services: Services) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(services.checkpoint_dir)


@pytest.fixture(scope="module")
def conversations(services: Services, tokenizer: PreTrainedTokenizerBase) -> list[Conversation]:
    """Return conversations of one and of several turns.

    One completion is empty, and some begin with a newline, which is also how the assistant header ends.
    """
    rng = Random(0)
    made = []
    for index in range(12):
        prompt: list[Message] = [{"role": "user", "content": text(rng, num_words=rng.randint(1, 30))}]
        if index % 2:
            prompt = [
                {"role": "user", "content": "red"},
                {"role": "assistant", "content": text(rng, num_words=5)},
                *prompt,
            ]
        completion = "" if index == 3 else "\n" * (index % 3) + text(rng, num_words=rng.randint(1, 40))
        made.append((prompt, completion))
    with RewardClient(services.proxy) as client:
        scores = client.score(
            [ScoreInput(prompt=prompt, completions=[completion]) for prompt, completion in made]
        ).scores
    conversations = []
    for (prompt, completion), [score] in zip(made, scores, strict=True):
        header = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        ids = [tokenizer(part, add_special_tokens=False)["input_ids"] for part in (header, completion, TURN_END)]
        conversations.append(
            Conversation(
                prompt, completion, f"{header}{completion}{TURN_END}", [i for part in ids for i in part], score
            )
        )
    return conversations


def post(url: str, **body: object) -> httpx.Response:
    response = httpx.post(url, json=body, timeout=60, trust_env=False)
    assert response.status_code == 200, response.text
    return response


def scores_of(conversations: list[Conversation]) -> Any:
    return pytest.approx([conversation.score for conversation in conversations], abs=TOLERANCE)


def open_rlhf_client(url: str, queries: list[str], prompts: list[str], labels: list[str]) -> dict[str, Any]:
    """Ask for scores as OpenRLHF's rollout asks its remote reward model (3c3be623).

    It sends this body, waits 180 s for the reply, and tries five times, a second apart.
    """
    for _ in range(5):
        response = httpx.post(
            url, json={"query": queries, "prompts": prompts, "labels": labels}, timeout=180, trust_env=False
        )
        if response.status_code == 200:
            reply: dict[str, Any] = response.json()
            return reply
        time.sleep(1)
    raise AssertionError(response.text)


def test_open_rlhfs_client_gets_the_raw_scores(services: Services, conversations: list[Conversation]) -> None:
    reply = open_rlhf_client(
        f"{services.proxy}/get_reward",
        [c.rendered for c in conversations],
        [c.prompt[-1]["content"] for c in conversations],
        [],
    )
    assert reply["rewards"] == scores_of(conversations)
    assert reply["scores"] == reply["rewards"] == reply["extra_logs"]["dummy_scores"]


@pytest.mark.parametrize("form", ["rendered", "token_ids"])
def test_vllms_classify_and_pooling_say_the_raw_scores_of_texts_and_token_ids(
    services: Services, conversations: list[Conversation], form: str
) -> None:
    several = [
        conversation.rendered if form == "rendered" else conversation.token_ids for conversation in conversations
    ]
    for sent, expected in ((several, conversations), (several[0], conversations[:1])):
        classified = post(f"{services.proxy}/classify", model="tiny", input=sent, use_activation=False).json()
        assert [entry["probs"][0] for entry in classified["data"]] == scores_of(expected)
        assert classified["usage"]["prompt_tokens"] == sum(len(conversation.token_ids) for conversation in expected)
        pooled = post(f"{services.proxy}/pooling", input=sent).json()
        assert [entry["data"][0] for entry in pooled["data"]] == scores_of(expected)


def test_vllms_messages_end_with_the_completion(services: Services, conversations: list[Conversation]) -> None:
    for conversation in conversations:
        reply = post(f"{services.proxy}/classify", messages=conversation.turns).json()
        assert [entry["probs"][0] for entry in reply["data"]] == scores_of([conversation])


def test_vllms_own_schema_takes_our_requests_and_replies(services: Services, conversations: list[Conversation]) -> None:
    from vllm.entrypoints.pooling.classify.protocol import ClassificationRequest, ClassificationResponse
    from vllm.entrypoints.pooling.pooling.protocol import PoolingRequest, PoolingResponse

    one = conversations[0]
    bodies: list[dict[str, Any]] = [
        {"input": [one.rendered]},
        {"input": one.token_ids},
        {"messages": one.turns, "use_activation": True},
    ]
    for path, request, response in (
        ("classify", ClassificationRequest, ClassificationResponse),
        ("pooling", PoolingRequest, PoolingResponse),
    ):
        for body in bodies:
            TypeAdapter(request).validate_python({"model": "tiny", **body})
            reply = post(f"{services.proxy}/{path}", model="tiny", **body).json()
            parsed = response.model_validate(reply)
            assert parsed.model_dump(mode="json", exclude_unset=True) == reply
            assert set(response.model_fields) == set(reply)


def test_a_squashed_score_is_the_sigmoid_and_the_reply_says_so(
    services: Services, conversations: list[Conversation]
) -> None:
    one = conversations[0]
    squashed = pytest.approx(1 / (1 + math.exp(-one.score)), abs=TOLERANCE)
    vllm = post(f"{services.proxy}/classify", input=one.rendered, use_activation=True)
    tei = post(f"{services.proxy}/predict", inputs=one.rendered)
    assert (vllm.json()["data"][0]["probs"], tei.json()) == ([squashed], [{"score": squashed, "label": "LABEL_0"}])
    assert [reply.headers["x-rm-robust-activation"] for reply in (vllm, tei)] == ["sigmoid", "sigmoid"]
    raw = post(f"{services.proxy}/predict", inputs=one.rendered, raw_scores=True)
    assert raw.headers["x-rm-robust-activation"] == "none"
    assert raw.headers["x-rm-robust-checkpoint"] == read_manifest(services.checkpoint_dir).content_sha256


def test_teis_predict_says_the_raw_scores_of_texts_and_pairs(
    services: Services, conversations: list[Conversation]
) -> None:
    single_turn = [conversation for conversation in conversations if len(conversation.prompt) == 1]
    batch = [[c.rendered] for c in conversations] + [[c.prompt[0]["content"], c.completion] for c in single_turn]
    reply = post(f"{services.proxy}/predict", inputs=batch, raw_scores=True, truncate=False).json()
    assert [prediction["score"] for (prediction,) in reply] == scores_of([*conversations, *single_turn])


def test_teis_rerank_orders_a_prompts_completions_by_their_scores(services: Services) -> None:
    texts = [text(Random(seed), num_words=10) for seed in range(8)]
    with RewardClient(services.proxy) as client:
        ((*scores,),) = client.score([ScoreInput(prompt="red stone", completions=texts)]).scores
    ranks = post(f"{services.proxy}/rerank", query="red stone", texts=texts, raw_scores=True, return_text=True).json()
    assert [rank["index"] for rank in ranks] == sorted(range(8), key=lambda index: -scores[index])
    assert [rank["score"] for rank in ranks] == pytest.approx(sorted(scores, reverse=True), abs=TOLERANCE)
    assert [rank["text"] for rank in ranks] == [texts[rank["index"]] for rank in ranks]


def test_what_follows_the_end_of_turn_is_left_off_and_counted(
    services: Services, conversations: list[Conversation]
) -> None:
    queries = [conversation.rendered + "\n" * (index < 5) for index, conversation in enumerate(conversations)]
    reply = post(f"{services.proxy}/get_reward", query=queries)
    assert reply.json()["rewards"] == scores_of(conversations)
    assert reply.headers["x-rm-robust-cut"] == "5"
    assert "x-rm-robust-cut" not in post(f"{services.proxy}/get_reward", query=queries[5:]).headers


GOOD = f"<|im_start|>user\nred{TURN_END}\n<|im_start|>assistant\nblue{TURN_END}"
OPEN_ENDED = GOOD.removesuffix(TURN_END)
TOO_LONG = GOOD.replace("blue", "blue " * NUM_POSITIONS)
REFUSED: list[tuple[str, dict[str, Any], int, str]] = [
    ("get_reward", {"query": [GOOD, OPEN_ENDED]}, 422, f"query[1]: The conversation does not end with '{TURN_END}'"),
    ("get_reward", {"query": ["red" + TURN_END]}, 422, "query[0]: The conversation has no assistant turn"),
    ("get_reward", {"query": [GOOD, TOO_LONG]}, 413, "query[1] has "),
    ("get_reward", {"query": GOOD}, 422, "query: "),
    ("classify", {"input": OPEN_ENDED}, 422, f"input: The conversation does not end with '{TURN_END}'"),
    ("classify", {"input": [5, 6]}, 422, "input: The token ids do not end with "),
    ("classify", {"input": [[10**9]]}, 422, "input[0]: Token id 1000000000 is not one"),
    ("classify", {"input": TOO_LONG}, 413, f"the limit max_length_tokens is {NUM_POSITIONS}"),
    ("classify", {"input": GOOD, "model": "gpt"}, 404, "model: there is no 'gpt', this service has tiny"),
    ("classify", {"input": GOOD, "truncate_prompt_tokens": 5}, 422, "truncate_prompt_tokens: "),
    ("classify", {"messages": [{"role": "user", "content": "red"}]}, 422, "messages: "),
    (
        "classify",
        {"messages": [{"role": "robot", "content": "red"}, {"role": "assistant", "content": "x"}]},
        422,
        "messages: Message 0 has role 'robot'",
    ),
    (
        "classify",
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b " * 400}]},
        413,
        "messages[1] has ",
    ),
    ("pooling", {"input": OPEN_ENDED}, 422, "input: "),
    ("predict", {"inputs": [["red", "blue"], [OPEN_ENDED]]}, 422, "inputs[1]: The conversation does not end"),
    ("predict", {"inputs": ["", "blue"]}, 422, "inputs[0]: The last user message of a prompt is empty"),
    ("predict", {"inputs": [GOOD], "truncate": True}, 422, "truncate: "),
    ("rerank", {"query": "", "texts": ["a"]}, 422, "query: The last user message of a prompt is empty"),
    ("rerank", {"query": "a", "texts": ["b", "red " * NUM_POSITIONS]}, 413, "texts[1] has "),
]


@pytest.mark.parametrize(("path", "body", "status", "message"), REFUSED)
def test_what_would_get_a_wrong_score_is_refused_by_its_field_in_the_dialects_json(
    services: Services, path: str, body: dict[str, Any], status: int, message: str
) -> None:
    response = httpx.post(f"{services.proxy}/{path}", json=body)
    assert response.status_code == status
    error = response.json()
    if path in ("predict", "rerank"):
        assert error == {"error": error["error"], "error_type": "Validation"}
        assert message in error["error"]
    else:
        assert set(error["error"]) == (
            {"type", "message"} if path == "get_reward" else {"type", "message", "param", "code"}
        )
        assert message in error["error"]["message"]


@pytest.mark.parametrize("path", ["get_reward", "classify", "pooling", "predict", "rerank"])
@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff", b"[" * 100_000, b'{"input": "\\ud800"}'])
def test_a_body_that_is_no_object_is_refused_by_every_dialect(services: Services, path: str, body: bytes) -> None:
    response = httpx.post(f"{services.proxy}/{path}", content=body)
    assert response.status_code == 422
    assert "error" in response.json()


def test_the_judge_takes_messages_and_pairs_and_no_rendered_text(services: Services) -> None:
    prompt = next(distinct_prompts(Random(1)))
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": "seven"}]
    reply = post(f"{services.judge}/classify", messages=turns).json()
    assert (reply["data"][0]["probs"], reply["usage"]["prompt_tokens"]) == ([gold_score(prompt, "seven")], 0)
    assert post(f"{services.judge}/predict", inputs=[prompt, "seven"], raw_scores=True).json()[0][
        "score"
    ] == gold_score(prompt, "seven")
    refused = httpx.post(f"{services.judge}/get_reward", json={"query": [GOOD]})
    assert refused.status_code == 422
    assert refused.json()["error"]["message"].startswith("query[0]: The embedded judge has no chat template")


def test_the_openapi_schema_has_every_dialect_without_dangling_references(services: Services) -> None:
    schema = httpx.get(f"{services.proxy}/openapi.json").json()
    for path, field in (
        ("get_reward", "query"),
        ("classify", "input"),
        ("pooling", "task"),
        ("predict", "inputs"),
        ("rerank", "texts"),
    ):
        assert (
            field
            in schema["paths"][f"/{path}"]["post"]["requestBody"]["content"]["application/json"]["schema"]["properties"]
        )
    assert "$defs" not in json.dumps(schema)
