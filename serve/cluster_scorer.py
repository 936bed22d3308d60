"""Scores through a service's handle, inside the Ray cluster that it runs on: what RewardClient does over HTTP, without HTTP and without a key."""

import logging
import time
from collections.abc import Sequence
from typing import Any

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from rm_robust.errors import ScoringError
from rm_robust.scoring import ScoreInput, ScoreReply, ScoreRequest, backoff_s, check_scores, merge_replies, request_for, split_inputs
from serve.scorer import Refusal

logger = logging.getLogger(__name__)
MAX_COMPLETIONS_PER_CALL = 256
NUM_ATTEMPTS = 9
ANSWERED_WITHIN_S = 300.0
NO_REPLY = (RayError, BackPressureError, DeploymentUnavailableError, TimeoutError)


class ClusterScorer:
    """A Scorer on one model of the service `app_name`. A call returns every score or raises ScoringError."""

    def __init__(self, app_name: str, model: str) -> None:
        self._handle = serve.get_app_handle(app_name)
        self._app_name, self._model = app_name, model

    def score(self, inputs: Sequence[ScoreInput]) -> ScoreReply:
        """Scores of all inputs in order. Raises ScoringError naming the inputs and the reason; nothing partial is returned."""
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
                raise ScoringError(
                    f"Scoring inputs {span.start} to {span.stop - 1} of {len(inputs)} by {self._app_name}/{self._model} failed: {error}"
                ) from error
        return merge_replies(replies, spans, expected_checkpoint=None)

    def _reply(self, request: ScoreRequest, call: Any) -> ScoreReply:
        """Asks again where RewardClient would: after a full queue, a lost replica, and a failure of the server."""
        for attempt in range(NUM_ATTEMPTS):
            wait_s = 0.0
            try:
                answer = call.result(timeout_s=ANSWERED_WITHIN_S)
            except NO_REPLY as error:
                reason = f"{type(error).__name__} {error}"
            else:
                if isinstance(answer, ScoreReply):
                    return answer
                assert isinstance(answer, Refusal)
                reason, wait_s = f"{answer.status}: {answer.message}", answer.retry_after_s or 0.0
                if answer.status != 429 and answer.status < 500:
                    raise ScoringError(reason)
            if attempt + 1 < NUM_ATTEMPTS:
                logger.info("scoring attempt %d of %d: %s", attempt + 1, NUM_ATTEMPTS, reason)
                time.sleep(backoff_s(attempt, retry_after_s=wait_s))
                call = self._handle.score.remote(request)
        raise ScoringError(f"{NUM_ATTEMPTS} attempts, the last one: {reason}")
