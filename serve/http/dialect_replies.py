"""The types of the JSON that dialects.py answers with.

mypy checks the replies against them, and /openapi.json shows them.
"""

from typing import Literal, NotRequired

from typing_extensions import TypedDict  # pydantic takes typing's own TypedDict from Python 3.12 on


class OpenRlhfExtraLogs(TypedDict):
    dummy_scores: list[float]


class OpenRlhfReply(TypedDict):
    """The same raw scores, under each name that some version of OpenRLHF reads."""

    rewards: list[float]
    scores: list[float]
    extra_logs: OpenRlhfExtraLogs


class VllmUsage(TypedDict):
    """Token counts; all are 0 for a scorer that makes no tokens."""

    prompt_tokens: int
    total_tokens: int
    completion_tokens: Literal[0]
    prompt_tokens_details: None


class VllmReply(TypedDict):
    """The fields that the replies of /classify and /pooling have in common."""

    id: str
    object: Literal["list"]
    created: int
    model: str
    usage: VllmUsage


class ClassifiedText(TypedDict):
    index: int
    label: Literal["LABEL_0"]
    probs: list[float]
    num_classes: Literal[1]


class ClassifyReply(VllmReply):
    data: list[ClassifiedText]


class PooledText(TypedDict):
    index: int
    object: Literal["pooling"]
    data: list[float]


class PoolingReply(VllmReply):
    data: list[PooledText]


class VllmErrorDetail(TypedDict):
    message: str
    type: str
    param: None
    code: int


class VllmErrorReply(TypedDict):
    error: VllmErrorDetail


class TeiPrediction(TypedDict):
    score: float
    label: Literal["LABEL_0"]


TeiPredictReply = list[TeiPrediction] | list[list[TeiPrediction]]
"""The reply for one text or pair, or the reply for a batch."""


class TeiRank(TypedDict):
    index: int
    text: NotRequired[str]
    score: float


class TeiErrorReply(TypedDict):
    error: str
    error_type: str
