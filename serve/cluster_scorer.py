"""Get scores from a service inside its own Ray cluster, through its handle.

This does what RewardClient does over HTTP, without HTTP and without a key.
"""

import time
from collections.abc import Sequence
from typing import Any

import ray.serve as ray_serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from rm_robust.errors import ScoringError
from rm_robust.scoring.client import MAX_RETRIES, Failure, Retries
from rm_robust.scoring.contract import (
    ScoreInput,
    ScoreReply,
    ScoreRequest,
    check_scores,
    merge_replies,
    request_for,
    split_inputs,
)
from serve.work import Refusal

MAX_COMPLETIONS_PER_CALL = 256
ANSWERED_WITHIN_S = 300.0
NO_REPLY = (RayError, BackPressureError, DeploymentUnavailableError, TimeoutError)


class ClusterScorer:
    """A Scorer that asks one model of the service `app_name`. A call returns every score or raises ScoringError."""

    def __init__(self, app_name: str, model: str) -> None:
        self._handle = ray_serve.get_app_handle(app_name)
        self._app_name, self._model = app_name, model

    def score(self, inputs: Sequence[ScoreInput]) -> ScoreReply:
        """Return the scores of all inputs in order.

        Raises ScoringError that names the inputs and the reason; nothing partial is returned.
        """
        if not inputs:
            raise ScoringError("There is nothing to score: the list of inputs is empty.")
        spans = split_inputs(inputs, MAX_COMPLETIONS_PER_CALL)
        requests = [request_for([inputs[i] for i in span], model=self._model, calibrated=False) for span in spans]
        calls = [self._handle.score.remote(request) for request in requests]
        replies = []
        for span, request, call in zip(spans, requests, calls, strict=True):
            try:
                replies.append(check_scores(self._reply(request, call), request))
            except ScoringError as error:
                raise type(error)(
                    f"Scoring inputs {span.start} to {span.stop - 1} of {len(inputs)} "
                    f"by {self._app_name}/{self._model} failed: {error}"
                ) from error
        return merge_replies(replies, spans, expected_checkpoint=None)

    def _reply(self, request: ScoreRequest, call: Any) -> ScoreReply:
        """Return the reply to a call, and call again where RewardClient would.

        That is after a full queue, a lost replica, and a failure of the server.
        """
        retries = Retries(MAX_RETRIES)
        while True:
            try:
                answer = call.result(timeout_s=ANSWERED_WITHIN_S)
            except NO_REPLY as error:
                status = 504 if isinstance(error, TimeoutError) else 500 if isinstance(error, RayTaskError) else 503
                failure = Failure(status, f"{type(error).__name__} {error}")
            else:
                if isinstance(answer, ScoreReply):
                    return answer
                assert isinstance(answer, Refusal)
                failure = Failure(
                    answer.status, f"{answer.status}: {answer.message}", answer.type, answer.retry_after_s or 0.0
                )
            time.sleep(retries.next_wait_s(failure))
            call = self._handle.score.remote(request)
