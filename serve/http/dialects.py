"""Translate what other reward servers' clients send and expect, so that nobody has to change a client.

    body ──parts──► Parts (what the scorer takes) ──BatchQueue──► Scored ──reply──► the reply that the client knows

OpenRLHF  POST /get_reward             openrlhf/cli/serve_rm.py at 3c3be623
vLLM      POST /classify, /pooling     vllm/entrypoints/pooling/{classify,pooling}/protocol.py of 0.32.0
TEI       POST /predict, /rerank       router/src/http/types.rs of text-embeddings-inference at 0d124dc

The same conversation has the same raw score in all of them and in /v1/score. Whatever would change the score is refused
with the name of its field: truncation, text without its end-of-turn token, a doubled begin-of-sequence token, an
unknown option.

Three things differ from the other servers on purpose:

- vLLM applies a sigmoid unless `use_activation` is false. This service applies it only if `use_activation` is true.
- vLLM reads the score at the last token of the text. This service reads it at the end of turn, and cuts off what the
  template writes after that.
- TEI's pair [a, b] is a prompt and a completion.

A dialect's reply has no room for more, so headers hold the rest: X-RM-Robust-Activation (`none` or `sigmoid`),
X-RM-Robust-Checkpoint, and X-RM-Robust-Cut, the number of texts that were cut after their end of turn.
"""

import math
import time
import uuid
from typing import Annotated, Any, ClassVar, Literal, Protocol, Self, cast

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    StrictInt,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from rm_robust.scoring.contract import (
    EXAMPLE_COMPLETIONS,
    EXAMPLE_PROMPT,
    NOT_EMPTY_TEXT,
    ScoreInput,
    Texts,
    Turns,
)
from serve.http.dialect_replies import (
    ClassifyReply,
    OpenRlhfReply,
    PoolingReply,
    TeiErrorReply,
    TeiPrediction,
    TeiPredictReply,
    TeiRank,
    VllmErrorReply,
    VllmReply,
)
from serve.work import Part, Refusal, Scored

STRICT = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)
TokenIds = Annotated[list[Annotated[StrictInt, Field(ge=0, lt=2**31)]], Field(min_length=1, fail_fast=True)]


def must_be_false(value: bool) -> bool:
    if value:
        raise ValueError("only false is possible here")
    return value


OnlyFalse = Annotated[bool, AfterValidator(must_be_false), WithJsonSchema({"type": "boolean", "const": False})]
"""A field that must be false. Literal[False] would take 0 too."""
OneOrTwoTexts = Annotated[Texts, Field(min_length=1, max_length=2)]
SomeTexts = Annotated[Texts, Field(min_length=1)]
EXAMPLE_RENDERED = (
    f"<|im_start|>user\n{EXAMPLE_PROMPT}<|im_end|>\n<|im_start|>assistant\n{EXAMPLE_COMPLETIONS[0]}<|im_end|>\n"
)
"""A rendered conversation in ChatML; a model with another template needs its own form."""
EXAMPLE_MESSAGES: list[JsonValue] = [
    {"role": "user", "content": EXAMPLE_PROMPT},
    {"role": "assistant", "content": EXAMPLE_COMPLETIONS[0]},
]
TEI_ERROR_TYPES = {401: "Unauthorized", 413: "Validation", 422: "Validation", 429: "Overloaded", 503: "Unhealthy"}


class DialectBody(Protocol):
    """The body of a request in one dialect."""

    @property
    def squashes(self) -> bool:
        """Return whether the reply holds sigmoids of the scores, by the client's choice or by the dialect's default."""

    @property
    def wanted_model(self) -> str | None:
        """Return the model that the body names, None if it names none."""

    def parts(self) -> list[Part]:
        """Return what to score, in order."""

    def reply(self, scored: Scored) -> Any:
        """Return the JSON of the 200 reply."""

    @staticmethod
    def error(refusal: Refusal) -> Any:
        """Return the JSON of a failure."""


class OpenRlhfBody(BaseModel):
    """The request of OpenRLHF's trainer."""

    model_config = STRICT | ConfigDict(json_schema_extra={"examples": [{"query": [EXAMPLE_RENDERED]}]})

    query: SomeTexts
    """Rendered conversations with their special tokens."""
    prompts: list[Any] | None = None
    """For custom rewards. This service does not read it."""
    labels: list[Any] | None = None
    """For custom rewards. This service does not read it."""

    squashes: ClassVar[bool] = False
    wanted_model: ClassVar[None] = None

    def parts(self) -> list[Part]:
        return [rendered(text, f"query[{index}]") for index, text in enumerate(self.query)]

    def reply(self, scored: Scored) -> OpenRlhfReply:
        scores = flat_scores(scored)
        return {"rewards": scores, "scores": scores, "extra_logs": {"dummy_scores": scores}}

    @staticmethod
    def error(refusal: Refusal) -> dict[str, Any]:
        return {"error": {"type": refusal.type, "message": refusal.message}}


class VllmBody(BaseModel):
    """The fields that /classify and /pooling have in common: either `input` or `messages`, and the options."""

    model_config = STRICT | ConfigDict(
        json_schema_extra={"examples": [{"messages": EXAMPLE_MESSAGES}, {"input": [EXAMPLE_RENDERED]}]}
    )

    model: str | None = None
    """The name of a model in GET /v1/models; null means the first of them."""
    input: (
        Annotated[str, Field(min_length=1)]
        | SomeTexts
        | TokenIds
        | Annotated[list[TokenIds], Field(min_length=1, fail_fast=True)]
        | None
    ) = None
    """One or several rendered conversations, as text or token ids."""
    messages: Annotated[Turns, Field(min_length=2)] | None = None
    """One conversation; its last message is the completion."""
    use_activation: bool | None = None
    """True: the reply holds sigmoids of the scores."""
    add_special_tokens: bool | None = None
    """This changes nothing: no token is ever added."""
    add_generation_prompt: OnlyFalse = False
    """Must be false: true would score a turn that nobody has written."""
    continue_final_message: OnlyFalse = False
    """Must be false: true would cut off the end of turn, where the score is read."""
    truncate_prompt_tokens: None = None
    """Must be null: nothing is ever truncated."""
    encoding_format: Literal["float"] = "float"
    """Scores are JSON numbers."""
    user: str | None = None
    """This service does not read it."""

    @field_validator("messages")
    @classmethod
    def _ends_with_the_completion(cls, value: Turns | None) -> Turns | None:
        incomplete = [index for index, message in enumerate(value or []) if set(message) < {"role", "content"}]
        if incomplete:
            raise ValueError(f"message {incomplete[0]} needs a role and a content")
        if value is not None and value[-1]["role"] != "assistant":
            raise ValueError("the last message must be the assistant's: it is what is scored")
        return value

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.input is None) == (self.messages is None):
            raise ValueError("give either `input` or `messages`")
        return self

    @property
    def squashes(self) -> bool:
        return self.use_activation is True

    @property
    def wanted_model(self) -> str | None:
        return self.model

    def parts(self) -> list[Part]:
        if self.messages is not None:
            item = ScoreInput(prompt=self.messages[:-1], completions=[self.messages[-1]["content"]])
            return [Part(item, "messages", f"messages[{len(self.messages) - 1}]")]
        # By its type, a list whose first entry is an id holds nothing but ids.
        if isinstance(self.input, str) or (self.input and isinstance(self.input[0], int)):
            return [rendered(self.input, "input")]
        conversations = cast(list[str | list[int]], self.input)
        return [rendered(content, f"input[{index}]") for index, content in enumerate(conversations)]

    @staticmethod
    def error(refusal: Refusal) -> VllmErrorReply:
        return {"error": {"message": refusal.message, "type": refusal.type, "param": None, "code": refusal.status}}


class ClassifyBody(VllmBody):
    """The request of vLLM's /classify. The reply has the score, raw or not, as `probs[0]`."""

    def reply(self, scored: Scored) -> ClassifyReply:
        scores = activated(scored, squash=self.squashes)
        return {
            **vllm_envelope("classify", scored),
            "data": [
                {"index": index, "label": "LABEL_0", "probs": [score], "num_classes": 1}
                for index, score in enumerate(scores)
            ],
        }


class PoolingBody(VllmBody):
    """The request of vLLM's /pooling. The reply has the score, raw or not, as `data[0]`."""

    task: Literal["classify"] | None = None
    """The only task of a reward model."""

    def reply(self, scored: Scored) -> PoolingReply:
        scores = activated(scored, squash=self.squashes)
        return {
            **vllm_envelope("pool", scored),
            "data": [{"index": index, "object": "pooling", "data": [score]} for index, score in enumerate(scores)],
        }


class TeiPredictBody(BaseModel):
    """The request of TEI's /predict."""

    model_config = STRICT | ConfigDict(
        json_schema_extra={
            "examples": [{"inputs": [[EXAMPLE_PROMPT, text] for text in EXAMPLE_COMPLETIONS], "raw_scores": True}]
        }
    )

    inputs: str | OneOrTwoTexts | Annotated[list[OneOrTwoTexts], Field(min_length=1, fail_fast=True)]
    """A rendered conversation, a pair [prompt, completion], or a batch of [conversation] and [prompt, completion]."""
    truncate: OnlyFalse = False
    """Must be false: nothing is ever truncated."""
    truncation_direction: Literal["left", "right", "Left", "Right"] = "right"
    """This service does not read it."""
    raw_scores: bool = False
    """False: the reply holds sigmoids of the scores."""

    wanted_model: ClassVar[None] = None

    @property
    def squashes(self) -> bool:
        return not self.raw_scores

    def parts(self) -> list[Part]:
        is_batch = isinstance(self.inputs, list) and isinstance(self.inputs[0], list)
        return [
            pair_or_rendered(sequence, f"inputs[{index}]" if is_batch else "inputs")
            for index, sequence in enumerate(sequences_of(self.inputs))
        ]

    def reply(self, scored: Scored) -> TeiPredictReply:
        predictions: list[list[TeiPrediction]] = [
            [{"score": score, "label": "LABEL_0"}] for score in activated(scored, squash=self.squashes)
        ]
        return predictions if isinstance(self.inputs, list) and isinstance(self.inputs[0], list) else predictions[0]

    @staticmethod
    def error(refusal: Refusal) -> TeiErrorReply:
        return tei_error(refusal)


class TeiRerankBody(BaseModel):
    """The request of TEI's /rerank. The reply is sorted, the best completion first."""

    model_config = STRICT | ConfigDict(
        json_schema_extra={"examples": [{"query": EXAMPLE_PROMPT, "texts": [*EXAMPLE_COMPLETIONS], "raw_scores": True}]}
    )

    query: Annotated[str, NOT_EMPTY_TEXT]
    """The prompt, as one user turn."""
    texts: SomeTexts
    """The completions of the prompt."""
    truncate: OnlyFalse = False
    """Must be false: nothing is ever truncated."""
    truncation_direction: Literal["left", "right", "Left", "Right"] = "right"
    """This service does not read it."""
    raw_scores: bool = False
    """False: the reply holds sigmoids of the scores."""
    return_text: bool = False
    """True: the reply repeats the texts."""

    wanted_model: ClassVar[None] = None

    @property
    def squashes(self) -> bool:
        return not self.raw_scores

    def parts(self) -> list[Part]:
        return [Part(ScoreInput(prompt=self.query, completions=self.texts), "query", "texts[{}]")]

    def reply(self, scored: Scored) -> list[TeiRank]:
        (result,) = scored.results
        best_first = sorted(range(len(self.texts)), key=lambda index: -result.scores[index])
        scores = activated(scored, squash=self.squashes)
        if self.return_text:
            return [{"index": index, "text": self.texts[index], "score": scores[index]} for index in best_first]
        return [{"index": index, "score": scores[index]} for index in best_first]

    @staticmethod
    def error(refusal: Refusal) -> TeiErrorReply:
        return tei_error(refusal)


def rendered(content: str | list[int], field: str) -> Part:
    return Part(content, field, field)


def pair_or_rendered(sequence: list[str], field: str) -> Part:
    if len(sequence) == 1:
        return rendered(sequence[0], field)
    return Part(ScoreInput(prompt=sequence[0], completions=[sequence[1]]), f"{field}[0]", f"{field}[1]")


def sequences_of(inputs: str | list[str] | list[list[str]]) -> list[list[str]]:
    """Return TEI's three forms of input as one list of [text] and [prompt, completion]."""
    if isinstance(inputs, str):
        return [[inputs]]
    if isinstance(inputs[0], list):
        return inputs
    return [inputs]


def flat_scores(scored: Scored) -> list[float]:
    return [score for result in scored.results for score in result.scores]


def activated(scored: Scored, *, squash: bool) -> list[float]:
    """Return the scores in order, raw, or each through a sigmoid."""
    return [sigmoid(score) for score in flat_scores(scored)] if squash else flat_scores(scored)


def sigmoid(score: float) -> float:
    """Return 1 / (1 + e^-score), without overflow."""
    return 1 / (1 + math.exp(-score)) if score >= 0 else math.exp(score) / (1 + math.exp(score))


def vllm_envelope(kind: str, scored: Scored) -> VllmReply:
    """Return vLLM's reply without its `data`. A scorer that makes no tokens reports 0 tokens."""
    counts = [result.token_counts for result in scored.results if result.token_counts is not None]
    num_tokens = sum(count.prompt + sum(count.completions) for count in counts)
    return {
        "id": f"{kind}-{uuid.uuid4().hex}",
        "object": "list",
        "created": int(time.time()),
        "model": scored.served.model,
        "usage": {
            "prompt_tokens": num_tokens,
            "total_tokens": num_tokens,
            "completion_tokens": 0,
            "prompt_tokens_details": None,
        },
    }


def tei_error(refusal: Refusal) -> TeiErrorReply:
    return {"error": refusal.message, "error_type": TEI_ERROR_TYPES.get(refusal.status, "Backend")}
