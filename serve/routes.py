"""The HTTP side: checks bodies, passes requests to the scorer's handle, and gives every failure the same JSON shape.

Every path but the last two: 401 without a key · 429 beyond the key's own limit (keys.py)
POST /v1/score   200 scores · 413 too long · 422 wrong body · 429 queue full (Retry-After) · 500 scoring failed · 503 no replica
POST /get_reward, /classify, /pooling, /predict, /rerank   the same scores and statuses, in other servers' JSON (dialects.py)
GET  /v1/models  200 what is served · 429 · 500 · 503 as above
GET  /readyz     200: a replica of the scorer answers and has room · 503
GET  /healthz    200: this process answers
"""

import asyncio
import logging
import math
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ValidationError
from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException

from rm_robust.scoring import SCORE_PATH, ErrorDetail, ErrorReply, ScoreReply, ScoreRequest
from serve.dialects import ClassifyBody, DialectBody, OpenRlhfBody, PoolingBody, TeiPredictBody, TeiRerankBody
from serve.keys import Guard, RequireKey, error_reply
from serve.scorer import DialectRequest, Outcome, Refusal, ServedModel
from serve.settings import ScoringAppSettings

logger = logging.getLogger(__name__)
SCORER_FAILURES = (BackPressureError, DeploymentUnavailableError, RayActorError, RayTaskError)
"""What a call of the scorer's handle raises when no score comes back; refusal_of says what it becomes."""
READY_WITHIN_S = 5.0
"""A replica that takes longer to answer is not ready."""
app = FastAPI(title="rm_robust scoring", docs_url=None, redoc_url=None)
"""Without the documentation pages: they load scripts from the internet."""
app.add_middleware(RequireKey)

ERRORS: dict[int | str, dict[str, Any]] = {status: {"model": ErrorReply} for status in (401, 413, 422, 429, 500, 503)}

DIALECT_ERRORS: dict[int | str, dict[str, Any]] = {status: {"description": HTTPStatus(status).phrase} for status in (401, 404, 413, 422, 429, 500, 503)}
"""Their bodies have the dialect's own shape, but for a missing key (ErrorReply)."""


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


def body_in_openapi(body: type[BaseModel]) -> dict[str, Any]:
    """The request schema for /openapi.json, which FastAPI cannot know because the route parses the body itself."""
    schema = body.model_json_schema()
    definitions = schema.pop("$defs", {})
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": without_references(schema, definitions)}}}}


def without_references(schema: Any, definitions: dict[str, Any]) -> Any:
    """The same schema with every definition written out where it is used; ours do not contain themselves."""
    if isinstance(schema, list):
        return [without_references(part, definitions) for part in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return without_references(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    return {name: without_references(part, definitions) for name, part in schema.items()}


@app.exception_handler(HTTPException)
async def unknown_route(_: Request, error: HTTPException) -> Response:
    """404 and 405 of paths below the route prefix."""
    return error_reply(error.status_code, HTTPStatus(error.status_code).phrase.lower().replace(" ", "_"), str(error.detail), {})


def native_error(refusal: Refusal) -> dict[str, Any]:
    return ErrorReply(error=ErrorDetail(type=refusal.type, message=refusal.message)).model_dump()


def refusal_response(refusal: Refusal, shape: Callable[[Refusal], dict[str, Any]] = native_error) -> Response:
    headers = {} if refusal.retry_after_s is None else {"Retry-After": str(math.ceil(refusal.retry_after_s))}
    return JSONResponse(shape(refusal), status_code=refusal.status, headers=headers)


def refusal_of(error: BackPressureError | DeploymentUnavailableError | RayActorError | RayTaskError) -> Refusal:
    """What a call of the scorer's handle that raised becomes. Status and Retry-After of a full queue are its BackpressureConfig's."""
    if isinstance(error, BackPressureError):
        message = "The queue of this scorer is full; try again after Retry-After seconds."
        return Refusal(error.status_code, "overloaded", message, error.retry_after_s or 1)
    if isinstance(error, RayTaskError):
        logger.error("the scorer failed", exc_info=error)
        return Refusal(500, "internal_error", "The scorer failed; the reason is in the server's log.")
    logger.warning("no replica: %s", error)
    return Refusal(503, "unavailable", "The scorer has no replica that can answer now; try again.")


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

    def __init__(self, scorer: "DeploymentHandle[Any]", settings: ScoringAppSettings) -> None:
        self._scorer = scorer
        self._model_name = settings.model_name
        self.guard = Guard(settings.api_keys)

    @app.post(SCORE_PATH, response_model=ScoreReply, responses=ERRORS, openapi_extra=body_in_openapi(ScoreRequest))
    async def score(self, request: Request) -> Response:
        # The body is parsed here, not by FastAPI: one parser, which also refuses what is not UTF-8 or nests without end, with one error shape.
        try:
            body = ScoreRequest.model_validate_json(await request.body())
        except ValidationError as error:
            return refusal_response(Refusal(422, "invalid_request", describe_invalid_body(error)))
        outcome = await self._outcome(body)
        if isinstance(outcome, Refusal):
            return refusal_response(outcome)
        served = outcome.served
        reply = ScoreReply(model=served.model, checkpoint=served.checkpoint, template=served.template, results=outcome.results)
        return Response(reply.model_dump_json(), media_type="application/json")

    @app.post("/get_reward", responses=DIALECT_ERRORS, openapi_extra=body_in_openapi(OpenRlhfBody))
    async def open_rlhf(self, request: Request) -> Response:
        return await self._answer(request, OpenRlhfBody)

    @app.post("/classify", responses=DIALECT_ERRORS, openapi_extra=body_in_openapi(ClassifyBody))
    async def vllm_classify(self, request: Request) -> Response:
        return await self._answer(request, ClassifyBody)

    @app.post("/pooling", responses=DIALECT_ERRORS, openapi_extra=body_in_openapi(PoolingBody))
    async def vllm_pooling(self, request: Request) -> Response:
        return await self._answer(request, PoolingBody)

    @app.post("/predict", responses=DIALECT_ERRORS, openapi_extra=body_in_openapi(TeiPredictBody))
    async def tei_predict(self, request: Request) -> Response:
        return await self._answer(request, TeiPredictBody)

    @app.post("/rerank", responses=DIALECT_ERRORS, openapi_extra=body_in_openapi(TeiRerankBody))
    async def tei_rerank(self, request: Request) -> Response:
        return await self._answer(request, TeiRerankBody)

    @app.get("/v1/models", response_model=ModelList, responses={status: ERRORS[status] for status in (401, 429, 500, 503)})
    async def models(self) -> Response:
        try:
            served: ServedModel = await self._scorer.describe.remote()
        except SCORER_FAILURES as error:
            return refusal_response(refusal_of(error))
        entry = ModelEntry(id=served.model, checkpoint=served.checkpoint, template=served.template, max_length_tokens=served.max_length_tokens)
        return Response(ModelList(data=[entry]).model_dump_json(), media_type="application/json")

    @app.get("/readyz", responses={503: ERRORS[503]})
    async def readyz(self) -> Response:
        answer = self._scorer.describe.remote()
        try:
            await asyncio.wait_for(answer, READY_WITHIN_S)
        except TimeoutError:
            answer.cancel()  # type: ignore[no-untyped-call]
            return error_reply(503, "not_ready", f"No replica of the scorer answered within {READY_WITHIN_S:.0f} s.", {})
        except SCORER_FAILURES as error:
            logger.info("not ready: %s", error)
            return error_reply(503, "not_ready", "No replica of the scorer has room for a request.", {})
        return Response('{"status":"ready"}', media_type="application/json")

    @app.get("/healthz")
    async def healthz(self) -> dict[str, str]:
        return {"status": "alive"}

    async def _answer(self, request: Request, dialect: type[OpenRlhfBody | ClassifyBody | PoolingBody | TeiPredictBody | TeiRerankBody]) -> Response:
        """One request of a dialect, scored as every other, and its reply or failure in that dialect's JSON."""
        try:
            body: DialectBody = dialect.model_validate_json(await request.body())
        except ValidationError as error:
            return refusal_response(Refusal(422, "invalid_request", describe_invalid_body(error)), dialect.error)
        parts = body.parts(self._model_name)
        outcome = parts if isinstance(parts, Refusal) else await self._outcome(DialectRequest(parts))
        if isinstance(outcome, Refusal):
            return refusal_response(outcome, dialect.error)
        headers = {"X-RM-Robust-Activation": "sigmoid" if body.squashes else "none", "X-RM-Robust-Checkpoint": outcome.served.checkpoint}
        if outcome.num_cut:
            headers["X-RM-Robust-Cut"] = str(outcome.num_cut)
        return JSONResponse(body.reply(outcome), headers=headers)

    async def _outcome(self, request: ScoreRequest | DialectRequest) -> Outcome:
        try:
            outcome: Outcome = await self._scorer.score.remote(request)
        except SCORER_FAILURES as error:
            return refusal_of(error)
        return outcome
