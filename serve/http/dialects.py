"""What other reward servers' clients send and expect, translated: nobody has to change a client to be scored here.

    body ──parts──► Parts (what the scorer takes) ──BatchQueue──► Scored ──reply──► the reply that the client knows

OpenRLHF  POST /get_reward             openrlhf/cli/serve_rm.py at 3c3be623
vLLM      POST /classify, /pooling     vllm/entrypoints/pooling/{classify,pooling}/protocol.py of 0.32.0
TEI       POST /predict, /rerank       router/src/http/types.rs of text-embeddings-inference at 0d124dc

The same conversation has the same raw score in all of them and in /v1/score. What would change it is refused by its field: truncation,
text without its end-of-turn token, a doubled begin-of-sequence token, an option that is not known here. Three things differ on purpose.
vLLM squashes through a sigmoid unless `use_activation` is false; here it must be true. vLLM reads the score at the last token of the text;
here it is the end of turn, and what the template writes after that is left off. TEI's pair [a, b] is prompt and completion.

A reply has no room for more than its dialect knows, so headers say the rest: X-RM-Robust-Activation (`none` or `sigmoid`),
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

from rm_robust.scoring.contract import NOT_EMPTY_TEXT, ScoreInput, Texts, Turns
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
"""Literal[False] takes 0 too."""
OneOrTwoTexts = Annotated[Texts, Field(min_length=1, max_length=2)]
SomeTexts = Annotated[Texts, Field(min_length=1)]
EXAMPLE_RENDERED = "<|im_start|>user\nName a colour.<|im_end|>\n<|im_start|>assistant\nBlue.<|im_end|>\n"
"""In ChatML; a model with another template wants its own."""
EXAMPLE_MESSAGES: list[JsonValue] = [
    {"role": "user", "content": "Name a colour."},
    {"role": "assistant", "content": "Blue."},
]
TEI_ERROR_TYPES = {401: "Unauthorized", 413: "Validation", 422: "Validation", 429: "Overloaded", 503: "Unhealthy"}


class DialectBody(Protocol):
    """One dialect's request."""

    @property
    def squashes(self) -> bool:
        """The reply holds sigmoids of the scores, because this dialect's client asked for that or did not say no."""

    @property
    def wanted_model(self) -> str | None:
        """The model that the body names, if it can."""

    def parts(self) -> list[Part]:
        """What to score, in order."""

    def reply(self, scored: Scored) -> Any:
        """The JSON of the 200 reply."""

    @staticmethod
    def error(refusal: Refusal) -> Any:
        """The JSON of a failure."""


class OpenRlhfBody(BaseModel):
    """As OpenRLHF's trainer sends it."""

    model_config = STRICT | ConfigDict(json_schema_extra={"examples": [{"query": [EXAMPLE_RENDERED]}]})

    query: SomeTexts
    """Rendered conversations, special tokens kept."""
    prompts: list[Any] | None = None
    """For custom rewards; not read."""
    labels: list[Any] | None = None
    """For custom rewards; not read."""

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
    """What /classify and /pooling have in common: either `input` or `messages`."""

    model_config = STRICT | ConfigDict(
        json_schema_extra={"examples": [{"messages": EXAMPLE_MESSAGES}, {"input": [EXAMPLE_RENDERED]}]}
    )

    model: str | None = None
    """One of GET /v1/models; None: the first of them."""
    input: (
        Annotated[str, Field(min_length=1)]
        | SomeTexts
        | TokenIds
        | Annotated[list[TokenIds], Field(min_length=1, fail_fast=True)]
        | None
    ) = None
    """One or several rendered conversations, as text or token ids."""
    messages: Annotated[Turns, Field(min_length=2)] | None = None
    """One conversation, the completion last."""
    use_activation: bool | None = None
    """True: sigmoids of the scores."""
    add_special_tokens: bool | None = None
    """Changes nothing: no token is ever added."""
    add_generation_prompt: OnlyFalse = False
    """True would score a turn that nobody has written."""
    continue_final_message: OnlyFalse = False
    """True would leave off the end of turn, where the score is read."""
    truncate_prompt_tokens: None = None
    """Nothing is ever truncated."""
    encoding_format: Literal["float"] = "float"
    """Scores are JSON numbers."""
    user: str | None = None
    """Not read."""

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
        if isinstance(self.input, str) or (
            self.input and isinstance(self.input[0], int)
        ):  # the union holds ids alone, or none
            return [rendered(self.input, "input")]
        several = cast(list[str | list[int]], self.input)
        return [rendered(content, f"input[{index}]") for index, content in enumerate(several)]

    @staticmethod
    def error(refusal: Refusal) -> VllmErrorReply:
        return {"error": {"message": refusal.message, "type": refusal.type, "param": None, "code": refusal.status}}


class ClassifyBody(VllmBody):
    """vLLM's /classify: the score is `probs[0]`, raw or not."""

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
    """vLLM's /pooling: the score is `data[0]`, raw or not."""

    task: Literal["classify"] | None = None
    """A reward model's only one."""

    def reply(self, scored: Scored) -> PoolingReply:
        scores = activated(scored, squash=self.squashes)
        return {
            **vllm_envelope("pool", scored),
            "data": [{"index": index, "object": "pooling", "data": [score]} for index, score in enumerate(scores)],
        }


class TeiPredictBody(BaseModel):
    """TEI's /predict."""

    model_config = STRICT | ConfigDict(
        json_schema_extra={
            "examples": [{"inputs": [["Name a colour.", "Blue."], ["Name a colour.", "Seven."]], "raw_scores": True}]
        }
    )

    inputs: str | OneOrTwoTexts | Annotated[list[OneOrTwoTexts], Field(min_length=1, fail_fast=True)]
    """A rendered conversation, a pair [prompt, completion], or a batch of [conversation] and [prompt, completion]."""
    truncate: OnlyFalse = False
    """Nothing is ever truncated."""
    truncation_direction: Literal["left", "right", "Left", "Right"] = "right"
    """Not read."""
    raw_scores: bool = False
    """False: sigmoids of the scores."""

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
    """TEI's /rerank; the reply is sorted, the best first."""

    model_config = STRICT | ConfigDict(
        json_schema_extra={"examples": [{"query": "Name a colour.", "texts": ["Blue.", "Seven."], "raw_scores": True}]}
    )

    query: Annotated[str, NOT_EMPTY_TEXT]
    """The prompt: one user turn."""
    texts: SomeTexts
    """Its completions."""
    truncate: OnlyFalse = False
    """Nothing is ever truncated."""
    truncation_direction: Literal["left", "right", "Left", "Right"] = "right"
    """Not read."""
    raw_scores: bool = False
    """False: sigmoids of the scores."""
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
        order = sorted(range(len(self.texts)), key=lambda index: -result.scores[index])
        scores = activated(scored, squash=self.squashes)
        if self.return_text:
            return [{"index": index, "text": self.texts[index], "score": scores[index]} for index in order]
        return [{"index": index, "score": scores[index]} for index in order]

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
    """TEI's three forms as one list of [text] and [prompt, completion]."""
    if isinstance(inputs, str):
        return [[inputs]]
    if isinstance(inputs[0], list):
        return inputs
    return [inputs]


def flat_scores(scored: Scored) -> list[float]:
    return [score for result in scored.results for score in result.scores]


def activated(scored: Scored, *, squash: bool) -> list[float]:
    """The scores in order, raw, or each through a sigmoid."""
    return [sigmoid(score) for score in flat_scores(scored)] if squash else flat_scores(scored)


def sigmoid(score: float) -> float:
    """1 / (1 + e^-score), without overflow."""
    return 1 / (1 + math.exp(-score)) if score >= 0 else math.exp(score) / (1 + math.exp(score))


def vllm_envelope(kind: str, scored: Scored) -> VllmReply:
    """vLLM's reply but for its `data`. A scorer that makes no tokens reports none."""
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
