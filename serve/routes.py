"""The HTTP side: checks bodies, passes requests to the scorer's handle, and gives every failure the same JSON shape.

Every path but the last two: 401 without a key · 429 beyond the key's own limit (keys.py)
POST /v1/score   200 scores · 413 too long · 422 wrong body · 429 queue full (Retry-After) · 500 scoring failed · 503 no replica
GET  /v1/models  200 what is served · 429 · 500 · 503 as above
GET  /readyz     200: a replica of the scorer answers and has room · 503
GET  /healthz    200: this process answers
"""

import asyncio
import logging
import math
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Response
from pydantic import BaseModel, ValidationError
from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException

from rm_robust.scoring import SCORE_PATH, ErrorReply, ScoreReply, ScoreRequest
from serve.keys import ApiKey, Guard, RequireKey, error_reply
from serve.scorer import Outcome, Refusal, ServedModel

logger = logging.getLogger(__name__)
SCORER_FAILURES = (BackPressureError, DeploymentUnavailableError, RayActorError, RayTaskError)
"""What a call of the scorer's handle raises when no score comes back; failure_response says what they become."""
READY_WITHIN_S = 5.0
"""A replica that takes longer to answer is not ready."""
app = FastAPI(title="rm_robust scoring", docs_url=None, redoc_url=None)
"""Without the documentation pages: they load scripts from the internet."""
app.add_middleware(RequireKey)

ERRORS: dict[int | str, dict[str, Any]] = {status: {"model": ErrorReply} for status in (401, 413, 422, 429, 500, 503)}


class ModelEntry(BaseModel):
    """One served model. `template` and `max_length_tokens` are null for a scorer that makes no tokens."""

    id: str
    checkpoint: str
    template: str | None
    max_length_tokens: int | None


class ModelList(BaseModel):
    """In OpenAI's envelope, which clients of vLLM read."""

    object: str = "list"
    data: list[ModelEntry]


def body_in_openapi() -> dict[str, Any]:
    """The request schema for /openapi.json, which FastAPI cannot know because the route parses the body itself."""
    schema = ScoreRequest.model_json_schema()
    schema["properties"]["inputs"]["items"] = schema.pop("$defs")["ScoreInput"]
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


@app.exception_handler(HTTPException)
async def unknown_route(_: Request, error: HTTPException) -> Response:
    """404 and 405 of paths below the route prefix."""
    return error_response(error.status_code, HTTPStatus(error.status_code).phrase.lower().replace(" ", "_"), str(error.detail))


def error_response(status: int, error_type: str, message: str) -> Response:
    return error_reply(status, error_type, message, {})


def overloaded_response(error: BackPressureError) -> Response:
    """Status and Retry-After come from the scorer deployment's BackpressureConfig."""
    response = error_response(error.status_code, "overloaded", "The queue of this scorer is full; try again after Retry-After seconds.")
    response.headers["Retry-After"] = str(math.ceil(error.retry_after_s or 1))
    return response


def failure_response(error: BackPressureError | DeploymentUnavailableError | RayActorError | RayTaskError) -> Response:
    """What a call of the scorer's handle that raised becomes."""
    if isinstance(error, BackPressureError):
        return overloaded_response(error)
    if isinstance(error, RayTaskError):
        logger.error("the scorer failed", exc_info=error)
        return error_response(500, "internal_error", "The scorer failed; the reason is in the server's log.")
    logger.warning("no replica: %s", error)
    return error_response(503, "unavailable", "The scorer has no replica that can answer now; try again.")


def describe_invalid_body(error: ValidationError) -> str:
    """The first three problems as `inputs[0].completions: …`. The body's own text is not repeated."""
    problems = error.errors(include_url=False, include_input=False, include_context=False)
    lines = []
    for problem in problems[:3]:
        field = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in problem["loc"]).lstrip(".")
        lines.append(f"{field or 'body'}: {problem['msg']}")
    if len(problems) > 3:
        lines.append(f"and {len(problems) - 3} more problems")
    return "; ".join(lines)


@serve.ingress(app)  # takes a copy of `app` and of this module as they are here: what they use must stand above
class ScoringRoutes:
    """Holds no model: it answers while the scorer works."""

    def __init__(self, scorer: "DeploymentHandle[Any]", api_keys: tuple[ApiKey, ...]) -> None:
        self._scorer = scorer
        self.guard = Guard(api_keys)

    @app.post(SCORE_PATH, response_model=ScoreReply, responses=ERRORS, openapi_extra=body_in_openapi())
    async def score(self, request: Request) -> Response:
        # The body is parsed here, not by FastAPI: one parser, which also refuses what is not UTF-8 or nests without end, with one error shape.
        try:
            body = ScoreRequest.model_validate_json(await request.body())
        except ValidationError as error:
            return error_response(422, "invalid_request", describe_invalid_body(error))
        try:
            outcome: Outcome = await self._scorer.score.remote(body)
        except SCORER_FAILURES as error:
            return failure_response(error)
        if isinstance(outcome, Refusal):
            return error_response(outcome.status, outcome.type, outcome.message)
        served = outcome.served
        reply = ScoreReply(model=served.model, checkpoint=served.checkpoint, template=served.template, results=outcome.results)
        return Response(reply.model_dump_json(), media_type="application/json")

    @app.get("/v1/models", response_model=ModelList, responses={status: ERRORS[status] for status in (401, 429, 500, 503)})
    async def models(self) -> Response:
        try:
            served: ServedModel = await self._scorer.describe.remote()
        except SCORER_FAILURES as error:
            return failure_response(error)
        entry = ModelEntry(id=served.model, checkpoint=served.checkpoint, template=served.template, max_length_tokens=served.max_length_tokens)
        return Response(ModelList(data=[entry]).model_dump_json(), media_type="application/json")

    @app.get("/readyz", responses={503: ERRORS[503]})
    async def readyz(self) -> Response:
        answer = self._scorer.describe.remote()
        try:
            await asyncio.wait_for(answer, READY_WITHIN_S)
        except TimeoutError:
            answer.cancel()  # type: ignore[no-untyped-call]
            return error_response(503, "not_ready", f"No replica of the scorer answered within {READY_WITHIN_S:.0f} s.")
        except SCORER_FAILURES as error:
            logger.info("not ready: %s", error)
            return error_response(503, "not_ready", "No replica of the scorer has room for a request.")
        return Response('{"status":"ready"}', media_type="application/json")

    @app.get("/healthz")
    async def healthz(self) -> dict[str, str]:
        return {"status": "alive"}
