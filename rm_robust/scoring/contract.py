"""The scoring contract: what goes over HTTP, and what a reply must be. rm_robust/scoring/client.py has the clients.

    POST {base_url}/v1/score   {"inputs": [{"prompt": text or messages, "completions": [text, ...]}, ...]}
                               and, if wanted, "model": "…" (of GET /v1/models; otherwise its first), "calibrated": true
    200                        {"model": "...", "checkpoint": "sha256:...", "template": "sha256:...",
                                "results": [{"scores": [float, ...],
                                             "token_counts": {"prompt": int, "completions": [int, ...]}}, ...]}
    any other status           {"error": {"type": "...", "message": "..."}}

`template` is the chat template's hash. It and `token_counts` are null where no tokens are made (the judge). Scores are
raw (no sigmoid), one for each completion, in the order of the request. Calibrated scores, (raw - mean) / std, come with
"calibration": {"mean": …, "std": …}. A text prompt is one user turn. A request without inputs, or an input without
completions, is a caller's mistake (422). An empty completion is scored, as a policy that stops at once writes one.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Protocol

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, WithJsonSchema

from rm_robust.data.records import Message
from rm_robust.errors import ScoringError

SCORE_PATH = "/v1/score"
ERROR_HEADER = "x-rm-robust-error"
NOT_SCORABLE = "scoring_failed"
"""The error's type when the score of a completion is not a number. Another attempt would give the same."""

Score = Annotated[float, Field(strict=True, allow_inf_nan=False)]

TURN_SCHEMA = {
    "type": "object",
    "title": "Message",
    "properties": {
        "role": {"type": "string", "enum": ["system", "user", "assistant"], "description": "Who speaks."},
        "content": {"type": "string", "description": "Text; a special token in it is plain text."},
    },
    "required": ["role", "content"],
    "additionalProperties": {"type": "string", "description": "Not read."},
}
Turn = Annotated[Message, WithJsonSchema(TURN_SCHEMA)]
# The first wrong item of a list says enough: a body may hold a million, and describing each would cost a kilobyte.
Texts = Annotated[list[str], Field(fail_fast=True)]
Turns = Annotated[list[Turn], Field(fail_fast=True)]
# These are for the schema alone: the chat format refuses an empty prompt, with a better message.
NOT_EMPTY_TEXT = Field(json_schema_extra={"minLength": 1})
NO_EMPTY_LIST = Field(json_schema_extra={"minItems": 1})


class ScoreInput(BaseModel):
    """One prompt and the K >= 1 completions of it to score."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    prompt: Annotated[str, NOT_EMPTY_TEXT] | Annotated[Turns, NO_EMPTY_LIST]
    """One user turn as text, or messages, of which the last is the user's."""
    completions: Texts = Field(min_length=1)
    """Texts to score as the assistant's next turn; an empty one is scored too."""


EXAMPLE_PROMPT = "Today Mia bought a brown pear. Please tell me only the thing."
EXAMPLE_COMPLETIONS = ("The answer is pear.", "It is brown.")
"""A prompt of the embedded world, which the demo's models know, with a good answer and a bad one. An apostrophe would
end the body of a curl command."""
EXAMPLE_INPUT: dict[str, JsonValue] = {"prompt": EXAMPLE_PROMPT, "completions": [*EXAMPLE_COMPLETIONS]}


class ScoreRequest(BaseModel):
    """Prompts, each with its completions."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        protected_namespaces=(),
        use_attribute_docstrings=True,
        json_schema_extra={"examples": [{"inputs": [EXAMPLE_INPUT]}]},
    )

    inputs: Annotated[list[ScoreInput], Field(fail_fast=True)] = Field(min_length=1)
    """Prompts with their completions; they are scored in this order."""
    model: str | None = None
    """One of the models of GET /v1/models. None: the first of them."""
    calibrated: bool = Field(default=False, strict=True)
    """True: (score - mean) / std of the checkpoint's held-out scores instead of the raw score."""


class TokenCounts(BaseModel):
    """Numbers of the tokens that were scored, with the prompt's header and each completion's end-of-turn token."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    prompt: int
    """Tokens of the prompt."""
    completions: list[int]
    """Tokens of each completion."""


class ScoreResult(BaseModel):
    """Scores of one input's completions, in their order."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    scores: list[Score]
    """Raw scores, or calibrated ones if the request asks for them."""
    token_counts: TokenCounts | None = None
    """None from a scorer without tokens, and from a server that is older than this field."""


class Calibration(BaseModel):
    """The constants of calibrated scores, which are (raw score - mean) / std."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    mean: float
    """Mean of the raw scores on held-out pairs."""
    std: float
    """Standard deviation of the raw scores on held-out pairs."""


class ScoreReply(BaseModel):
    """The scores of all inputs: `results[i]` belongs to `inputs[i]`, and all come from the one `checkpoint`.

    Fields that a newer server adds are ignored.
    """

    model_config = ConfigDict(use_attribute_docstrings=True)

    model: str
    """The model that answered."""
    checkpoint: str
    """The hash of the model's weights and tokenizer."""
    template: str | None = None
    """The chat template's hash. None from a scorer without a template, and from a server that is older than this
    field."""
    calibration: Calibration | None = None
    """The constants of calibrated scores. None for raw scores."""
    results: list[ScoreResult]
    """One result for each input."""

    @property
    def scores(self) -> list[list[float]]:
        return [result.scores for result in self.results]


class ErrorDetail(BaseModel):
    """Why a request got no scores."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    type: str
    """A word for programs; the header X-RM-Robust-Error says the same."""
    message: str
    """What was wrong, and the field or the limit."""


class ErrorReply(BaseModel):
    """The body of every failure of the service's own paths."""

    error: ErrorDetail


class Scorer(Protocol):
    """Anything that scores lists of inputs of any length.

    RewardClient does it over HTTP, serve.cluster_scorer.ClusterScorer inside a Ray cluster, and
    rm_robust.scoring.checkpoint_scorer.CheckpointScorer in this process.
    """

    def score(self, inputs: Sequence[ScoreInput]) -> ScoreReply:
        """Return the scores of all inputs in order, from one checkpoint, or raise ScoringError."""


def request_for(inputs: Sequence[ScoreInput], *, model: str | None, calibrated: bool) -> ScoreRequest:
    """Return a request with only the fields that are asked for, so that a server which lacks the others takes it."""
    fields: dict[str, Any] = {"model": model, "calibrated": calibrated or None}
    return ScoreRequest(inputs=list(inputs), **{name: value for name, value in fields.items() if value is not None})


def check_reply(body: bytes, request: ScoreRequest) -> ScoreReply:
    """Parse the body of a 200 reply and check it. Raises ScoringError, as check_scores does."""
    try:
        reply = ScoreReply.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ScoringError(
            f"the reply is malformed at {'.'.join(map(str, first['loc'])) or 'its start'}: {first['msg']}"
        ) from error
    return check_scores(reply, request)


def check_scores(reply: ScoreReply, request: ScoreRequest) -> ScoreReply:
    """Return the reply if it has one score for each completion, input by input, of the requested kind and model.

    Raises ScoringError otherwise. That each score is a finite number is checked when the body is parsed.
    """
    inputs = request.inputs
    if request.model not in (None, reply.model):
        raise ScoringError(f"the reply is from the model {reply.model!r}, but {request.model!r} was asked for")
    if request.calibrated and reply.calibration is None:
        raise ScoringError("the scores are raw, but calibrated ones were asked for: the server does not know them")
    if len(reply.results) != len(inputs):
        raise ScoringError(f"the reply has {len(reply.results)} results for {len(inputs)} inputs")
    for index, (result, item) in enumerate(zip(reply.results, inputs, strict=True)):
        if len(result.scores) != len(item.completions):
            raise ScoringError(
                f"results[{index}] has {len(result.scores)} scores for {len(item.completions)} completions: "
                "lost, added or out of order"
            )
    return reply


def merge_replies(
    replies: Sequence[ScoreReply], spans: Sequence[range], *, expected_checkpoint: str | None
) -> ScoreReply:
    """Return one reply for all spans.

    Raises ScoringError unless all come from one model and one checkpoint (the expected one, if given).
    """
    first = replies[0]
    wanted = expected_checkpoint or first.checkpoint
    for reply, span in zip(replies, spans, strict=True):
        if (reply.model, reply.checkpoint, reply.calibration) != (first.model, wanted, first.calibration):
            raise ScoringError(
                f"Inputs {span.start} to {span.stop - 1} were scored by {reply.model} {reply.checkpoint}, "
                f"not by {first.model} {wanted}: the checkpoint changed, and scores of two checkpoints cannot be "
                "compared. Score everything again."
            )
    results = [result for reply in replies for result in reply.results]
    return ScoreReply(
        model=first.model, checkpoint=wanted, template=first.template, calibration=first.calibration, results=results
    )


def split_inputs(inputs: Sequence[ScoreInput], max_completions: int) -> list[range]:
    """Return consecutive spans of inputs with at most `max_completions` completions; an input with more is one span."""
    starts, num_held = [0], 0
    for index, item in enumerate(inputs):
        if num_held and num_held + len(item.completions) > max_completions:
            starts.append(index)
            num_held = 0
        num_held += len(item.completions)
    return [range(start, end) for start, end in zip(starts, [*starts[1:], len(inputs)], strict=True)]
