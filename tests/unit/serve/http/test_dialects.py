"""Test the translation of other servers' requests and replies, without a server.

The expected JSON is written down from those servers' schemas.
"""

import json
import math
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from rm_robust.scoring.contract import ScoreInput, ScoreResult, TokenCounts
from serve.http.dialects import ClassifyBody, OpenRlhfBody, PoolingBody, TeiPredictBody, TeiRerankBody, sigmoid
from serve.work import Part, Refusal, Scored, ServedModel

SERVED = ServedModel("m", "sha256:c", "sha256:t", 256)
RED, BLUE = "<|user|>red<|end|>", "<|user|>blue<|end|>"


def scored(*scores: float) -> Scored:
    """Return one conversation of 5 + 2 tokens for each score."""
    return Scored(
        SERVED, [ScoreResult(scores=[score], token_counts=TokenCounts(prompt=5, completions=[2])) for score in scores]
    )


def parse(body: type[BaseModel], **fields: Any) -> Any:
    return body.model_validate_json(json.dumps(fields))


def pair(prompt: str, completion: str) -> ScoreInput:
    return ScoreInput(prompt=prompt, completions=[completion])


def test_open_rlhf_gets_one_raw_score_a_query_under_its_three_names() -> None:
    body = parse(OpenRlhfBody, query=[RED, BLUE], prompts=["red", "blue"], labels=["", ""])
    assert body.parts() == [Part(RED, "query[0]", "query[0]"), Part(BLUE, "query[1]", "query[1]")]
    assert body.reply(scored(3.5, -2.0)) == {
        "rewards": [3.5, -2.0],
        "scores": [3.5, -2.0],
        "extra_logs": {"dummy_scores": [3.5, -2.0]},
    }


@pytest.mark.parametrize(
    ("sent", "parts"),
    [
        (RED, [Part(RED, "input", "input")]),
        ([RED, BLUE], [Part(RED, "input[0]", "input[0]"), Part(BLUE, "input[1]", "input[1]")]),
        ([5, 6], [Part([5, 6], "input", "input")]),
        ([[5, 6], [7]], [Part([5, 6], "input[0]", "input[0]"), Part([7], "input[1]", "input[1]")]),
    ],
)
def test_vllms_four_forms_of_input_are_one_or_several_conversations(sent: object, parts: list[Part]) -> None:
    assert parse(ClassifyBody, input=sent).parts() == parts
    assert parse(PoolingBody, model="m", input=sent).parts() == parts


def test_vllms_messages_are_the_prompt_and_the_completion_last() -> None:
    turns = [{"role": "user", "content": "red"}, {"role": "assistant", "content": "green"}]
    assert parse(ClassifyBody, messages=turns).parts() == [
        Part(ScoreInput(prompt=turns[:1], completions=["green"]), "messages", "messages[1]")
    ]


@pytest.mark.parametrize(
    ("use_activation", "expected"), [(None, [0.0, 2.0]), (False, [0.0, 2.0]), (True, [0.5, 1 / (1 + math.exp(-2))])]
)
def test_vllms_scores_are_raw_unless_activation_is_asked_for(
    use_activation: bool | None, expected: list[float]
) -> None:
    body = parse(ClassifyBody, input=[RED, BLUE], use_activation=use_activation)
    reply = body.reply(scored(0.0, 2.0))
    assert [entry["probs"][0] for entry in reply["data"]] == pytest.approx(expected)
    assert body.squashes is (use_activation is True)
    assert reply["id"].startswith("classify-")
    assert reply["data"][1] == {"index": 1, "label": "LABEL_0", "probs": [pytest.approx(expected[1])], "num_classes": 1}
    assert (reply["object"], reply["model"], reply["usage"]["prompt_tokens"], reply["usage"]["total_tokens"]) == (
        "list",
        "m",
        14,
        14,
    )


def test_vllms_pooling_has_the_score_as_its_vector() -> None:
    assert parse(PoolingBody, input=RED, task="classify").reply(scored(-3.0))["data"] == [
        {"index": 0, "object": "pooling", "data": [-3.0]}
    ]


def test_only_vllms_bodies_name_a_model() -> None:
    assert parse(ClassifyBody, model="gpt", input=RED).wanted_model == "gpt"
    assert parse(PoolingBody, input=RED).wanted_model is None
    assert parse(OpenRlhfBody, query=[RED]).wanted_model is None
    assert ClassifyBody.error(Refusal(404, "model_not_found", "m"))["error"] == {
        "message": "m",
        "type": "model_not_found",
        "param": None,
        "code": 404,
    }


@pytest.mark.parametrize(
    ("sent", "parts", "expected"),
    [
        (RED, [Part(RED, "inputs", "inputs")], [{"score": 1.0, "label": "LABEL_0"}]),
        ([RED], [Part(RED, "inputs", "inputs")], [{"score": 1.0, "label": "LABEL_0"}]),
        (["a", "b"], [Part(pair("a", "b"), "inputs[0]", "inputs[1]")], [{"score": 1.0, "label": "LABEL_0"}]),
        ([["a", "b"]], [Part(pair("a", "b"), "inputs[0][0]", "inputs[0][1]")], [[{"score": 1.0, "label": "LABEL_0"}]]),
        (
            [[RED], ["a", "b"]],
            [Part(RED, "inputs[0]", "inputs[0]"), Part(pair("a", "b"), "inputs[1][0]", "inputs[1][1]")],
            [[{"score": 1.0, "label": "LABEL_0"}], [{"score": 2.0, "label": "LABEL_0"}]],
        ),
    ],
)
def test_teis_strings_pairs_and_batches_are_told_apart_as_there(
    sent: object, parts: list[Part], expected: list[Any]
) -> None:
    body = parse(TeiPredictBody, inputs=sent, raw_scores=True)
    assert body.parts() == parts
    assert body.reply(scored(*[1.0, 2.0][: len(parts)])) == expected


def test_tei_squashes_unless_raw_scores_are_asked_for() -> None:
    body = parse(TeiPredictBody, inputs=RED)
    assert body.squashes
    assert body.reply(scored(2.0))[0]["score"] == pytest.approx(0.8807970779778823)
    assert not parse(TeiPredictBody, inputs=RED, raw_scores=True).squashes


def test_rerank_sorts_the_best_first_and_repeats_texts_only_when_asked() -> None:
    ranked = Scored(SERVED, [ScoreResult(scores=[-1.0, 3.0, 0.0])])
    body = parse(TeiRerankBody, query="red", texts=["a", "b", "c"], raw_scores=True, return_text=True)
    assert body.parts() == [Part(ScoreInput(prompt="red", completions=["a", "b", "c"]), "query", "texts[{}]")]
    assert body.reply(ranked) == [
        {"index": 1, "text": "b", "score": 3.0},
        {"index": 2, "text": "c", "score": 0.0},
        {"index": 0, "text": "a", "score": -1.0},
    ]
    assert parse(TeiRerankBody, query="red", texts=["a", "b", "c"]).reply(ranked)[1] == {"index": 2, "score": 0.5}


def test_the_order_holds_where_sigmoids_are_all_one() -> None:
    reply = parse(TeiRerankBody, query="red", texts=["a", "b"]).reply(
        Scored(SERVED, [ScoreResult(scores=[800.0, 900.0])])
    )
    assert reply == [{"index": 1, "score": 1.0}, {"index": 0, "score": 1.0}]


@pytest.mark.parametrize(
    ("score", "expected"), [(0.0, 0.5), (-1000.0, 0.0), (1000.0, 1.0), (math.log(3), 0.75), (-math.log(3), 0.25)]
)
def test_the_sigmoid_overflows_nowhere(score: float, expected: float) -> None:
    assert sigmoid(score) == pytest.approx(expected)


WRONG_BODIES: list[tuple[type[BaseModel], dict[str, Any], str]] = [
    (OpenRlhfBody, {}, "query"),
    (OpenRlhfBody, {"query": []}, "query"),
    (OpenRlhfBody, {"query": RED}, "query"),
    (OpenRlhfBody, {"query": [3]}, "query"),
    (OpenRlhfBody, {"query": [RED], "normalize": True}, "normalize"),
    (ClassifyBody, {}, "give either `input` or `messages`"),
    (
        ClassifyBody,
        {"input": RED, "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        "give either",
    ),
    (ClassifyBody, {"input": ""}, "input"),
    (ClassifyBody, {"input": []}, "input"),
    (ClassifyBody, {"input": [RED, 3]}, "input"),
    (ClassifyBody, {"input": [True]}, "input"),
    (ClassifyBody, {"messages": [{"role": "user", "content": "a"}]}, "messages"),
    (ClassifyBody, {"messages": [{"role": "assistant", "content": "a"}]}, "messages"),
    (ClassifyBody, {"messages": [[{"role": "user", "content": "a"}]]}, "messages"),
    (ClassifyBody, {"messages": [{"role": "user"}, {"role": "assistant", "content": "b"}]}, "messages"),
    (ClassifyBody, {"input": RED, "truncate_prompt_tokens": 5}, "truncate_prompt_tokens"),
    (ClassifyBody, {"input": RED, "activation": False}, "activation"),
    (ClassifyBody, {"input": RED, "task": "classify"}, "task"),
    (PoolingBody, {"input": RED, "task": "embed"}, "task"),
    (PoolingBody, {"input": RED, "encoding_format": "base64"}, "encoding_format"),
    (TeiPredictBody, {}, "inputs"),
    (TeiPredictBody, {"inputs": []}, "inputs"),
    (TeiPredictBody, {"inputs": ["a", "b", "c"]}, "inputs"),
    (TeiPredictBody, {"inputs": [["a", "b", "c"]]}, "inputs"),
    (TeiPredictBody, {"inputs": [["a"], []]}, "inputs"),
    (TeiPredictBody, {"inputs": [["a"], "b"]}, "inputs"),
    (TeiPredictBody, {"inputs": RED, "truncate": True}, "truncate"),
    (TeiPredictBody, {"inputs": RED, "raw_scores": "yes"}, "raw_scores"),
    (TeiRerankBody, {"texts": ["a"]}, "query"),
    (TeiRerankBody, {"query": "a", "texts": []}, "texts"),
    (TeiRerankBody, {"query": "a", "texts": ["b"], "truncate": True}, "truncate"),
]


@pytest.mark.parametrize(("body", "fields", "named"), WRONG_BODIES)
def test_a_wrong_body_is_refused_by_its_field(body: type[BaseModel], fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ValidationError) as caught:
        parse(body, **fields)
    problems = caught.value.errors(include_url=False)
    assert all(named in (problem["loc"] and str(problem["loc"][0]) or problem["msg"]) for problem in problems)
